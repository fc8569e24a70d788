"""Scaling of rotary frequencies."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..basics.errors import ConversionError
from .checks import number


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies. `kind` is "llama3", "linear", "yarn", "longrope" or "dynamic": which other fields apply.

    The two `*_freq_factor` belong to llama3; the betas, `mscale`, `mscale_all_dim` and `truncate` to YaRN; to LongRoPE the divisors
    of frequencies, up to the original positions and beyond, and the factor of queries and keys, which None derives from `factor`.
    With YaRN, `llama_4_scaling_beta` scales queries by 1 + beta * log(1 + position // original positions), which is 1 up to these.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float | None = None
    llama_4_scaling_beta: float = 0.0

    def __post_init__(self) -> None:
        """Turn lists into tuples, and refuse values that are no numbers."""
        for name in ("short_factor", "long_factor"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)):
                raise ConversionError(f"{name} is {values!r:.80}; it must be a list of numbers")
            object.__setattr__(self, name, tuple(number(value, name) for value in values))

    def __str__(self) -> str:
        """Kind, and what applies to it."""
        own = {
            "llama3": [f"low {self.low_freq_factor:g}", f"high {self.high_freq_factor:g}"],
            "yarn": [f"fast {self.beta_fast:g}", f"slow {self.beta_slow:g}", *self._of_yarn],
            "longrope": [f"divisors {_range(self.short_factor)} and beyond {_range(self.long_factor)}"],
        }.get(self.kind)
        original = [] if own is None else [*own, f"from {self.original_max_position_embeddings} positions"]
        return ", ".join([self.kind, f"factor {self.factor:g}", *original])

    @property
    def _of_yarn(self) -> list[str]:
        """Fields of YaRN that are not as usual, in words."""
        mscales, amplitude = (self.mscale, self.mscale_all_dim), self.attention_factor
        return [
            *([f"mscales {mscales[0]:g} and {mscales[1]:g}"] if mscales != (1.0, 0.0) else []),
            *([f"attention factor {amplitude:g}"] if amplitude is not None else []),
            *(["not truncated"] if not self.truncate else []),
            *([f"queries scaled by {self.llama_4_scaling_beta:g}"] if self.llama_4_scaling_beta else []),
        ]

    @property
    def amplitude(self) -> float:
        """Factor of rotated queries and keys in LongRoPE (transformers' `attention_factor`)."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))


def _range(values: tuple[float, ...]) -> str:
    return f"{min(values):g} to {max(values):g}" if values else "none"

"""Rule for the positions of the original model, where config.json says them twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..basics.errors import ConversionError
from ..model.spec import ModelSpec
from .rules import Config
from .rules_attention import scaling_table

_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class InitialContext:
    """`initial_context_length`, which repeats the original positions of RoPE scaling. No class reads it, and it is not written.

    `default` are those where config.json has no table of rotary embeddings; one without them has nothing that could be repeated.
    """

    default: int
    keys: tuple[str, ...] = ("initial_context_length",)

    def read(self, config: Config) -> dict[str, Any]:
        table = scaling_table(config)[1] or {_ORIGINAL: self.default}
        value, original = config.get(self.keys[0]), table.get(_ORIGINAL) if isinstance(table, dict) else None
        if None not in (value, original) and value != original:
            raise ConversionError(
                f"config.json has {self.keys[0]}={value!r}, which repeats {_ORIGINAL}, and that is {original!r}; correct the one "
                "that is wrong"
            )
        return {}

    def write(self, _: ModelSpec) -> dict[str, Any]:
        return {}

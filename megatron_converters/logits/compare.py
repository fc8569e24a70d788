"""Difference between the logits of two models for the same random tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..basics.errors import ConversionError, UsageError
from ..formats.detect import format_of
from ..formats.kinds import HF, MEGATRON
from ..formats.megatron.reading import MegatronReadOptions
from . import memory
from .hf import HFModel
from .megatron import MegatronModel

#: Largest difference that float32 rounding explains, relative to the largest logit. Tiny models stay below 1e-6.
TOLERANCE = 1e-4
#: Seconds allowed for each model.
TIME_LIMIT = 3600.0
_NO_OPTIONS = MegatronReadOptions()


@dataclass(frozen=True)
class LogitsReport:
    """Differences between the logits of two models.

    `where` is the sequence, position and token of the largest absolute difference, `values` the two logits there.
    `agreement` is the fraction of positions at which both have the same most likely token. `scale` is the largest
    absolute logit, by which `tolerance` is multiplied. `notes` tell the reader what was not compared.
    """

    difference: float
    where: tuple[int, int, int]
    values: tuple[float, float]
    scale: float
    agreement: float
    positions: int
    tolerance: float
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether float32 rounding explains the difference."""
        return self.difference <= self.tolerance * self.scale

    def __str__(self) -> str:
        sequence, position, token = self.where
        lines = [
            f"logits {'agree' if self.ok else 'DIFFER'}: by up to {self.difference:.3g} where "
            f"{self.tolerance * self.scale:.3g} is allowed ({self.tolerance:g} of the largest, {self.scale:.3g})",
            f"largest difference in sequence {sequence}, position {position}, token {token}: "
            f"{self.values[0]:.6g} and {self.values[1]:.6g}",
            f"same most likely token at {self.agreement:.2%} of {self.positions} positions",
        ]
        return "\n".join([*lines, *self.notes])


def logits_of(
    path: Path,
    tokens: npt.NDArray[np.int64],
    *,
    options: MegatronReadOptions = _NO_OPTIONS,
    time_limit: float = TIME_LIMIT,
) -> npt.NDArray[np.float32]:
    """Logits, float32 [B, S, vocabulary], of the model in a folder for tokens [B, S], computed in float32 on the CPU.

    transformers runs a Hugging Face folder; megatron-core runs a Megatron-LM checkpoint, in one process for each rank that has a
    file (`mp_rank_*`) or in a single one (`torch_dist`). `options` supply what the checkpoint's args lack. Processes are spawned,
    so a script must call this under `if __name__ == "__main__":`.
    Raises `ConversionError` if a package is missing, the model does not fit into memory, or its tensors do not load strictly.
    """
    model = _open(path, options)
    if tokens.ndim != 2 or not tokens.size or tokens.min() < 0 or tokens.max() >= model.vocab_size:
        raise ConversionError(
            f"tokens must be [batch, length] numbers from 0 to {model.vocab_size - 1}, the vocabulary of {path}"
        )
    _check_memory(model, tokens.size)
    return _logits(model, tokens, time_limit)


def compare_logits(
    a: Path,
    b: Path,
    *,
    seed: int = 0,
    batch: int = 2,
    length: int = 128,
    tolerance: float = TOLERANCE,
    options: MegatronReadOptions = _NO_OPTIONS,
    time_limit: float = TIME_LIMIT,
) -> LogitsReport:
    """Run the models in two folders (see `logits_of`), one after the other, on the same `batch` x `length` random tokens.

    Each may take `time_limit` seconds. Also raises `ConversionError` if their vocabularies differ.
    """
    if batch < 1 or length < 1:
        raise UsageError(f"cannot compare {batch} sequences of {length} tokens; both numbers must be at least 1")
    models = _open(a, options), _open(b, options)
    vocabulary, notes = _common_vocabulary(*models)
    for model in models:
        _check_memory(model, batch * length)
    tokens = np.random.default_rng(seed).integers(vocabulary, size=(batch, length), dtype=np.int64)
    one, other = (_logits(model, tokens, time_limit)[..., :vocabulary] for model in models)
    return _report(one, other, tolerance, (*notes, *_window_notes(models, length)))


_Model = HFModel | MegatronModel


def _open(path: Path, options: MegatronReadOptions) -> _Model:
    found = format_of(path)
    if found == HF:
        return HFModel(path, options.ignore_tensors)
    if found == MEGATRON:
        return MegatronModel(path, options)
    raise ConversionError(f"{path} has a format ({found}) that cannot be run here; convert it and compare the result")


def _check_memory(model: _Model, tokens: int) -> None:
    memory.check(str(model.path), model.parameters, model.processes, tokens * model.vocab_size)


def _logits(model: _Model, tokens: npt.NDArray[np.int64], time_limit: float) -> npt.NDArray[np.float32]:
    logits = model.logits(tokens, time_limit)
    if not np.isfinite(logits).all():
        raise ConversionError(f"{model.path} computes logits that are infinite or NaN; its weights are damaged")
    return logits


def _common_vocabulary(a: _Model, b: _Model) -> tuple[int, list[str]]:
    """Size of the shared vocabulary, and notes. Further rows pass as padding only if their checkpoint does not record its size."""
    small, large = sorted((a, b), key=lambda model: model.vocab_size)
    extra = large.vocab_size - small.vocab_size
    if not extra:
        return small.vocab_size, []
    if not isinstance(large, MegatronModel) or large.padding_known:
        raise ConversionError(
            f"{a.path} has a vocabulary of {a.vocab_size} and {b.path} of {b.vocab_size}; they are not the same model"
        )
    return small.vocab_size, [f"{extra} further rows of {large.path}'s vocabulary, taken for padding, are not compared"]


def _window_notes(models: tuple[_Model, _Model], length: int) -> list[str]:
    """Notes on sliding windows that are too long for sequences of this length."""
    windows = {model.window for model in models if model.window is not None}
    return [
        f"sequences of {length} tokens do not test the sliding window of {window}; use longer ones"
        for window in sorted(windows)
        if window >= length
    ]


def _report(
    one: npt.NDArray[np.float32], other: npt.NDArray[np.float32], tolerance: float, notes: tuple[str, ...]
) -> LogitsReport:
    difference = np.abs(one - other)
    where = np.unravel_index(int(difference.argmax()), difference.shape)
    sequence, position, token = (int(number) for number in where)
    return LogitsReport(
        difference=float(difference[where]),
        where=(sequence, position, token),
        values=(float(one[where]), float(other[where])),
        scale=float(max(np.abs(one).max(), np.abs(other).max())),
        agreement=float((one.argmax(-1) == other.argmax(-1)).mean()),
        positions=one.shape[0] * one.shape[1],
        tolerance=tolerance,
        notes=notes,
    )

"""Output biases of attention that are 0 everywhere, without which a model is the same.

Llama's config.json has one key for the biases of queries, keys, values and output (`attention_bias`), so a Qwen under Llama's names
has zeros as the last. Megatron-LM has an output bias only together with those of the MLP (`--add-bias-linear`).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..model.spec import ModelSpec
from .composing import Piece

SLOT = "proj_bias"


def is_alone(spec: ModelSpec) -> bool:
    """Whether attention has an output bias and the MLP none, which no argument of Megatron-LM says."""
    return spec.values.get(SLOT) is True and not spec.values.get("mlp_bias")


def without(spec: ModelSpec) -> ModelSpec:
    """The same model without output biases."""
    return spec.replaced(**{SLOT: False})


def all_zero(pieces: Iterable[Piece]) -> bool:
    """Whether every stored element is 0, or -0. Reads them; biases are small."""
    return all(_is_zero(piece) for piece in pieces)


def _is_zero(piece: Piece) -> bool:
    values = np.ascontiguousarray(piece.elements(slice(None), slice(None)))
    bits = values.view(f"u{values.dtype.itemsize}")
    return not (bits << 1).any()  # without the sign


def without_absent(spec: ModelSpec, *, stored: bool) -> tuple[ModelSpec, list[str]]:
    """Spec of a checkpoint whose configuration has output biases: without them, and a note, where none is `stored`."""
    if stored or not is_alone(spec):
        return spec, []
    return without(spec), ["the configuration has output biases of attention, and the checkpoint none: they are 0"]

"""Models of `tests/oracle/hf.py` and `hf_kinds.py`, which other tests use, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import hf_kinds
from ..hf import FAMILIES, MOE_FAMILIES, SIZES
from .model import ENGINE, WITH_EXPERTS, Model

_MIXTURES = ("glm4-moe", "deepseek-v2-lite", "deepseek-v3", "deepseek-v3-yarn", "qwen3-next")
#: What a proof of other tests does not need again.
_PROVEN_THERE = (
    "llama3",
    "llama3.2-tied",
    "llama-head_dim",
    "qwen2-tied",
    "qwen3-tied",
    "qwen3-moe-sparse-step",
)


def _model(name: str, fields: Mapping[str, Any]) -> Model:
    whole = ENGINE if name == "qwen3-next" else {"impl": "local"}
    return (
        Model(fields, whole=whole, cut=WITH_EXPERTS)
        if name in (*MOE_FAMILIES, *_MIXTURES)
        else Model(fields, whole=whole)
    )


_FIELDS = {
    **{name: SIZES | fields for name, fields in {**FAMILIES, **MOE_FAMILIES}.items()},
    **hf_kinds.KINDS,
}
MODELS = {name: _model(name, fields) for name, fields in _FIELDS.items() if name not in _PROVEN_THERE}

"""Granite's mixtures of experts, whose multipliers are far from 1."""

from __future__ import annotations

from typing import Any

from ..hf_kinds import KINDS
from .model import WITH_EXPERTS, Model

_GRANITE: dict[str, Any] = dict(KINDS["granite-untied"]) | dict(
    num_local_experts=8, num_experts_per_tok=3, intermediate_size=48
)
MODELS = {
    "granitemoe": Model(_GRANITE | dict(model_type="granitemoe", tie_word_embeddings=True), cut=WITH_EXPERTS),
    "granitemoe-shared": Model(
        _GRANITE | dict(model_type="granitemoeshared", shared_intermediate_size=80), cut=WITH_EXPERTS
    ),
}

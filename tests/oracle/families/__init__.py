"""Tiny models of every family: what the proof of each family runs on, one module a lineage."""

from __future__ import annotations

from collections.abc import Mapping

from . import (
    earlier,
    gated_delta,
    gemma,
    gpt_oss,
    granite,
    latent,
    layer_norm,
    llama_variants,
    mimo,
    parallel,
    post_norms,
    remote,
    sigmoid,
)
from .model import Model

_LINEAGES = (
    *(earlier, gated_delta, gpt_oss, granite, latent, llama_variants, mimo, remote, sigmoid, layer_norm),
    *(post_norms, gemma, parallel),
)
MODELS: Mapping[str, Model] = {name: model for lineage in _LINEAGES for name, model in lineage.MODELS.items()}
"""Models by name; the first word of a name is mostly the family's."""

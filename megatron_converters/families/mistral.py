"""Mistral (transformers MistralForCausalLM): Llama's tensors and a sliding window."""

from __future__ import annotations

from .llama import DENSE, DERIVED_HEAD_DIM, SIZES, query_groups
from .rules import Row
from .rules_attention import Rope, Window
from .table import Family, Proof

FAMILY = Family(
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    since="0.8",
    proof=Proof.LOGITS,
    models="Mistral",
    covers="sliding window",
    tensors=DENSE,
    rules=(
        *SIZES,
        query_groups(absent=8),
        DERIVED_HEAD_DIM,
        Rope(),
        Window(default=4096),
        Row("max_position_embeddings", "max_position_embeddings", 4096 * 32),
    ),
)

"""Granite 3 (transformers GraniteForCausalLM): Llama with constants that scale embeddings, blocks, attention scores and logits.

Names and defaults: transformers 5.23, models/granite; a config.json without a multiplier means 1.
"""

from __future__ import annotations

from .llama import FAMILY as LLAMA
from .rules import Reciprocal, Row
from .table import Family, Proof

GRANITE = Family(
    name="granite",
    model_type="granite",
    architecture="GraniteForCausalLM",
    since="0.17",
    proof=Proof.LOGITS,
    models="Granite 3",
    covers="multipliers, as muP's flags or folded into weights",
    tensors=LLAMA.tensors,
    rules=(
        *LLAMA.rules,
        Row("embedding_multiplier", "embedding_multiplier", 1.0),
        Row("residual_multiplier", "residual_multiplier", 1.0),
        Row("attention_multiplier", "attention_multiplier", 1.0),
        Reciprocal("logits_multiplier", "logits_scaling"),
    ),
)

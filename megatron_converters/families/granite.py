"""Granite 3 (transformers GraniteForCausalLM): Llama with constants that scale embeddings, blocks, attention scores and logits.

Names and defaults: transformers 5.23, models/granite; a config.json without a multiplier means 1.
"""

from __future__ import annotations

from .llama import DENSE, DERIVED_HEAD_DIM, MLP_BIAS, PROJ_BIAS, QKV_BIAS, SIZES, query_groups
from .rules import Reciprocal, Row
from .rules_attention import Rope
from .table import Family

GRANITE = Family(
    name="granite",
    model_type="granite",
    architecture="GraniteForCausalLM",
    tensors={**DENSE, **QKV_BIAS, **PROJ_BIAS, **MLP_BIAS},
    rules=(
        *SIZES,
        query_groups(),
        DERIVED_HEAD_DIM,
        Rope(),
        Row("max_position_embeddings", "max_position_embeddings", 2048),
        Row("qkv_bias", "attention_bias", False),
        Row("proj_bias", "attention_bias", False),
        Row("mlp_bias", "mlp_bias", False),
        Row("embedding_multiplier", "embedding_multiplier", 1.0),
        Row("residual_multiplier", "residual_multiplier", 1.0),
        Row("attention_multiplier", "attention_multiplier", 1.0),
        Reciprocal("logits_multiplier", "logits_scaling"),
    ),
)

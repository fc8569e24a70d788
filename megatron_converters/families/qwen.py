"""Qwen2, Qwen2.5 (QKV bias) and Qwen3 (query and key norms) as transformers has them."""

from __future__ import annotations

from ..model.layers import EACH_HEAD
from .llama import DENSE, DERIVED_HEAD_DIM, PROJ_BIAS, QK_NORM, QKV_BIAS, SIZES, query_groups
from .rules import Implied, Restated, Row
from .rules_attention import Rope, SwitchedWindow
from .table import Family, Proof

QWEN2 = Family(
    name="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    since="0.8",
    proof=Proof.LOGITS,
    models="Qwen2, Qwen2.5",
    covers="QKV bias, tied embeddings, sliding window on some layers; YaRN from 0.19 on",
    tensors={**DENSE, **QKV_BIAS},
    rules=(
        *SIZES,
        query_groups(absent=32),
        DERIVED_HEAD_DIM,
        Rope(),
        SwitchedWindow(),
        Row("max_position_embeddings", "max_position_embeddings", 32768),
        Implied("qkv_bias", True),
        Restated("qkv_bias", True),
    ),
)

QWEN3 = Family(
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    since="0.10",
    proof=Proof.LOGITS,
    models="Qwen3",
    covers="query and key norms, `head_dim`, tied embeddings, sliding window on some layers; YaRN from 0.19 on",
    tensors={**DENSE, **QKV_BIAS, **PROJ_BIAS, **QK_NORM},
    rules=(
        *SIZES,
        query_groups(absent=32),
        Row("kv_channels", "head_dim", 128),
        Rope(),
        SwitchedWindow(),
        Row("max_position_embeddings", "max_position_embeddings", 32768),
        Row("qkv_bias", "attention_bias", False),
        Row("proj_bias", "attention_bias", False),
        Implied("qk_norm", EACH_HEAD),
        Restated("use_qk_norm", True),
    ),
)

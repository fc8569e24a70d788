"""StableLM 3B, Zephyr and StableLM 2 1.6B (transformers StableLmForCausalLM): a Llama with LayerNorm whose heads rotate in part.

StableLM 2 12B, with parallel residuals and a norm of each head's own, has no place in Megatron-LM. Names and defaults: transformers
5.23, models/stablelm.
"""

from __future__ import annotations

from ..model.layers import LAYER_NORM
from .entries import implied
from .llama import DENSE, DERIVED_HEAD_DIM, QKV_BIAS, SIZES, query_groups
from .rules import Fixed, Passed, Row, overridden
from .rules_attention import Rope
from .table import Family, Proof
from .ungated import LAYER_NORM_EPSILON, NORMS

STABLELM = Family(
    name="stablelm",
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    since="0.8",
    proof=Proof.LOGITS,
    models="StableLM 3B, StableLM-2-1.6B, Zephyr",
    covers="LayerNorm, quarter-rotated heads; 12B, whose heads have a norm each, is refused",
    tensors={**DENSE, **NORMS, **QKV_BIAS},
    rules=(
        *overridden(SIZES, (LAYER_NORM_EPSILON,)),
        query_groups(absent=32),
        DERIVED_HEAD_DIM,
        Rope(partial=0.25),
        Row("max_position_embeddings", "max_position_embeddings", 4096),
        Row("qkv_bias", "use_qkv_bias", False),
        *implied(normalization=LAYER_NORM),
        Fixed("use_parallel_residual", False, why="Megatron-LM has no attention and MLP in parallel"),
        Fixed("qk_layernorm", False, why="Megatron-LM has one norm for all heads, and not one for each"),
        Passed(("hidden_dropout",)),
    ),
)

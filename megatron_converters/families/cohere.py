"""Command-R and Aya (transformers CohereForCausalLM), Command-R7B and Command-A (Cohere2ForCausalLM).

Llamas whose attention and MLP read one LayerNorm, which has no bias, side by side, whose heads rotate neighbouring rows, and whose
logits are scaled. Cohere2 has windows on all layers but every fourth, and only those rotate. Names and defaults: transformers 5.23,
models/cohere and models/cohere2; further keys: config.json of CohereLabs/c4ai-command-r7b-12-2024.
"""

from __future__ import annotations

from ..model.layers import LAYER_NORM
from ..model.layouts import GROUPED_INTERLEAVED_QKV
from .entries import constant, implied, linear
from .llama import ATTENTION, DENSE, DERIVED_HEAD_DIM, PROJ_BIAS, SIZES, query_groups
from .rules import Fixed, Passed, Repeated, Restated, Row, overridden
from .rules_attention import Rope
from .rules_layer_kinds import WindowsRotate
from .table import Family, Proof
from .ungated import LAYER_NORM_EPSILON

_PARALLEL = "attention and MLP in parallel on one norm, neighbouring rotary pairs, a scale of logits"

COHERE = Family(
    name="cohere",
    model_type="cohere",
    architecture="CohereForCausalLM",
    since="0.17",
    proof=Proof.LOGITS,
    models="Command-R, Aya",
    covers=f"{_PARALLEL}; Command-R+, whose heads have a norm each, is refused",
    tensors={
        **{slot: entry for slot, entry in DENSE.items() if slot != "mlp_norm"},
        **{**constant("input_norm_bias", 0), **constant("final_norm_bias", 0)},
        **linear("qkv", *(f"{ATTENTION}{part}_proj" for part in "qkv"), layout=GROUPED_INTERLEAVED_QKV),
        **PROJ_BIAS,
    },
    rules=(
        *overridden(SIZES, (Row("tied", "tie_word_embeddings", True), LAYER_NORM_EPSILON)),
        query_groups(),
        DERIVED_HEAD_DIM,
        Rope(5e5),
        Row("max_position_embeddings", "max_position_embeddings", 8192),
        Row("logits_multiplier", "logit_scale", 0.0625),
        *(Row(bias, "attention_bias", False) for bias in ("qkv_bias", "proj_bias")),
        Fixed("use_qk_norm", False, why="Megatron-LM has one norm of queries for all heads, and not one for each"),
        *implied(normalization=LAYER_NORM, parallel_block=True, rotary_interleaved=True),
    ),
)

COHERE2 = Family(
    name="cohere2",
    model_type="cohere2",
    architecture="Cohere2ForCausalLM",
    since="0.17",
    proof=Proof.LOGITS,
    models="Command-R7B, Command-A, Aya Expanse 2",
    covers=f"{_PARALLEL}, windows on layers that rotate, and none on those that do not",
    tensors=COHERE.tensors,
    rules=(
        *overridden(COHERE.rules, (Rope(), WindowsRotate(window=4096, pattern=4), Passed(("cache_implementation",)))),
        # What the class does anyway, and repetitions, in the first files.
        *(Restated(f"use_{what}", True) for what in ("gated_activation", "parallel_block", "parallel_embedding")),
        Repeated("use_embedding_sharing", "tie_word_embeddings", True),
        Repeated("layer_switch", "sliding_window_pattern", 4),
        Restated("order_of_interleaved_layers", "local_attn_first"),
        *(Restated("position_embedding_type", "rope_gptj"), Restated("rotary_pct", 1.0)),
    ),
)

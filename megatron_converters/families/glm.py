"""GLM-4-9B (transformers GlmForCausalLM), GLM-4-0414 (Glm4ForCausalLM), and GLM-4.5, 4.6 and 4.7 (Glm4MoeForCausalLM).

GLM-4-0414 has norms after both blocks, too. Names and defaults: transformers 5.23, models/glm, models/glm4 and models/glm4_moe.
"""

from __future__ import annotations

from ..model.layers import AROUND, EACH_HEAD, SIGMOID
from ..model.layouts import GATED, GROUPED_QKV, interleaved, joined
from .entries import implied, linear, tensor
from .llama import ATTENTION, DENSE, DERIVED_HEAD_DIM, LAYER, MLP, QK_NORM, QKV_BIAS, SIZES, query_groups
from .mixtures import EXPERTS, PREDICTION, PREDICTION_LAYER, PREDICTION_REPLICAS, shared_experts
from .rules import Fixed, Named, Row
from .rules_attention import Rope
from .rules_experts import ExpertGroups, FirstDense, SharedExperts
from .table import Family, Proof

_QKV = tuple(f"{ATTENTION}{part}_proj" for part in "qkv")

GLM = Family(
    name="glm",
    model_type="glm",
    architecture="GlmForCausalLM",
    since="0.8",
    proof=Proof.LOGITS,
    models="GLM-4-9B",
    covers="neighbouring rotary pairs, half-rotated heads",
    tensors={
        **DENSE,
        # Neighbouring rows of a head rotate together; they stay so where Megatron-LM rotates them with --rotary-interleaved.
        **linear("qkv", *_QKV, layout=interleaved(GROUPED_QKV)),
        **tensor("fc1", MLP + "gate_up_proj.weight", layout=joined(GATED)),
    },
    rules=(
        *SIZES,
        query_groups(absent=2),
        Row("kv_channels", "head_dim", 128),
        Rope(partial=0.5),
        Row("norm_epsilon", "rms_norm_eps", 1.5625e-07),
        Row("max_position_embeddings", "max_position_embeddings", 131072),
        Row("qkv_bias", "attention_bias", True),
        *implied(rotary_interleaved=True),
    ),
)

GLM4 = Family(
    name="glm4",
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    since="0.12",
    proof=Proof.LOGITS,
    models="GLM-4-0414, GLM-Z1",
    covers="norms before and after both blocks, neighbouring rotary pairs, half-rotated heads",
    tensors={
        **GLM.tensors,
        **tensor("attention_post_norm", LAYER + "post_self_attn_layernorm.weight"),
        **tensor("mlp_post_norm", LAYER + "post_mlp_layernorm.weight"),
    },
    rules=(*GLM.rules, *implied(block_norms=AROUND)),
)

GLM4_MOE = Family(
    name="glm4_moe",
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    since="0.12",
    proof=Proof.LOGITS,
    models="GLM-4.5, 4.6, 4.7",
    covers="sigmoid router with its bias, first dense layers, shared experts, multi-token prediction",
    tensors={
        **DENSE,
        **QKV_BIAS,
        **QK_NORM,
        **EXPERTS,
        **tensor("expert_bias", MLP + "gate.e_score_correction_bias"),
        **shared_experts(MLP + "shared_experts."),
        **PREDICTION,
    },
    rules=(
        *SIZES,
        query_groups(absent=8),
        DERIVED_HEAD_DIM,
        Rope(partial=0.5),
        Row("norm_epsilon", "rms_norm_eps", 1e-5),
        Row("max_position_embeddings", "max_position_embeddings", 131072),
        Row("qkv_bias", "attention_bias", False),
        Named("qk_norm", "use_qk_norm", {True: EACH_HEAD, False: ""}, False),
        Row("num_experts", "n_routed_experts", 128),
        Row("moe_router_topk", "num_experts_per_tok", 8),
        Row("moe_ffn_hidden_size", "moe_intermediate_size", 1408),
        Row("moe_router_topk_scaling_factor", "routed_scaling_factor", 1.0),
        FirstDense(1),
        SharedExperts(1, 1408),
        ExpertGroups((1, 1)),
        Fixed("norm_topk_prob", True),  # Megatron-LM always normalises sigmoid scores
        Row("mtp_num_layers", "num_nextn_predict_layers", 1),
        *implied(moe_router_score_function=SIGMOID, moe_router_enable_expert_bias=True),
    ),
    mtp_layer=PREDICTION_LAYER,
    replicas=PREDICTION_REPLICAS,
)

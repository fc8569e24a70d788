"""Mixtures whose routers score experts by a sigmoid: dots.llm1, Solar-Open, Hunyuan 3 and EXAONE-MoE, and Ling 2 (remote code).

Their rules are those of GLM-4.5 but for what is said here. Names and defaults: transformers 5.23, models/dots1, solar_open, hy_v3
and exaone_moe; for Ling 2 configuration_bailing_moe_v2.py and modeling_bailing_moe_v2.py of inclusionAI/Ling-V2. Layers of
multi-token prediction: vLLM's hy_v3_mtp.py and exaone_moe.py, and Ling 2's own file.
"""

from __future__ import annotations

from ..model.layers import EACH_HEAD
from ..model.layouts import GROUPED_QKV, joined
from .defaults import IfAbsent
from .entries import implied, linear, tensor
from .glm import GLM4_MOE
from .llama import DENSE, LAYER, MLP, PROJ_BIAS, QK_NORM, QKV_BIAS, query_groups
from .mixtures import EXPERTS, PREDICTION, PREDICTION_LAYER, WITHOUT_MLP, shared_experts
from .rules import Fixed, Named, Passed, Restated, Row, overridden
from .rules_attention import Rope, SwitchedWindow
from .rules_experts import ExpertGroups, Experts, FirstDense, SharedExperts
from .rules_layer_kinds import WindowsRotate
from .table import Family, Proof

_BIAS = tensor("expert_bias", MLP + "gate.e_score_correction_bias")
_SHARED = shared_experts(MLP + "shared_experts.")
#: Layer of multi-token prediction, whose last norm has a name of its own here.
_PREDICTION = PREDICTION | tensor("mtp_final_norm", PREDICTION_LAYER + "final_layernorm.weight")
#: What the classes do anyway, in files of these models.
_SIGMOID = (Restated("scoring_func", "sigmoid", others=("noaux_tc",)), Restated("topk_method", "noaux_tc"))
_NO_PREDICTION = implied(mtp_num_layers=0)
_SIZE = "moe_intermediate_size"
_ATTENTION = LAYER + "attention."

DOTS1 = Family(
    name="dots1",
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    since="0.12",
    proof=Proof.LOGITS,
    models="dots.llm1",
    covers="sigmoid router with its bias, query and key norms, sliding window on some layers",
    tensors={**DENSE, **QKV_BIAS, **PROJ_BIAS, **QK_NORM, **EXPERTS, **_BIAS, **_SHARED},
    rules=overridden(
        GLM4_MOE.rules,
        [
            query_groups(absent=32),
            Rope(),
            SwitchedWindow(switch=False, start=62),
            Row("norm_epsilon", "rms_norm_eps", 1e-6),
            Row("max_position_embeddings", "max_position_embeddings", 2048),
            Row("proj_bias", "attention_bias", False),
            Row("num_experts", "n_routed_experts"),
            Row("moe_router_topk", "num_experts_per_tok"),
            FirstDense(0),
            SharedExperts(0, 1408),
            Fixed("norm_topk_prob", True, absent=False),  # Megatron-LM always normalises sigmoid scores
            *_SIGMOID,
            *implied(qk_norm=EACH_HEAD),
            *_NO_PREDICTION,
        ],
    ),
)

SOLAR_OPEN = Family(
    name="solar_open",
    model_type="solar_open",
    architecture="SolarOpenForCausalLM",
    since="0.12",
    proof=Proof.LOGITS,
    models="Solar-Open-100B",
    covers="sigmoid router with its bias and groups; YaRN from 0.19 on",
    tensors={**WITHOUT_MLP, **QKV_BIAS, **EXPERTS, **_BIAS, **_SHARED},
    rules=overridden(
        GLM4_MOE.rules,
        [
            Row("kv_channels", "head_dim", 128),
            Rope(1e6),
            # The class has no such size, though published files do.
            Row("ffn_hidden_size", "intermediate_size", IfAbsent(_SIZE, 1280, _SIZE)),
            Row("moe_ffn_hidden_size", _SIZE, 1280),
            SharedExperts(1, 1280),
            Restated("first_k_dense_replace", 0),
            *_SIGMOID,
            *implied(qk_norm=""),
            *_NO_PREDICTION,
        ],
    ),
)

HY_V3 = Family(
    name="hy_v3",
    model_type="hy_v3",
    architecture="HYV3ForCausalLM",
    since="0.12",
    proof=Proof.LOGITS,
    models="Hunyuan 3",
    covers="sigmoid router with its bias, first dense layers, shared experts, multi-token prediction",
    tensors={
        **{**DENSE, **QKV_BIAS, **PROJ_BIAS, **QK_NORM, **EXPERTS, **_PREDICTION},
        **shared_experts(MLP + "shared_mlp."),
        # The second names are those in memory.
        **tensor("router", MLP + "router.gate.weight", fused=MLP + "gate.weight"),
        **tensor("expert_bias", MLP + "expert_bias", fused=MLP + "e_score_correction_bias"),
    },
    rules=overridden(
        GLM4_MOE.rules,
        [
            Row("initializer_range", "initializer_range", 0.006),
            Row("kv_channels", "head_dim", 128),
            Rope(11158840.0),
            Row("proj_bias", "attention_bias", False),
            Experts(192),
            Row("moe_ffn_hidden_size", "moe_intermediate_size", 1536),
            Row("moe_router_topk_scaling_factor", "router_scaling_factor", 2.826),
            FirstDense(1, listed=True),
            SharedExperts(1, 1536, ("num_shared_experts",)),
            *(Restated(key, True) for key in ("norm_topk_prob", "route_norm", "qk_norm", "moe_router_use_sigmoid")),
            *(Restated(key, 1) for key in ("n_group", "topk_group")),
            Restated("moe_router_enable_expert_bias", True),
            # Precisions, kernels, and a repetition of the size of experts.
            Passed(("enable_moe_fp32_combine", "enable_attention_fp32_softmax", "enable_lm_head_fp32")),
            Passed(("use_grouped_mm", "expert_hidden_dim")),
            Row("mtp_num_layers", "num_nextn_predict_layers", 0),
            *implied(qk_norm=EACH_HEAD),
        ],
    ),
    mtp_layer=PREDICTION_LAYER,
)

#: Attention of Ling 2, with all queries, all keys and all values in one tensor.
_JOINED_ATTENTION = {
    **linear("qkv", _ATTENTION + "query_key_value", layout=joined(GROUPED_QKV)),
    **linear("proj", _ATTENTION + "dense"),
    **tensor("q_norm", _ATTENTION + "query_layernorm.weight"),
    **tensor("k_norm", _ATTENTION + "key_layernorm.weight"),
}

BAILING_MOE_V2 = Family(
    name="bailing_moe",
    model_type="bailing_moe",
    architecture="BailingMoeV2ForCausalLM",
    since="0.12",
    proof=Proof.EQUIVALENT,
    models="Ling 2.0, Ring 2.0 (Bailing MoE v2)",
    covers="fused `query_key_value`, half-rotated heads, sigmoid router with groups, multi-token prediction",
    tensors={
        **{**DENSE, **_JOINED_ATTENTION, **EXPERTS, **_SHARED, **_PREDICTION},
        **tensor("word_embeddings", "model.word_embeddings.weight"),
        **tensor("expert_bias", MLP + "gate.expert_bias"),
    },
    rules=overridden(
        GLM4_MOE.rules,
        [
            query_groups(absent=4),
            Row("kv_channels", "head_dim", IfAbsent("head_dim", 128)),
            Rope(6e5, partial=1.0),
            Row("norm_epsilon", "rms_norm_eps", 1e-6),
            Row("max_position_embeddings", "max_position_embeddings", 32768),
            Row("qkv_bias", "use_qkv_bias", False),
            Row("proj_bias", "use_bias", False),
            Named("qk_norm", "use_qk_norm", {True: EACH_HEAD, False: ""}, True),
            Experts(256),
            Row("moe_ffn_hidden_size", _SIZE, 512),
            SharedExperts(1, 512, ("num_shared_experts",)),
            ExpertGroups((8, 4)),
            *(Restated(key, True) for key in ("norm_topk_prob", "moe_router_enable_expert_bias")),
            *(Restated(f"moe_router_enable_{part}", True) for part in ("shared_expert", "routed_scaling")),
            *(Restated("score_function", "sigmoid"), Restated("use_rmsnorm", True), Restated("norm_head", False)),
            *_SIGMOID,
            # Settings of training, a precision, and a repetition of the size of experts.
            Passed(("output_dropout", "mtp_loss_scaling_factor", "seq_aux", "router_dtype", "max_window_layers")),
            Passed(("moe_shared_expert_intermediate_size",)),
            Row("mtp_num_layers", "num_nextn_predict_layers", 0),
        ],
    ),
    aliases=("bailing_moe_v2",),
    mtp_layer=PREDICTION_LAYER,
)

EXAONE_MOE = Family(
    name="exaone_moe",
    model_type="exaone_moe",
    architecture="ExaoneMoeForCausalLM",
    since="0.15",
    proof=Proof.LOGITS,
    models="K-EXAONE",
    covers="sliding windows, layers without rotary embeddings, sigmoid router; its multi-token prediction needs `--without-mtp`",
    tensors={
        **{**DENSE, **QK_NORM, **EXPERTS, **_SHARED},
        **tensor("expert_bias", MLP + "e_score_correction_bias", fused=MLP + "gate.e_score_correction_bias"),
    },
    rules=overridden(
        GLM4_MOE.rules,
        [
            query_groups(absent=32),
            Rope(),
            WindowsRotate(window=4096, pattern=4),
            Row("max_position_embeddings", "max_position_embeddings", 2048),
            Experts(64),
            Row("moe_ffn_hidden_size", _SIZE, 1024),
            Row("moe_router_topk_scaling_factor", "routed_scaling_factor", 2.5),
            SharedExperts(1, 1024, ("num_shared_experts",)),
            *_SIGMOID,
            # Older forms of the layers without experts, which the names of tensors show.
            Passed(("is_moe_layer", "first_last_k_dense_replace")),
            Passed(("num_nextn_predict_layers", "mtp_loss_scaling_factor")),
            *implied(qk_norm=EACH_HEAD, qkv_bias=False),
            *_NO_PREDICTION,
        ],
    ),
    further_architectures=("ExaoneMoEForCausalLM",),
    unheld_prediction=(
        "mtp.",
        "their layer has an MLP, and Megatron-LM makes it like the model's last, a mixture of experts",
    ),
)

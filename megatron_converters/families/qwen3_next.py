"""Qwen3-Next (transformers Qwen3NextForCausalLM): gated DeltaNet in most layers, gated attention in the others, experts in all.

Names and defaults: transformers 5.23, models/qwen3_next. All norms are stored minus 1, except that of gated DeltaNet's output, from
which Megatron-LM's, which is stored so too, differs by 1.
"""

from __future__ import annotations

from ..model.layers import EACH_HEAD
from ..model.layouts import DELTA_BY_KEY_HEAD, GROUPED_GATED_QKV
from ..model.values import Affine
from .entries import implied, tensor
from .llama import ATTENTION, DENSE, LAYER, MLP, QK_NORM, SIZES, query_groups
from .mixtures import EXPERTS, shared_experts
from .rules import Fixed, Restated, Row
from .rules_attention import LinearAttention, Rope
from .rules_experts import DenseLayers, Experts, NormTopkProb
from .table import Family, Proof

_DELTA = LAYER + "linear_attn."
#: Sizes of gated DeltaNet, with defaults.
_SIZES = {"num_key_heads": 16, "num_value_heads": 32, "key_head_dim": 128, "value_head_dim": 128, "conv_kernel_dim": 4}

_PREDICTION = {
    **tensor("mtp_embedding_norm", "mtp.pre_fc_norm_embedding.weight"),
    **tensor("mtp_hidden_norm", "mtp.pre_fc_norm_hidden.weight"),
    **tensor("mtp_proj", "mtp.fc.weight"),
    **tensor("mtp_final_norm", "mtp.norm.weight"),
}

QWEN3_NEXT = Family(
    name="qwen3_next",
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    since="0.16",
    proof=Proof.LOGITS,
    models="Qwen3-Next",
    covers="gated DeltaNet, gated attention, norms stored minus 1, multi-token prediction",
    tensors={
        **DENSE,
        **tensor("qkv", *(f"{ATTENTION}{part}_proj.weight" for part in "qkv"), layout=GROUPED_GATED_QKV),
        **QK_NORM,
        **tensor("delta_in", _DELTA + "in_proj_qkvz.weight", _DELTA + "in_proj_ba.weight", layout=DELTA_BY_KEY_HEAD),
        **tensor("delta_conv", _DELTA + "conv1d.weight"),
        **tensor("delta_a_log", _DELTA + "A_log"),
        **tensor("delta_dt_bias", _DELTA + "dt_bias"),
        **tensor("delta_norm", _DELTA + "norm.weight", value=Affine(shift=-1.0)),
        **tensor("delta_out", _DELTA + "out_proj.weight"),
        **EXPERTS,
        **shared_experts(MLP + "shared_expert.", MLP + "shared_expert_gate.weight"),
        **_PREDICTION,
    },
    rules=(
        *SIZES,
        query_groups(absent=2),
        Row("kv_channels", "head_dim", 256),
        Rope(partial=0.25),
        LinearAttention(interval=4),
        *(Row(f"linear_{name}", f"linear_{name}", default) for name, default in _SIZES.items()),
        Row("max_position_embeddings", "max_position_embeddings", 32768),
        DenseLayers(),
        NormTopkProb(True),
        Experts(512),
        Row("moe_router_topk", "num_experts_per_tok", 10),
        Row("moe_ffn_hidden_size", "moe_intermediate_size", 512),
        Row("shared_ffn_hidden_size", "shared_expert_intermediate_size", 512),
        Row("moe_aux_loss_coeff", "router_aux_loss_coef", 0.001),
        Fixed("attention_bias", False),
        *implied(zero_centred=True, qk_norm=EACH_HEAD, attention_output_gate=True, shared_gate=True),
        Restated("use_qk_norm", True),
        Row("mtp_num_layers", "num_nextn_predict_layers", 0),
    ),
    mtp_layer="mtp.layers.{layer}.",
)

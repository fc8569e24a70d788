"""Gated DeltaNet in most layers, gated attention in the others: Qwen3-Next, and the text models of Qwen3.5, dense and with experts.

Names and defaults: transformers 5.23, models/qwen3_next, qwen3_5 and qwen3_5_moe. All norms are stored minus 1, except that of
gated DeltaNet's output, from which Megatron-LM's, which is stored so too, differs by 1. Qwen3.5 rotates by three rows of positions,
which are equal in texts (`mrope_section`), so that its rotary embeddings are plain ones there.
"""

from __future__ import annotations

from ..model.layers import EACH_HEAD
from ..model.layouts import DELTA_BY_KEY_HEAD, DELTA_BY_USE, GROUPED_GATED_QKV
from ..model.values import Affine
from .defaults import IfAbsent
from .entries import implied, tensor
from .llama import ATTENTION, DENSE, LAYER, MLP, QK_NORM, SIZES, query_groups
from .mixtures import EXPERTS, WITHOUT_MLP, shared_experts
from .rules import Fixed, Passed, Restated, Row, Rule, overridden
from .rules_attention import SECTIONS, LinearAttention, Rope
from .rules_experts import DenseLayers, Experts, NormTopkProb
from .table import Family, Proof

_DELTA = LAYER + "linear_attn."
#: Sizes of gated DeltaNet, with defaults.
_SIZES = {"num_key_heads": 16, "num_value_heads": 32, "key_head_dim": 128, "value_head_dim": 128, "conv_kernel_dim": 4}

_SIZE = "moe_intermediate_size"

#: Tensors of both kinds of attention but for DeltaNet's input projection, and those of a layer of multi-token prediction.
_MIXERS = {
    **tensor("qkv", *(f"{ATTENTION}{part}_proj.weight" for part in "qkv"), layout=GROUPED_GATED_QKV),
    **QK_NORM,
    **tensor("delta_conv", _DELTA + "conv1d.weight"),
    **tensor("delta_a_log", _DELTA + "A_log"),
    **tensor("delta_dt_bias", _DELTA + "dt_bias"),
    **tensor("delta_norm", _DELTA + "norm.weight", value=Affine(shift=-1.0)),
    **tensor("delta_out", _DELTA + "out_proj.weight"),
    **tensor("mtp_embedding_norm", "mtp.pre_fc_norm_embedding.weight"),
    **tensor("mtp_hidden_norm", "mtp.pre_fc_norm_hidden.weight"),
    **tensor("mtp_proj", "mtp.fc.weight"),
    **tensor("mtp_final_norm", "mtp.norm.weight"),
}
_BY_KEY_HEAD = tensor(
    "delta_in", _DELTA + "in_proj_qkvz.weight", _DELTA + "in_proj_ba.weight", layout=DELTA_BY_KEY_HEAD
)
_BY_USE = tensor(
    "delta_in", *(f"{_DELTA}in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")), layout=DELTA_BY_USE
)
_EXPERTS = EXPERTS | shared_experts(MLP + "shared_expert.", MLP + "shared_expert_gate.weight")

_RULES: tuple[Rule, ...] = (
    *SIZES,
    query_groups(absent=2),
    Row("kv_channels", "head_dim", 256),
    Rope(partial=0.25),
    LinearAttention(interval=4),
    *(Row(f"linear_{name}", f"linear_{name}", default) for name, default in _SIZES.items()),
    Row("max_position_embeddings", "max_position_embeddings", 32768),
    Fixed("attention_bias", False),
    Restated("use_qk_norm", True),
    *implied(zero_centred=True, qk_norm=EACH_HEAD, attention_output_gate=True),
)
_MIXTURE_RULES: tuple[Rule, ...] = (
    Row("moe_ffn_hidden_size", _SIZE, 512),
    Row("shared_ffn_hidden_size", "shared_expert_intermediate_size", 512),
    Row("moe_aux_loss_coeff", "router_aux_loss_coef", 0.001),
    *implied(shared_gate=True),
)

QWEN3_NEXT = Family(
    name="qwen3_next",
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    since="0.16",
    proof=Proof.LOGITS,
    models="Qwen3-Next",
    covers="gated DeltaNet, gated attention, norms stored minus 1, multi-token prediction",
    tensors={**DENSE, **_MIXERS, **_BY_KEY_HEAD, **_EXPERTS},
    rules=(
        *_RULES,
        *_MIXTURE_RULES,
        DenseLayers(),
        NormTopkProb(True),
        Experts(512),
        Row("moe_router_topk", "num_experts_per_tok", 10),
        Row("mtp_num_layers", "num_nextn_predict_layers", 0),
    ),
    mtp_layer="mtp.layers.{layer}.",
)

#: What Qwen3.5's config.json files say besides; `mamba_ssm_dtype` is how programs hold DeltaNet's state while they compute.
_QWEN3_5_RULES = overridden(
    _RULES,
    [
        Rope(partial=0.25, beside=SECTIONS),
        Row("mtp_num_layers", "mtp_num_hidden_layers", 0),
        Restated("mtp_use_dedicated_embeddings", False),
        Restated("attn_output_gate", True),
        Restated("output_gate_type", "swish"),
        Restated("mlp_only_layers", []),
        Passed(("mamba_ssm_dtype",)),
    ],
)

QWEN3_5 = Family(
    name="qwen3_5_text",
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    stem="Qwen3_5Text",
    since="0.16",
    proof=Proof.LOGITS,
    models="Qwen3.5 and 3.6, text",
    covers="gated DeltaNet, gated attention, norms stored minus 1, multi-token prediction",
    tensors={**DENSE, **_MIXERS, **_BY_USE},
    rules=overridden(_QWEN3_5_RULES, [query_groups(absent=4)]),
    mtp_layer="mtp.layers.{layer}.",
)

QWEN3_5_MOE = Family(
    name="qwen3_5_moe_text",
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    stem="Qwen3_5MoeText",
    since="0.16",
    proof=Proof.LOGITS,
    models="Qwen3.5-MoE and 3.6, text",
    covers="the same with experts, each in its own tensors or all in one, also in multi-token prediction",
    tensors={**WITHOUT_MLP, **_MIXERS, **_BY_USE, **_EXPERTS},
    rules=(
        *overridden(
            _QWEN3_5_RULES,
            # The class has no such size, since all of its layers have experts.
            [Row("ffn_hidden_size", "intermediate_size", IfAbsent(_SIZE, 512, _SIZE))],
        ),
        *_MIXTURE_RULES,
        Row("num_experts", "num_experts", 256),
        Row("moe_router_topk", "num_experts_per_tok", 8),
        Restated("norm_topk_prob", True),
        Restated("decoder_sparse_step", 1),
        *implied(moe_router_pre_softmax=False),
    ),
    mtp_layer="mtp.layers.{layer}.",
)

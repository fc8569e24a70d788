"""Mixtures of experts: Mixtral, Qwen2-MoE (a shared expert with its gate), Qwen3-MoE and OLMoE, as transformers has them."""

from __future__ import annotations

from ..model.layers import ALL_HEADS, EACH_HEAD
from ..model.layouts import GATED, SAME
from ..model.tables import Entry
from .entries import tensor
from .llama import DENSE, DERIVED_HEAD_DIM, LAYER, MLP, PROJ_BIAS, QK_NORM, QKV_BIAS, SIZES, query_groups
from .rules import Fixed, Implied, Restated, Row
from .rules_attention import NoWindow, Rope, Window
from .rules_experts import DenseLayers, Experts, NormTopkProb
from .table import Family, Proof

_MIXTRAL = LAYER + "block_sparse_moe."
_EXPERT = MLP + "experts.{expert}."
#: Names in files that transformers 5 saved as it holds the tensors in memory.
_FUSED_FC1, _FUSED_FC2 = MLP + "experts.gate_up_proj", MLP + "experts.down_proj"

#: A Llama's tensors but for those of its MLP.
WITHOUT_MLP = {name: entry for name, entry in DENSE.items() if name not in ("fc1", "fc2")}
EXPERTS = {
    "router": Entry(SAME, (MLP + "gate.weight",)),
    "expert_fc1": Entry(GATED, (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"), _FUSED_FC1),
    "expert_fc2": Entry(SAME, (_EXPERT + "down_proj.weight",), _FUSED_FC2),
}
#: Entries of a layer of multi-token prediction in DeepSeek's files and those of others that followed them.
PREDICTION = {
    **tensor("mtp_embedding_norm", "model.layers.{beyond}.enorm.weight"),
    **tensor("mtp_hidden_norm", "model.layers.{beyond}.hnorm.weight"),
    **tensor("mtp_proj", "model.layers.{beyond}.eh_proj.weight"),
    **tensor("mtp_final_norm", "model.layers.{beyond}.shared_head.norm.weight"),
}
#: Where these files have such a layer, and its copies of the model's first and last tensors.
PREDICTION_LAYER = "model.layers.{beyond}."
PREDICTION_REPLICAS = {
    "word_embeddings": PREDICTION_LAYER + "embed_tokens.weight",
    "output_layer": PREDICTION_LAYER + "shared_head.head.weight",
}


def shared_experts(module: str, gate: str = "") -> dict[str, Entry]:
    """Entries of a shared expert with Llama's names, and of its gate, if it has one."""
    return {
        **tensor("shared_fc1", module + "gate_proj.weight", module + "up_proj.weight", layout=GATED),
        **tensor("shared_fc2", module + "down_proj.weight"),
        **(tensor("shared_gate", gate) if gate else {}),
    }


_DENSE_MLP = {name: DENSE[name] for name in ("fc1", "fc2")}

MIXTRAL = Family(
    name="mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    since="0.11",
    proof=Proof.LOGITS,
    models="Mixtral",
    covers="experts, sliding window",
    tensors={
        **WITHOUT_MLP,
        "router": Entry(SAME, (_MIXTRAL + "gate.weight",), MLP + "gate.weight"),
        "expert_fc1": Entry(
            GATED, (_MIXTRAL + "experts.{expert}.w1.weight", _MIXTRAL + "experts.{expert}.w3.weight"), _FUSED_FC1
        ),
        "expert_fc2": Entry(SAME, (_MIXTRAL + "experts.{expert}.w2.weight",), _FUSED_FC2),
    },
    rules=(
        *SIZES,
        query_groups(absent=8),
        DERIVED_HEAD_DIM,
        Rope(1e6),
        Window(default=None),
        Row("max_position_embeddings", "max_position_embeddings", 4096 * 32),
        Row("num_experts", "num_local_experts", 8),
        Row("moe_router_topk", "num_experts_per_tok", 2),
        Row("norm_epsilon", "rms_norm_eps", 1e-5),
        Row("moe_ffn_hidden_size", "intermediate_size"),
        Row("moe_aux_loss_coeff", "router_aux_loss_coef", 0.001),
        Implied("moe_router_pre_softmax", False),
        Restated("norm_topk_prob", True),
    ),
)

_QWEN_ROWS = (
    Rope(),
    NoWindow(),
    DenseLayers(),
    NormTopkProb(),
    Row("max_position_embeddings", "max_position_embeddings", 32768),
    Row("moe_aux_loss_coeff", "router_aux_loss_coef", 0.001),
)

QWEN2_MOE = Family(
    name="qwen2_moe",
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    since="0.16",
    proof=Proof.LOGITS,
    models="Qwen2-MoE",
    covers="shared expert with its gate, dense layers",
    tensors={
        **WITHOUT_MLP,
        **QKV_BIAS,
        **_DENSE_MLP,
        **EXPERTS,
        **shared_experts(MLP + "shared_expert.", MLP + "shared_expert_gate.weight"),
    },
    rules=(
        *SIZES,
        query_groups(absent=16),
        DERIVED_HEAD_DIM,
        *_QWEN_ROWS,
        Row("qkv_bias", "qkv_bias", True),
        Row("num_experts", "num_experts", 60),  # the one class of Qwen's that does not know it as num_local_experts
        Row("moe_router_topk", "num_experts_per_tok", 4),
        Row("moe_ffn_hidden_size", "moe_intermediate_size", 1408),
        Row("shared_ffn_hidden_size", "shared_expert_intermediate_size", 5632),
        Implied("shared_gate", True),
    ),
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    since="0.11",
    proof=Proof.LOGITS,
    models="Qwen3-MoE",
    covers="query and key norms, dense layers",
    tensors={**WITHOUT_MLP, **QKV_BIAS, **PROJ_BIAS, **QK_NORM, **_DENSE_MLP, **EXPERTS},
    rules=(
        *SIZES,
        query_groups(absent=4),
        DERIVED_HEAD_DIM,
        *_QWEN_ROWS,
        Row("qkv_bias", "attention_bias", False),
        Row("proj_bias", "attention_bias", False),
        Experts(128),
        Row("moe_router_topk", "num_experts_per_tok", 8),
        Row("moe_ffn_hidden_size", "moe_intermediate_size", 768),
        Implied("qk_norm", EACH_HEAD),
        Restated("use_qk_norm", True),  # Qwen3-Coder-30B-A3B-Instruct
    ),
)

OLMOE = Family(
    name="olmoe",
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    since="0.16",
    proof=Proof.LOGITS,
    models="OLMoE",
    covers="norms over all heads, in a layer of `megatron_layers`",
    tensors={**WITHOUT_MLP, **QKV_BIAS, **PROJ_BIAS, **QK_NORM, **EXPERTS},
    rules=(
        *SIZES,
        query_groups(),
        DERIVED_HEAD_DIM,
        Rope(),
        NormTopkProb(),
        Fixed("clip_qkv", None),
        Row("max_position_embeddings", "max_position_embeddings", 4096),
        Row("norm_epsilon", "rms_norm_eps", 1e-5),
        Row("qkv_bias", "attention_bias", False),
        Row("proj_bias", "attention_bias", False),
        Experts(64),
        Row("moe_router_topk", "num_experts_per_tok", 8),
        Row("moe_ffn_hidden_size", "intermediate_size"),
        Row("moe_aux_loss_coeff", "router_aux_loss_coef", 0.01),
        Implied("qk_norm", ALL_HEADS),
        Restated("use_qk_norm", True),
    ),
)

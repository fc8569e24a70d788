"""Granite 3 (transformers GraniteForCausalLM, GraniteMoeForCausalLM and GraniteMoeSharedForCausalLM).

Llamas, or mixtures of experts, with constants that scale embeddings, blocks, attention scores and logits. Names and defaults:
transformers 5.23, models/granite, granitemoe and granitemoeshared; a config.json without a multiplier means 1.
"""

from __future__ import annotations

from ..model.layouts import GATED, joined
from .entries import implied, tensor
from .llama import FAMILY as LLAMA
from .llama import LAYER, PROJ_BIAS, QKV_BIAS
from .mixtures import WITHOUT_MLP
from .rules import Reciprocal, Row, overridden
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

_MIXTURE = LAYER + "block_sparse_moe."
#: Experts are chosen by their scores, and weighted by the softmax over those that are chosen.
_CHOICE = implied(moe_router_pre_softmax=False, mlp_bias=False)

GRANITE_MOE = Family(
    name="granitemoe",
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    since="0.17",
    proof=Proof.LOGITS,
    models="Granite 3 MoE",
    covers="multipliers, as muP's flags or folded into weights; experts in one tensor a layer",
    tensors={
        **{**WITHOUT_MLP, **QKV_BIAS, **PROJ_BIAS},
        # The second names are those in memory.
        **tensor("router", _MIXTURE + "router.layer.weight", fused=_MIXTURE + "router.weight"),
        **tensor("expert_fc1", _MIXTURE + "input_linear.weight", fused=_MIXTURE + "experts.gate_up_proj", stacked=True),
        **tensor("expert_fc2", _MIXTURE + "output_linear.weight", fused=_MIXTURE + "experts.down_proj", stacked=True),
    },
    rules=overridden(
        GRANITE.rules,
        [
            Row("num_experts", "num_local_experts", 8),
            Row("moe_router_topk", "num_experts_per_tok", 2),
            Row("moe_ffn_hidden_size", "intermediate_size"),
            Row("moe_aux_loss_coeff", "router_aux_loss_coef", 0.001),
            *_CHOICE,
        ],
    ),
)

GRANITE_MOE_SHARED = Family(
    name="granitemoeshared",
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    since="0.17",
    proof=Proof.LOGITS,
    models="Granite 3 MoE with shared experts",
    covers="the same, and a shared expert",
    tensors={
        **GRANITE_MOE.tensors,
        **tensor("shared_fc1", LAYER + "shared_mlp.input_linear.weight", layout=joined(GATED)),
        **tensor("shared_fc2", LAYER + "shared_mlp.output_linear.weight"),
    },
    rules=(*GRANITE_MOE.rules, Row("shared_ffn_hidden_size", "shared_intermediate_size", 0)),
)

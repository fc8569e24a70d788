"""GPT-OSS (transformers GptOssForCausalLM): sinks of attention, windows on every other layer, and experts with biases.

Names and defaults: transformers 5.23, models/gpt_oss. Experts of a layer are one tensor, of transposed matrices in which gate and
up alternate; so do their biases.
"""

from __future__ import annotations

from ..model.layers import QUICK_GELU
from ..model.layouts import ALTERNATING
from .entries import implied, linear, tensor
from .llama import ATTENTION, MLP, PROJ_BIAS, QKV_BIAS, head_dim
from .mixtures import MIXTRAL, WITHOUT_MLP
from .rules import Biases, Fixed, Repeated, Row, overridden
from .rules_attention import YARN, Rope
from .rules_context import InitialContext
from .rules_layer_kinds import ListedWindow
from .table import Family, Proof

_GATE_UP, _DOWN = MLP + "experts.gate_up_proj", MLP + "experts.down_proj"
_POSITIONS = 4096
#: Scaling of the rotary embeddings of a config.json that says none.
_SCALING = (
    *(("rope_type", YARN), ("factor", 32.0), ("beta_fast", 32.0), ("beta_slow", 1.0)),
    *(("truncate", False), ("original_max_position_embeddings", _POSITIONS)),
)

FAMILY = Family(
    name="gpt_oss",
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    since="0.15",
    proof=Proof.LOGITS,
    models="GPT-OSS",
    covers="attention sinks, windows on every other layer, biases of experts and router, experts in MXFP4; YaRN from 0.19 on",
    tensors={
        **{**WITHOUT_MLP, **QKV_BIAS, **PROJ_BIAS},
        **tensor("sinks", ATTENTION + "sinks"),
        **linear("router", MLP + "router"),
        **tensor("expert_fc1", _GATE_UP, layout=ALTERNATING, transposed=True, stacked=True),
        **tensor("expert_fc1_bias", _GATE_UP + "_bias", layout=ALTERNATING, stacked=True),
        **tensor("expert_fc2", _DOWN, transposed=True, stacked=True),
        **tensor("expert_fc2_bias", _DOWN + "_bias", stacked=True),
    },
    rules=overridden(
        MIXTRAL.rules,
        [
            head_dim(absent=64),
            Rope(150000.0, absent=_SCALING),
            InitialContext(default=_POSITIONS),
            ListedWindow(default=128, full=2, last=True),
            Biases(attention=True, mlp=True, mlp_key=""),
            Row("max_position_embeddings", "max_position_embeddings", 131072),
            Row("num_experts", "num_local_experts", 128),
            Row("moe_router_topk", "num_experts_per_tok", 4),
            Repeated("experts_per_token", "num_experts_per_tok", 4),
            Row("activation_func_clamp_value", "swiglu_limit", 7.0),
            Fixed("swiglu_alpha", 1.702, why="Megatron-LM's quick GELU has this factor built in"),
            *implied(sinks=True, activation=QUICK_GELU, glu_linear_offset=1.0),
        ],
    ),
)

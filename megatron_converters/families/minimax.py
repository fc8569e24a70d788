"""MiniMax-M2, M2.1 and M2.5 (transformers MiniMaxM2ForCausalLM): a Mixtral with norms of queries and keys over all heads.

Its router scores experts by a sigmoid, with a bias for the choice, and half of each head rotates. Names and defaults: transformers
5.23, models/minimax_m2; further keys: config.json of MiniMaxAI/MiniMax-M2.
"""

from __future__ import annotations

from ..model.layers import ALL_HEADS, SIGMOID
from .defaults import EachLayer
from .entries import implied, tensor
from .llama import LAYER, MLP, QK_NORM, SIZES, query_groups
from .mixtures import MIXTRAL
from .rules import Fixed, Passed, Restated, Row
from .rules_experts import Experts
from .rules_layer_ropes import PartByDim
from .table import Family, Proof

_MIXTURE = LAYER + "block_sparse_moe."


MINIMAX_M2 = Family(
    name="minimax_m2",
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    since="0.16",
    proof=Proof.LOGITS,
    models="MiniMax-M2, M2.1, M2.5",
    covers="norms of queries and keys over all heads, sigmoid router with its bias, half-rotated heads, FP8 blocks",
    tensors={
        **MIXTRAL.tensors,
        **QK_NORM,
        # The second name is that in memory.
        **tensor("expert_bias", _MIXTURE + "e_score_correction_bias", fused=MLP + "e_score_correction_bias"),
    },
    rules=(
        *SIZES,
        query_groups(absent=8),
        Row("kv_channels", "head_dim", 128),
        PartByDim(5e6, partial=1.0),
        Row("max_position_embeddings", "max_position_embeddings", 196608),
        Experts(256),
        Row("moe_router_topk", "num_experts_per_tok", 8),
        Row("moe_ffn_hidden_size", "intermediate_size"),
        Row("moe_aux_loss_coeff", "router_aux_loss_coef", 0.001),
        *implied(qk_norm=ALL_HEADS, moe_router_score_function=SIGMOID, moe_router_enable_expert_bias=True),
        # What the class does anyway, in published files, whose modules of multi-token prediction have no weights.
        *(Restated(key, True) for key in ("use_qk_norm", "use_routing_bias")),
        *(Restated("qk_norm_type", "per_layer"), Restated("scoring_func", "sigmoid")),
        *(Restated(f"layernorm_{what}_beta", 1.0) for what in ("full_attention", "linear_attention", "mlp")),
        Fixed("attn_type_list", EachLayer(1)),
        Restated("shared_intermediate_size", 0),
        Passed(("use_mtp", "num_mtp_modules", "mtp_transformer_layers", "mlp_intermediate_size", "shared_moe_mode")),
    ),
)

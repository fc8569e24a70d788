"""Multi-latent attention to the positions that an indexer chooses (DSA): DeepSeek-V3.2, and GLM-5, 5.1 and 5.2.

Names and defaults: transformers 5.23, models/deepseek_v32 and models/glm_moe_dsa. Their rules are DeepSeek-V3's but for what is
said here. The rows of an indexer that rotate are its first ones; pairs are neighbours in GLM-5, and half of these rows apart in
DeepSeek-V3.2.
"""

from __future__ import annotations

from .deepseek import DEEPSEEK_V3
from .entries import implied, tensor
from .llama import ATTENTION
from .mixtures import PREDICTION_LAYER, PREDICTION_REPLICAS
from .rules import Fixed, Passed, Restated, Row, overridden
from .rules_experts import ExpertGroups, Experts, FirstDense
from .rules_layer_kinds import Indexers
from .table import Family, Proof

_INDEXER = ATTENTION + "indexer."
_TENSORS = {
    **{slot: entry for slot, entry in DEEPSEEK_V3.tensors.items() if slot != "q_whole"},
    **tensor("indexer_query", _INDEXER + "wq_b.weight"),
    **tensor("indexer_key", _INDEXER + "wk.weight"),
    **tensor("indexer_norm", _INDEXER + "k_norm.weight"),
    **tensor("indexer_norm_bias", _INDEXER + "k_norm.bias"),
    **tensor("indexer_weights", _INDEXER + "weights_proj.weight"),
}

DEEPSEEK_V32 = Family(
    name="deepseek_v32",
    model_type="deepseek_v32",
    architecture="DeepseekV32ForCausalLM",
    since="0.19",
    proof=Proof.SHAPES,
    models="DeepSeek-V3.2",
    covers="sparse attention (DSA), multi-token prediction, FP8; logits agree in Megatron-LM 0.19, which not every run tests",
    tensors=_TENSORS,
    rules=overridden(
        DEEPSEEK_V3.rules,
        [
            Row("max_position_embeddings", "max_position_embeddings", 163840),
            Row("q_lora_rank", "q_lora_rank", 1536),
            Experts(256, ("n_routed_experts", "num_experts", "num_local_experts")),
            FirstDense(3, listed=True),
            Row("dsa_indexer_n_heads", "index_n_heads", 64),
            Row("dsa_indexer_head_dim", "index_head_dim", 128),
            Row("dsa_indexer_topk", "index_topk", 2048),
            Indexers(may_share=False),
            Fixed("mlp_bias", False),
            Restated("rope_interleave", True),
            Row("mtp_num_layers", "num_nextn_predict_layers", 0),
            *implied(mixer="sparse latent", dsa_indexer_rope_interleaved=False),
        ],
    ),
    mtp_layer=PREDICTION_LAYER,
    replicas=PREDICTION_REPLICAS,
)

GLM_MOE_DSA = Family(
    name="glm_moe_dsa",
    model_type="glm_moe_dsa",
    architecture="GlmMoeDsaForCausalLM",
    since="0.19",
    proof=Proof.SHAPES,
    models="GLM-5, 5.1, 5.2",
    covers="the same, with indexers that layers share",
    tensors=_TENSORS,
    rules=overridden(
        DEEPSEEK_V32.rules,
        [
            Row("norm_epsilon", "rms_norm_eps", 1e-5),
            Row("max_position_embeddings", "max_position_embeddings", 202752),
            Row("q_lora_rank", "q_lora_rank", 2048),
            Row("qk_head_dim", "qk_nope_head_dim", 192),
            Row("v_head_dim", "v_head_dim", 256),
            ExpertGroups((1, 1)),
            Row("dsa_indexer_n_heads", "index_n_heads", 32),
            Indexers(may_share=True),
            Restated("indexer_rope_interleave", True),
            # How layers of multi-token prediction that run one after the other share an indexer, and a precision.
            Passed(("index_share_for_mtp_iteration", "moe_router_dtype")),
            *implied(dsa_indexer_rope_interleaved=True),
        ],
    ),
    mtp_layer=PREDICTION_LAYER,
    replicas=PREDICTION_REPLICAS,
)

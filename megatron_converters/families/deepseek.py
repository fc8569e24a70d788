"""Multi-latent attention: DeepSeek-V2-Lite, DeepSeek-V3, R1 and V3.1, Moonlight, Kimi-K2, and GLM-4.7-Flash.

Names and defaults: transformers 5.23, models/deepseek_v2, models/deepseek_v3 (of all others but the last) and models/glm4_moe_lite,
which is DeepSeek-V3 with other sizes. The rows that rotate are neighbours, and Megatron-LM's multi-latent attention takes them as
they are. All norm their latents with an epsilon of 1e-6, whatever config.json says.
"""

from __future__ import annotations

from ..model.layers import SIGMOID
from .defaults import IfAbsent
from .entries import implied, tensor
from .llama import ATTENTION, DENSE, MLP, SIZES
from .mixtures import EXPERTS, PREDICTION, PREDICTION_LAYER, PREDICTION_REPLICAS, shared_experts
from .rules import Fixed, Passed, Repeated, Row, overridden
from .rules_attention import Rope
from .rules_experts import ExpertGroups, FirstDense, SharedExperts
from .table import Family, Proof

#: Attention with latents.
LATENT = {
    **{slot: entry for slot, entry in DENSE.items() if slot != "qkv"},
    **tensor("q_down", ATTENTION + "q_a_proj.weight"),
    **tensor("q_latent_norm", ATTENTION + "q_a_layernorm.weight"),
    **tensor("q_up", ATTENTION + "q_b_proj.weight"),
    **tensor("q_whole", ATTENTION + "q_proj.weight"),
    **tensor("kv_down", ATTENTION + "kv_a_proj_with_mqa.weight"),
    **tensor("kv_latent_norm", ATTENTION + "kv_a_layernorm.weight"),
    **tensor("kv_up", ATTENTION + "kv_b_proj.weight"),
}
_TENSORS = {**LATENT, **EXPERTS, **shared_experts(MLP + "shared_experts.")}
_RULES = (
    *SIZES,
    Rope(),
    Row("kv_lora_rank", "kv_lora_rank", 512),
    Row("qk_head_dim", "qk_nope_head_dim", 128),
    Row("qk_pos_emb_head_dim", "qk_rope_head_dim", 64),
    Row("v_head_dim", "v_head_dim", 128),
    Fixed("attention_bias", False),
    Row("moe_router_topk_scaling_factor", "routed_scaling_factor", 1.0),
    # Sums and repetitions of the sizes above, settings of training, and modules that are not part of the model.
    Passed(("head_dim",)),
    Passed(("qk_head_dim", "num_key_value_heads", "ep_size", "seq_aux", "aux_loss_alpha")),
)

DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    since="0.14",
    proof=Proof.LOGITS,
    models="DeepSeek-V2-Lite",
    covers="multi-latent attention, YaRN; the larger V2, which chooses groups by their best expert, is refused",
    tensors=_TENSORS,
    rules=(
        *_RULES,
        Row("q_lora_rank", "q_lora_rank", IfAbsent("q_lora_rank", 1536)),
        Row("max_position_embeddings", "max_position_embeddings", 2048),
        Row("num_experts", "n_routed_experts", 64),
        Row("moe_router_topk", "num_experts_per_tok"),
        Row("moe_ffn_hidden_size", "moe_intermediate_size", 1407),
        FirstDense(0),
        SharedExperts(2, 1407),
        # The larger DeepSeek-V2 chooses groups by their best expert, which Megatron-LM does not.
        Fixed("topk_method", "greedy"),
        Fixed("scoring_func", "softmax"),
        Passed(("n_group", "topk_group", "norm_topk_prob")),  # transformers ignores them with greedy choice
        *implied(moe_router_pre_softmax=True),
    ),
)

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    since="0.12",
    proof=Proof.LOGITS,
    models="DeepSeek-V3, R1, V3.1, Moonlight, Kimi-K2",
    covers="groups of experts, YaRN as Megatron-LM has it built in, multi-token prediction, FP8",
    tensors={**_TENSORS, **tensor("expert_bias", MLP + "gate.e_score_correction_bias"), **PREDICTION},
    rules=(
        *_RULES,
        Row("q_lora_rank", "q_lora_rank", IfAbsent("q_lora_rank", 1536)),
        Row("max_position_embeddings", "max_position_embeddings", 4096),
        Row("num_experts", "n_routed_experts", 256),
        Row("moe_router_topk", "num_experts_per_tok", 8),
        Row("moe_ffn_hidden_size", "moe_intermediate_size", 2048),
        Row("moe_router_topk_scaling_factor", "routed_scaling_factor", 2.5),
        FirstDense(3),
        SharedExperts(1, 2048),
        ExpertGroups((8, 4)),
        Fixed("topk_method", "noaux_tc"),
        Fixed("scoring_func", "sigmoid"),
        Fixed("norm_topk_prob", True),
        Fixed("rope_interleave", True),
        Row("mtp_num_layers", "num_nextn_predict_layers", 1),
        *implied(moe_router_score_function=SIGMOID, moe_router_enable_expert_bias=True),
    ),
    aliases=("kimi_k2",),
    mtp_layer=PREDICTION_LAYER,
    replicas=PREDICTION_REPLICAS,
)

GLM4_MOE_LITE = Family(
    name="glm4_moe_lite",
    model_type="glm4_moe_lite",
    architecture="Glm4MoeLiteForCausalLM",
    since="0.12",
    proof=Proof.LOGITS,
    models="GLM-4.7-Flash",
    covers="multi-latent attention, sigmoid router, multi-token prediction",
    tensors=DEEPSEEK_V3.tensors,
    rules=overridden(
        DEEPSEEK_V3.rules,
        [
            Row("norm_epsilon", "rms_norm_eps", 1e-5),
            Row("max_position_embeddings", "max_position_embeddings", 202752),
            Row("q_lora_rank", "q_lora_rank", IfAbsent("q_lora_rank", 768)),
            Row("qk_head_dim", "qk_nope_head_dim", 192),
            Row("v_head_dim", "v_head_dim", 256),
            Repeated("head_dim", "qk_rope_head_dim", 64),  # another name of it in the class
            Row("num_experts", "n_routed_experts", 64),
            Row("moe_router_topk", "num_experts_per_tok", 4),
            Row("moe_ffn_hidden_size", "moe_intermediate_size", 1536),
            Row("moe_router_topk_scaling_factor", "routed_scaling_factor", 1.8),
            FirstDense(1, listed=True),
            SharedExperts(1, 1536),
            ExpertGroups((1, 1)),
            Row("mtp_num_layers", "num_nextn_predict_layers", 0),
        ],
    ),
    mtp_layer=PREDICTION_LAYER,
    replicas=PREDICTION_REPLICAS,
)

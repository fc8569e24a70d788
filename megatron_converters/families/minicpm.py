"""MiniCPM-1B, 2B, 4 and 4.1 (remote MiniCPMForCausalLM, dense or with experts) and MiniCPM3 (transformers MiniCPM3ForCausalLM).

Llamas with constants that scale embeddings, the outputs of blocks, and logits. Names and defaults: configuration_minicpm.py of the
published models, and models/minicpm3 of transformers 5.23. MiniCPM5 is a Llama.
"""

from __future__ import annotations

from ..model.layouts import GATED, LATENT_KEY_HALVES, LATENT_QUERY_HALVES
from ..model.tables import Entry
from .deepseek import LATENT
from .defaults import IfAbsent, Quotient
from .entries import tensor
from .llama import ATTENTION, DENSE, DERIVED_HEAD_DIM, MLP, QKV_BIAS, SIZES, query_groups
from .rules import Fixed, Passed, Row, overridden
from .rules_attention import DYNAMIC, LINEAR, LLAMA3, LONGROPE, Rope
from .rules_experts import OptionalExperts
from .rules_scales import DepthScale, WidthScale
from .table import Family, Proof

_EXPERT = MLP + "experts.{expert}."

MINICPM = Family(
    name="minicpm",
    model_type="minicpm",
    architecture="MiniCPMForCausalLM",
    since="0.17",
    proof=Proof.EQUIVALENT,
    models="MiniCPM-1B, 2B, 2B-128k, MoE-8x2B, MiniCPM4, 4.1",
    covers=(
        "multipliers, LongRoPE with `--allow-inexpressible`, experts; BlockFFN's experts renamed; SALA is "
        "refused. MiniCPM5 is a Llama"
    ),
    tensors={
        **DENSE,
        **QKV_BIAS,
        **tensor("proj_bias", ATTENTION + "o_proj.bias"),
        **tensor("router", MLP + "gate.weight"),
        **tensor("expert_fc1", _EXPERT + "w1.weight", _EXPERT + "w3.weight", layout=GATED),
        **tensor("expert_fc2", _EXPERT + "w2.weight"),
        **tensor("block_router", MLP + "moe_router.weight"),
        **tensor("block_router_norm", MLP + "router_norm.weight"),
        **tensor("block_in", MLP + "moe_w_in.weight"),
        **tensor("block_out", MLP + "moe_w_out.weight"),
    },
    rules=(
        *overridden(SIZES, [Row("tied", "tie_word_embeddings", True)]),
        query_groups(),
        DERIVED_HEAD_DIM,
        Rope(),
        Row("max_position_embeddings", "max_position_embeddings", 2048),
        Row("qkv_bias", "attention_bias", False),
        Row("proj_bias", "attention_bias", False),
        OptionalExperts(topk=2),
        Row("embedding_multiplier", "scale_emb", 1),
        DepthScale(1),
        WidthScale(1),
        Passed(("mup_denominator",)),  # of draft models for speculative decoding
        Passed(("sparse_config",)),
    ),
    remarks={
        "sparse_config": "the configuration keeps its sparse attention (InfLLM-v2), which has no weights: Megatron-LM attends to "
        "all positions, as the model itself does below dense_len",
    },
)

#: The halves of a head that rotate are apart in these files, and neighbours in Megatron-LM's multi-latent attention.
_ROTARY_ROWS = {"q_up": LATENT_QUERY_HALVES, "q_whole": LATENT_QUERY_HALVES, "kv_down": LATENT_KEY_HALVES}

MINICPM3 = Family(
    name="minicpm3",
    model_type="minicpm3",
    architecture="MiniCPM3ForCausalLM",
    since="0.12",
    proof=Proof.LOGITS,
    models="MiniCPM3",
    covers="multi-latent attention whose rotary rows are made neighbours, multipliers folded",
    tensors={
        **{slot: entry for slot, entry in LATENT.items() if slot not in _ROTARY_ROWS},
        **{slot: Entry(layout, LATENT[slot].names) for slot, layout in _ROTARY_ROWS.items()},
        **{slot: DENSE[slot] for slot in ("fc1", "fc2")},
    },
    rules=(
        *overridden(
            SIZES,
            [
                Row("norm_epsilon", "rms_norm_eps", 1e-5),
                Row("initializer_range", "initializer_range", 0.1),
                Row("tied", "tie_word_embeddings", True),
            ],
        ),
        # YaRN is left out: what Megatron-LM's multi-latent attention makes of it is DeepSeek's, and not this class's.
        Rope(scalings=(LINEAR, LLAMA3, LONGROPE, DYNAMIC)),
        Row("q_lora_rank", "q_lora_rank", IfAbsent("q_lora_rank", 768)),
        Row("kv_lora_rank", "kv_lora_rank", 256),
        Row("qk_head_dim", "qk_nope_head_dim", 64),
        Row("qk_pos_emb_head_dim", "qk_rope_head_dim", 32),
        Row("v_head_dim", "v_head_dim", Quotient("hidden_size", "num_attention_heads")),
        Row("max_position_embeddings", "max_position_embeddings", 32768),
        Fixed("attention_bias", False),
        Fixed("mlp_bias", False),
        Row("embedding_multiplier", "scale_emb", 12),
        DepthScale(1.4),
        WidthScale(256),
        # Sums and repetitions of the sizes above.
        Passed(("head_dim", "qk_head_dim", "num_key_value_heads")),
    ),
)

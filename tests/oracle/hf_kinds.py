"""Tiny configs of families that differ from Llama in kind, and random values for their parameters.

Each config makes its family's peculiarities visible in the logits: query groups are not heads, heads times channels is not the
hidden size, multipliers are far from 1, windows are shorter than the tokens, and epsilon is large where the class allows it.
Where it matters, no value is the default of Megatron-LM's argument, so that a forgotten one shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_VISIBLE_EPSILON = 1e-3
_LATENT_EPSILON = 1e-6  # of the latents' norms in the DeepSeek classes, whatever the config says


def _rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


def _yarn(theta: float, **more: Any) -> dict[str, Any]:
    """YaRN with the constants that Megatron-LM has no flag for (32, 1, 4096)."""
    fixed = dict(beta_fast=32.0, beta_slow=1.0, original_max_position_embeddings=4096)
    return {"rope_type": "yarn", "rope_theta": theta, "factor": 40.0, **fixed, **more}


TOKENS: dict[str, Any] = dict(vocab_size=199, bos_token_id=1, eos_token_id=2, pad_token_id=None)
_SIZES = TOKENS | dict(
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=512,
)
LLAMA_LIKE = _SIZES | dict(
    head_dim=16, rms_norm_eps=_VISIBLE_EPSILON, rope_parameters=_rope(1e4), tie_word_embeddings=False
)
_GPT2 = TOKENS | dict(
    model_type="gpt2",
    n_embd=64,
    n_layer=4,
    n_head=4,
    n_positions=96,
    n_inner=112,
    layer_norm_epsilon=_VISIBLE_EPSILON,
    tie_word_embeddings=True,
)
_STARCODER2 = _SIZES | dict(
    model_type="starcoder2",
    head_dim=16,
    norm_epsilon=_VISIBLE_EPSILON,
    use_bias=True,
    sliding_window=7,
    rope_parameters=_rope(1e5),
    tie_word_embeddings=True,
)
_PHI3 = {name: value for name, value in LLAMA_LIKE.items() if name != "head_dim"} | dict(
    model_type="phi3", num_attention_heads=4, num_key_value_heads=2, original_max_position_embeddings=512
)
_GLM = LLAMA_LIKE | dict(
    model_type="glm", attention_bias=True, rope_parameters=_rope(5e4, partial_rotary_factor=0.5), num_key_value_heads=2
)
_GRANITE = LLAMA_LIKE | dict(
    model_type="granite",
    embedding_multiplier=12.0,
    residual_multiplier=0.22,
    attention_multiplier=0.0625,  # 1 / head_dim, as published
    logits_scaling=8.0,
    tie_word_embeddings=True,
)
_QWEN_WINDOW = LLAMA_LIKE | dict(use_sliding_window=True, sliding_window=7, max_window_layers=2)
_EXPERTS = dict(
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    first_k_dense_replace=1,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=0,
)
_GLM4_MOE = (
    LLAMA_LIKE
    | _EXPERTS
    | dict(
        model_type="glm4_moe",
        num_experts_per_tok=3,  # 2 is Megatron-LM's default
        n_shared_experts=1,
        attention_bias=True,
        use_qk_norm=True,
        rope_parameters=_rope(5e4, partial_rotary_factor=0.5),
    )
)
_MLA = (
    _SIZES
    | _EXPERTS
    | dict(
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=40,
        kv_lora_rank=24,  # 32 is Megatron-LM's default
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        rms_norm_eps=_LATENT_EPSILON,
        rope_parameters=_rope(5e4),
        tie_word_embeddings=False,
    )
)
_DEEPSEEK_V3 = _MLA | dict(model_type="deepseek_v3", n_shared_experts=1, n_group=2, topk_group=1)
_DEEPSEEK_V2_LITE = {name: value for name, value in _MLA.items() if name != "num_nextn_predict_layers"} | dict(
    model_type="deepseek_v2",
    q_lora_rank=None,
    num_experts_per_tok=3,
    n_shared_experts=2,
    topk_method="greedy",
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
    max_position_embeddings=4096 * 40,
    rope_parameters=_yarn(1e4, mscale=0.707, mscale_all_dim=0.707),
)
_QWEN3_NEXT = LLAMA_LIKE | dict(
    model_type="qwen3_next",
    rope_parameters=_rope(5e4, partial_rotary_factor=0.5),
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=12,
    linear_conv_kernel_dim=4,
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=48,
    shared_expert_intermediate_size=80,
    norm_topk_prob=True,
)

KINDS: Mapping[str, Mapping[str, Any]] = {
    "gpt2": _GPT2,
    "starcoder2": _STARCODER2,
    "phi3": _PHI3 | dict(sliding_window=8),
    "phi3-partial": _PHI3
    | dict(rope_parameters=_rope(1e4, partial_rotary_factor=0.75), tie_word_embeddings=True, sliding_window=None),
    "glm": _GLM,
    "granite": _GRANITE,
    "granite-untied": _GRANITE | dict(attention_multiplier=0.1, tie_word_embeddings=False),
    "qwen2-window": {name: value for name, value in _QWEN_WINDOW.items() if name != "head_dim"}
    | dict(model_type="qwen2"),
    "qwen3-window": _QWEN_WINDOW | dict(model_type="qwen3"),
    "glm4-moe": _GLM4_MOE,
    "deepseek-v2-lite": _DEEPSEEK_V2_LITE,
    "deepseek-v3": _DEEPSEEK_V3,
    "deepseek-v3-yarn": _DEEPSEEK_V3
    | dict(max_position_embeddings=4096 * 40, rope_parameters=_yarn(5e4, mscale=1.0, mscale_all_dim=1.0)),
    "qwen3-next": _QWEN3_NEXT,
}
"""Families by name: all fields of config.json (transformers 5)."""

FOLDED: Mapping[str, Mapping[str, Any]] = {
    "minicpm3": {name: value for name, value in _MLA.items() if name not in _EXPERTS}
    | dict(
        model_type="minicpm3",
        rms_norm_eps=1e-4,  # not that of the latents
        scale_emb=12,
        scale_depth=1.4,
        dim_model_base=16,
        rope_parameters=_rope(1e4),
        tie_word_embeddings=True,
    )
}
"""Families whose multipliers can only be folded, so that the way back is not exact."""

_PHI: dict[str, Any] = TOKENS | dict(
    model_type="phi",
    hidden_size=80,
    intermediate_size=112,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    hidden_act="gelu_new",
    layer_norm_eps=_VISIBLE_EPSILON,
    rope_parameters=_rope(1e4, partial_rotary_factor=0.4),
    qk_layernorm=False,
    tie_word_embeddings=False,
)
LIVE: Mapping[str, Mapping[str, Any]] = {
    "phi": _PHI,
    "phi-tied": _PHI | dict(num_key_value_heads=None, hidden_act="gelu", tie_word_embeddings=True),
}
"""Families that Megatron-LM has no arguments for, so that files need --allow-inexpressible."""

#: Scale of a parameter's random values by a part of its name; the first that fits counts.
_SCALES = (
    *(
        ("c_attn.weight", 0.15),
        ("query_key_value.weight", 0.15),
        ("qkv_proj", 0.15),
        ("q_b_proj", 0.2),
        ("kv_b_proj", 0.2),
        ("kv_a_proj", 0.2),
    ),
    *(("sinks", 1.0), ("mlp.router.weight", 0.3), ("gate_up_proj_bias", 0.3), ("down_proj_bias", 0.3)),
    *(
        ("in_proj_qkvz", 0.2),
        ("in_proj_ba", 0.2),
        ("linear_attn.in_proj_", 0.2),
        ("conv1d", 0.3),
        ("A_log", 0.5),
        ("dt_bias", 0.5),
    ),
)


def scale(name: str) -> float | None:
    """Scale of the random values of parameters that only these families have, so that each changes the logits; else None."""
    return next((value for part, value in _SCALES if part in name), None)


def is_norm(name: str) -> bool:
    """Whether `name` is the weight of a norm, which is random around the class's own value (0 or 1)."""
    return name.endswith(("norm.weight", ".ln_1.weight", ".ln_2.weight", ".ln_f.weight"))


def randomise_buffers(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Set every bias that routers add to their scores to random values; they are buffers, and zero in the classes."""
    for name, buffer in sorted(model.named_buffers()):
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))

"""Arguments (`args`) that Megatron-LM would hold for a model of another kind than Llama, derived by hand from its config.json."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from .args import megatron_args

Config = dict[str, Any]
_SPARSE = ("deepseek_v32", "glm_moe_dsa")
_GATED_DELTA = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")


def read(hf: Path) -> Config:
    """Content of the config.json in a Hugging Face folder."""
    config: Config = json.loads((hf / "config.json").read_text())
    return config


def args_of(config: Config, **overrides: Any) -> Namespace:
    """Args for the model that `config` describes; `overrides` replace derived arguments."""
    derived = _common(config)
    for more in (_norms_and_mlp, _positions, _windows, _multipliers, _experts, _latent, _linear):
        derived |= more(config)
    args = megatron_args(**{**derived, **overrides})
    del args.exit_signal  # an enum, which a file for any loader must not hold
    return args


def _common(config: Config) -> Config:
    """Sizes, under either spelling of GPT-2's config or the others'."""
    kind = config["model_type"]
    heads = config.get("num_attention_heads") or config["n_head"]
    hidden = config.get("hidden_size") or config["n_embd"]
    groups = config.get("num_key_value_heads", heads)
    latent = "kv_lora_rank" in config
    return dict(
        num_layers=config.get("num_hidden_layers") or config["n_layer"],
        hidden_size=hidden,
        ffn_hidden_size=config.get("intermediate_size") or config["n_inner"],
        num_attention_heads=heads,
        num_query_groups=None if latent or groups == heads else groups,
        kv_channels=None if latent else config.get("head_dim"),  # in DeepSeek's configs it is the rotary part
        max_position_embeddings=config.get("max_position_embeddings") or config["n_positions"],
        vocab_size=config["vocab_size"],
        untie_embeddings_and_output_weights=not config["tie_word_embeddings"],
        add_qkv_bias=kind in ("qwen2", "glm", "glm4_moe"),
        params_dtype=getattr(torch, config["dtype"]),
        qk_layernorm=kind in ("qwen3", *_GATED_DELTA) or latent or config.get("use_qk_norm", False),
    )


def _norms_and_mlp(config: Config) -> Config:
    kind = config["model_type"]
    epsilons = ("rms_norm_eps", "norm_epsilon", "layer_norm_epsilon")
    found = dict(layernorm_epsilon=next(config[name] for name in epsilons if name in config))
    if kind in ("gpt2", "starcoder2"):
        return found | dict(normalization="LayerNorm", swiglu=False, add_bias_linear=True, bias_gelu_fusion=True)
    return found | (dict(layernorm_zero_centered_gamma=True) if kind in _GATED_DELTA else {})


def _positions(config: Config) -> Config:
    rope = config.get("rope_parameters")
    if rope is None:
        return dict(position_embedding_type="learned_absolute")
    return dict(
        rotary_base=int(rope["rope_theta"]),
        rotary_percent=rope.get("partial_rotary_factor", 1.0),
        rotary_interleaved=config["model_type"] == "glm",
    )


def _windows(config: Config) -> Config:
    """Windows of all layers, or of those that `layer_types` names; Megatron-LM does not count the token itself."""
    types = config.get("layer_types") or []
    window = config.get("sliding_window")
    if not window or (types and "sliding_attention" not in types):
        return {}
    skip = [int(kind == "sliding_attention") for kind in types] if "full_attention" in types else None
    return dict(window_size=(window - 1, 0), window_attn_skip_freq=skip)


def _multipliers(config: Config) -> Config:
    """Granite's by `--use-mup`: the residual stream may be scaled, so only ratios with the residual multiplier count."""
    if config["model_type"] != "granite":
        return {}
    residual, channels = config["residual_multiplier"], config["head_dim"]
    return dict(
        use_mup=True,
        mup_embedding_mult=config["embedding_multiplier"] / residual,
        mup_output_mult=1 / config["logits_scaling"],
        mup_base_head_dim=(config["attention_multiplier"] * channels) ** 2,
        mup_attn_scale_power=1.0,
        layernorm_epsilon=config["rms_norm_eps"] / residual**2,
    )


def _experts(config: Config) -> Config:
    experts = config.get("n_routed_experts") or config.get("num_experts")
    if not experts:
        return {}
    layers, dense = config["num_hidden_layers"], config.get("first_k_dense_replace", 0)
    shared = config.get("shared_expert_intermediate_size")
    sigmoid = config["model_type"] in ("glm4_moe", "deepseek_v3", *_SPARSE)
    grouped = config.get("n_group") or 1
    factor = config.get("routed_scaling_factor", 1.0)
    return dict(
        num_experts=experts,
        moe_ffn_hidden_size=config["moe_intermediate_size"],
        moe_layer_freq=[int(layer >= dense) for layer in range(layers)],
        moe_router_topk=config["num_experts_per_tok"],
        moe_router_pre_softmax=config["model_type"] == "deepseek_v2",
        moe_router_score_function="sigmoid" if sigmoid else "softmax",
        moe_router_enable_expert_bias=sigmoid,
        moe_router_topk_scaling_factor=None if factor == 1 else factor,
        moe_router_num_groups=grouped if grouped > 1 else None,
        moe_router_group_topk=config["topk_group"] if grouped > 1 else None,
        moe_router_dtype="fp32" if config["model_type"] not in _GATED_DELTA else None,
        moe_router_load_balancing_type="none" if sigmoid else "aux_loss",
        moe_shared_expert_intermediate_size=shared or config["n_shared_experts"] * config["moe_intermediate_size"],
        moe_shared_expert_gate=bool(shared),
    )


def _latent(config: Config) -> Config:
    if "kv_lora_rank" not in config:
        return {}
    rope = config["rope_parameters"]
    yarn = rope["rope_type"] == "yarn"
    sparse = config["model_type"] in _SPARSE
    return dict(
        experimental_attention_variant="dsa" if sparse else None,
        multi_latent_attention=True,
        q_lora_rank=config["q_lora_rank"],
        kv_lora_rank=config["kv_lora_rank"],
        qk_head_dim=config["qk_nope_head_dim"],
        qk_pos_emb_head_dim=config["qk_rope_head_dim"],
        v_head_dim=config["v_head_dim"],
        rope_type="yarn" if yarn else "rope",
        rotary_scaling_factor=rope["factor"] if yarn else 1.0,
        mscale=rope["mscale"] if yarn else 1.0,
        mscale_all_dim=rope["mscale_all_dim"] if yarn else 0.0,
    )


def _linear(config: Config) -> Config:
    if "linear_key_head_dim" not in config:
        return {}
    names = ("conv_kernel_dim", "key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads")
    return dict(
        experimental_attention_variant="gated_delta_net",
        linear_attention_freq=[int(kind == "linear_attention") for kind in config["layer_types"]],
        attention_output_gate=True,
        **{f"linear_{name}": config[f"linear_{name}"] for name in names},
    )

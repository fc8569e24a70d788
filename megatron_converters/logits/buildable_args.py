"""Megatron-LM arguments from which megatron-core's model is built here, and those that are refused or ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..basics.errors import raise_all

#: Fields of TransformerConfig of the same name, required in a checkpoint: their defaults would build another model or fail.
CONFIG = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "normalization"),
    *("layernorm_epsilon", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "window_size"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
)
#: The same, where a model has experts.
CONFIG_WITH_EXPERTS = (
    *("moe_ffn_hidden_size", "moe_layer_freq", "moe_router_topk", "moe_router_pre_softmax", "moe_grouped_gemm"),
    *("moe_shared_expert_intermediate_size", "expert_model_parallel_size", "expert_tensor_parallel_size"),
)
#: Fields of the same name that may be absent; Megatron-LM's default then applies.
OPTIONAL = (
    *("rotary_interleaved", "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
    *("virtual_pipeline_model_parallel_size", "pipeline_model_parallel_layout"),
    *("window_attn_skip_freq", "apply_residual_connection_post_layernorm", "no_rope_freq", "softmax_type"),
)
#: The same, where a model has experts.
OPTIONAL_WITH_EXPERTS = (
    *("moe_shared_expert_gate", "moe_router_score_function", "moe_router_enable_expert_bias"),
    *("moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk"),
    *("moe_router_load_balancing_type", "moe_use_legacy_grouped_gemm"),
)
#: Required arguments that define the model and are not fields of TransformerConfig.
MODEL = (
    *("group_query_attention", "num_query_groups", "swiglu", "padded_vocab_size", "max_position_embeddings"),
    *("untie_embeddings_and_output_weights", "position_embedding_type", "rotary_base", "rotary_percent"),
    *("use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor", "transformer_impl"),
)
#: Fields of TransformerConfig whose argument has another name: field to argument.
RENAMED = {
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
}
#: Arguments that are not passed on, with the only value that is accepted.
_ACCEPTED_VALUES: dict[str, Any] = {
    "activation_func_clamp_value": None,
    "apply_layernorm_1p": False,
    "apply_query_key_layer_scaling": False,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "glu_linear_offset": 0.0,
    "heterogeneous_layers_config_encoded_json": None,
    "heterogeneous_layers_config_path": None,
    "layernorm_zero_centered_gamma": False,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
    "moe_mlp_glu_interleave_size": None,
    "mtp_num_layers": None,
    "multi_latent_attention": False,  # megatron-core builds it with Transformer Engine alone
    "openai_gelu": False,
    "qk_l2_norm": False,
    "qk_layernorm_over_heads": False,  # megatron-core has no such norms
    "quick_geglu": False,
    "softmax_scale": None,
    "squared_relu": False,
    "use_legacy_models": False,
    "use_mup": False,
}
#: Arguments that do not change what a model computes in float32, or repeat others.
_IRRELEVANT = frozenset(
    """
    add_position_embedding attention_dropout attention_softmax_in_fp32 bf16 encoder_num_layers fp16 hidden_dropout
    init_method_std moe_aux_loss_coeff moe_dynamic_hpu moe_router_dtype moe_token_dispatcher_type norm_epsilon num_experts
    params_dtype sequence_parallel use_rotary_position_embeddings vocab_size
    """.split()
)
_KNOWN = frozenset(
    (*CONFIG, *CONFIG_WITH_EXPERTS, *OPTIONAL, *OPTIONAL_WITH_EXPERTS, *MODEL, *RENAMED.values(), *_IRRELEVANT)
)


def check(args: Mapping[str, Any], what: str) -> None:
    """Raise `ConversionError` for arguments that would be ignored: the model that is built would silently be another one."""
    problems = [
        f"{name}={value!r}"
        for name, value in args.items()
        if name not in _KNOWN and (name not in _ACCEPTED_VALUES or value != _ACCEPTED_VALUES[name])
    ]
    raise_all(f"{what}: megatron-core's model cannot be built here with", problems)

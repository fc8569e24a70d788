"""The arguments of Megatron-LM by which megatron-core's model is built here, and what becomes of all others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..basics.errors import raise_all

#: Fields of TransformerConfig under the same name. A checkpoint must hold them: the defaults are another model, or none.
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
#: Fields whose absence means Megatron-LM's default.
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
#: What decides the model beside TransformerConfig; a checkpoint must hold it.
MODEL = (
    *("group_query_attention", "num_query_groups", "swiglu", "padded_vocab_size", "max_position_embeddings"),
    *("untie_embeddings_and_output_weights", "position_embedding_type", "rotary_base", "rotary_percent"),
    *("use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor", "transformer_impl"),
)
#: Fields of TransformerConfig under another name.
RENAMED = {
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
}
#: Arguments that are not passed on, and the value with which that is right.
_ABSENT: dict[str, Any] = {
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
#: Arguments that change nothing of what a model computes in float32, or say again what others say.
_SILENT = frozenset(
    """
    add_position_embedding attention_dropout attention_softmax_in_fp32 bf16 encoder_num_layers fp16 hidden_dropout
    init_method_std moe_aux_loss_coeff moe_dynamic_hpu moe_router_dtype moe_token_dispatcher_type norm_epsilon num_experts
    params_dtype sequence_parallel use_rotary_position_embeddings vocab_size
    """.split()
)
_PASSED = frozenset(
    (*CONFIG, *CONFIG_WITH_EXPERTS, *OPTIONAL, *OPTIONAL_WITH_EXPERTS, *MODEL, *RENAMED.values(), *_SILENT)
)


def check(args: Mapping[str, Any], what: str) -> None:
    """Refuse a model of which these arguments say something that would not be built; it would be another one, silently."""
    problems = [
        f"{name}={value!r}"
        for name, value in args.items()
        if name not in _PASSED and (name not in _ABSENT or value != _ABSENT[name])
    ]
    raise_all(f"{what}: megatron-core's model is not built here with", problems)

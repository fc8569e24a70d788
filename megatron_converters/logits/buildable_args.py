"""Megatron-LM arguments from which megatron-core's model is built here, and those that are refused or ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..basics.errors import ConversionError, raise_all

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
    *("softmax_scale", "transformer_impl"),
)
#: The same, where a model has experts.
OPTIONAL_WITH_EXPERTS = (
    *("moe_shared_expert_gate", "moe_router_score_function", "moe_router_enable_expert_bias"),
    *("moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk"),
    *("moe_router_load_balancing_type", "moe_use_legacy_grouped_gemm"),
)
#: Fields of the same name, also optional, of models that megatron-core builds from Transformer Engine's layers alone.
WITH_ENGINE = (
    *("layernorm_zero_centered_gamma", "attention_output_gate", "mtp_num_layers", "experimental_attention_variant"),
    *("linear_attention_freq", "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"),
    *("linear_num_key_heads", "linear_num_value_heads"),
)
#: Fields of MLATransformerConfig of the same name, required where a model has latent attention.
LATENT = (
    *("multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
    *("rope_type", "rotary_base", "rotary_percent", "rotary_scaling_factor", "mscale", "mscale_all_dim"),
)
#: The same that may be absent: no flag sets them in any release, so only a checkpoint's own args can have them.
OPTIONAL_LATENT = ("beta_fast", "beta_slow", "original_max_position_embeddings")
#: Required where the MLP has no gate, and not a field: whether GELU is the fused kernel's tanh form, or exact.
UNGATED = ("bias_gelu_fusion",)
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
#: Arguments with a value for which megatron-core needs Transformer Engine, which needs a GPU; any other value does.
_WITHOUT_ENGINE: dict[str, Any] = {
    "apply_layernorm_1p": False,
    "attention_output_gate": False,
    "experimental_attention_variant": None,
    "layernorm_zero_centered_gamma": False,
    "mtp_num_layers": None,
    "multi_latent_attention": False,
}
#: Arguments that are not passed on, with the only value that is accepted.
_ACCEPTED_VALUES: dict[str, Any] = {
    "activation_func_clamp_value": None,
    "apply_query_key_layer_scaling": False,
    "glu_linear_offset": 0.0,
    "heterogeneous_layers_config_encoded_json": None,
    "heterogeneous_layers_config_path": None,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
    "moe_mlp_glu_interleave_size": None,
    "qk_l2_norm": False,
    "qk_layernorm_over_heads": False,  # megatron-core has no such norms
    "quick_geglu": False,
    "use_legacy_models": False,
    "use_mup": False,
}
#: Arguments that do not change what a model computes in float32, or repeat others.
_IRRELEVANT = frozenset(
    """
    add_position_embedding attention_dropout attention_softmax_in_fp32 bf16 encoder_num_layers fp16 hidden_dropout
    init_method_std moe_aux_loss_coeff moe_dynamic_hpu moe_router_dtype moe_token_dispatcher_type norm_epsilon num_experts
    openai_gelu params_dtype sequence_parallel use_rotary_position_embeddings vocab_size
    """.split()
)
_KNOWN = frozenset(
    (
        *(*CONFIG, *CONFIG_WITH_EXPERTS, *OPTIONAL, *OPTIONAL_WITH_EXPERTS, *MODEL, *RENAMED.values(), *_IRRELEVANT),
        *(*UNGATED, "squared_relu", *WITH_ENGINE, *LATENT, *OPTIONAL_LATENT),
    )
)


def check(args: Mapping[str, Any], what: str) -> None:
    """Raise `ConversionError` for arguments that would be ignored: the model that is built would silently be another one.

    So are those for which megatron-core has only layers of Transformer Engine, which does not run on a CPU.
    """
    engine = needing_engine(args)
    if engine:
        raise ConversionError(
            f"{what}: megatron-core builds a model with {', '.join(engine)} from Transformer Engine's layers alone, which need "
            "a GPU; its logits cannot be computed here"
        )
    problems = [
        f"{name}={value!r}"
        for name, value in args.items()
        if name not in _KNOWN
        and name not in _WITHOUT_ENGINE
        and (name not in _ACCEPTED_VALUES or value != _ACCEPTED_VALUES[name])
    ]
    raise_all(f"{what}: megatron-core's model cannot be built here with", problems)


def needing_engine(args: Mapping[str, Any]) -> list[str]:
    """Arguments, as `name=value`, with which megatron-core's local layers cannot be the model."""
    return [f"{name}={args[name]!r}" for name, usual in _WITHOUT_ENGINE.items() if name in args and args[name] != usual]

"""Limits of Megatron-LM's arguments: values that no supported model has, and model properties that they cannot express.

Attribute names: Megatron-LM core_v0.8.0 to core_v0.19.0, training/arguments.py and core/transformer/transformer_config.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...basics.dtypes import DType
from ...basics.errors import ConversionError
from ...model.slots import Ref, refs
from ...model.spec import ModelSpec, RopeScaling

#: Value that every supported model has, and the meaning of any other value, by attribute.
FIXED: dict[str, tuple[Any, str]] = {
    "position_embedding_type": ("rope", "position embeddings that are not rotary"),
    "normalization": ("RMSNorm", "a normalisation that is not RMSNorm"),
    "swiglu": (True, "an MLP without SwiGLU"),
    "rotary_percent": (1.0, "partly rotated heads"),
    "rotary_interleaved": (False, "interleaved rotary embeddings"),
    "apply_layernorm_1p": (False, "norms around 1"),
    "layernorm_zero_centered_gamma": (False, "norms around 1"),
    "squared_relu": (False, "squared ReLU"),
    "quick_geglu": (False, "a quick GELU"),
    "softmax_type": ("vanilla", "attention sinks"),
    "attention_output_gate": (False, "gated attention outputs"),
    "no_rope_freq": (None, "layers without rotary embeddings"),
    "window_attn_skip_freq": (None, "a sliding window on some layers only"),
    "apply_residual_connection_post_layernorm": (False, "residuals taken after the norms"),
    "heterogeneous_layers_config_path": (None, "layers that differ in shape"),
    "heterogeneous_layers_config_encoded_json": (None, "layers that differ in shape"),
    "multi_latent_attention": (False, "multi-latent attention"),
    "experimental_attention_variant": (None, "another attention"),
    "softmax_scale": (None, "another scale of attention scores"),
    "qk_l2_norm": (False, "queries and keys of length 1"),
    "glu_linear_offset": (0.0, "an offset in the MLP's activation"),
    "activation_func_clamp_value": (None, "a clamped activation"),
    "use_mup": (False, "embeddings, attention scores and logits scaled by muP"),
    "moe_router_score_function": ("softmax", "another score function than softmax"),
    "moe_router_enable_expert_bias": (False, "a bias of the router's choice (mlp.router.expert_bias)"),
    "moe_router_topk_scaling_factor": (None, "scaled expert outputs"),
    "moe_router_num_groups": (None, "a choice limited to groups of experts"),
    "moe_apply_probs_on_input": (False, "experts whose inputs are scaled instead of their outputs"),
    "moe_mlp_glu_interleave_size": (None, "gate and up of experts in alternating blocks of rows"),
    "moe_latent_size": (None, "experts on projected inputs"),
    "mtp_num_layers": (None, "multi-token prediction layers"),
}
#: Further values with the same meaning as the supported one. If that is false, any false value has it too.
_EQUIVALENT = {"moe_router_topk_scaling_factor": 1.0}
#: Load balancing that differs in training only if several experts are chosen: their weights are then the softmax over all experts
#: (core/transformer/moe/router.py).
SINKHORN = "sinkhorn"
#: Load balancing types that choose experts by the router's probabilities.
_PLAIN_BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")
#: Constants built into Megatron-LM's llama3 RoPE scaling (core/models/common/embeddings/rotary_pos_embedding.py).
MEGATRON_LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


def inexpressible(spec: ModelSpec) -> list[str]:
    """Properties of a model that Megatron-LM's arguments cannot express, one reason each."""
    reasons = []
    scaling = spec.rope_scaling
    if scaling is not None and scaling.kind == "llama3":
        built_in = RopeScaling("llama3", scaling.factor)
        if scaling != built_in:
            reasons.append(
                "llama3 RoPE scaling with low_freq_factor, high_freq_factor and original_max_position_embeddings of "
                f"{scaling.low_freq_factor}, {scaling.high_freq_factor} and {scaling.original_max_position_embeddings}: "
                f"Megatron-LM has {built_in.low_freq_factor}, {built_in.high_freq_factor} and "
                f"{built_in.original_max_position_embeddings} built in"
            )
    if spec.sliding_window is not None and spec.sliding_window_from > 0:
        reasons.append(
            f"a sliding window from layer {spec.sliding_window_from} on only: Megatron-LM's --window-size holds for every layer"
        )
    if spec.proj_bias != spec.mlp_bias:
        reasons.append(
            "a bias on only one of the attention output and the MLP: Megatron-LM's --add-bias-linear means both"
        )
    if scaling is not None and scaling.kind == "linear" and not float(scaling.factor).is_integer():
        reasons.append(
            f"linear RoPE scaling by {scaling.factor}: Megatron-LM's --rotary-seq-len-interpolation-factor is a whole number"
        )
    if spec.qk_norm and spec.qk_norm_over_heads:
        reasons.append(
            "query and key norms over all heads together: Megatron-LM's --qk-layernorm normalises each head by itself, and "
            "refuses weights of this size; give the model an attention of your own"
        )
    if spec.num_experts and spec.moe_router_topk == 1 and not spec.moe_router_pre_softmax:
        reasons.append(
            "one expert for each token, with weight 1: Megatron-LM takes --moe-router-topk 1 only with "
            "--moe-router-pre-softmax, which weights it by its probability"
        )
    if not float(spec.rotary_base).is_integer():
        reasons.append(f"a rotary base of {spec.rotary_base}: Megatron-LM's --rotary-base is a whole number")
    return reasons


def refuse_unsupported(values: Mapping[str, Any]) -> None:
    """Raise `ConversionError` if `args`, as a mapping, describe a model that is not supported."""
    if values.get("use_rotary_position_embeddings"):  # the older spelling of position_embedding_type
        values = {**values, "position_embedding_type": "rope"}
    for name, (supported, meaning) in FIXED.items():
        value = values.get(name, supported)
        off = not supported and (not any(value) if isinstance(value, list) else not value)
        if value != supported and not off and value != _EQUIVALENT.get(name):
            raise ConversionError(
                f"the checkpoint's args have {name}={value!r}, which means {meaning}; only {supported!r} is supported"
            )
    balancing = values.get("moe_router_load_balancing_type") or "none"
    kinds = balancing if isinstance(balancing, list) else [balancing]
    sinkhorn = kinds == [SINKHORN] and values.get("moe_router_topk") != 1
    if values.get("num_experts") and not sinkhorn and not all(kind in _PLAIN_BALANCING for kind in kinds):
        raise ConversionError(
            f"the checkpoint's args have moe_router_load_balancing_type={balancing!r} with moe_router_topk="
            f"{values.get('moe_router_topk')!r}, which does not weight experts by a softmax; not supported"
        )


def rounding_warnings(spec: ModelSpec, dtype_of: Callable[[Ref], DType]) -> list[str]:
    """Warning that Megatron-LM rounds weights whose dtype is not the model's; `router_warnings` covers routers."""
    stored = ((ref.slot, dtype_of(ref)) for ref in refs(spec))
    lossy = {
        slot.name: dtype
        for slot, dtype in stored
        if dtype != spec.dtype and dtype.itemsize >= spec.dtype.itemsize and not slot.keeps_precision
    }
    if not lossy:
        return []
    named = ", ".join(f"{name} ({dtype})" for name, dtype in lossy.items())
    return [
        f"warning: {named} differ from the embeddings' dtype, {spec.dtype}: Megatron-LM rounds them to it when loading"
    ]

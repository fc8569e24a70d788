"""Arguments of every model: sizes, positions, activation, norms, biases, dtype.

Names: Megatron-LM core_v0.8.0 to core_v0.19.0, training/arguments.py and core/transformer/transformer_config.py.
"""

from __future__ import annotations

from typing import Any

from ...basics.errors import ConversionError, Unclear
from ...model.layers import (
    ALL_HEADS,
    EACH_HEAD,
    GELU,
    GELU_TANH,
    LAYER_NORM,
    RMS_NORM,
    SILU,
    SQUARED_RELU,
    RopeScaling,
    number,
)
from ...model.spec import ModelSpec, PerLayer
from .argument import (
    Args,
    Argument,
    Build,
    Context,
    Group,
    Properties,
    flag,
    frequency,
    is_latent,
    joined,
    off_switch,
    only,
    said,
    switch,
)

#: Constants built into Megatron-LM's llama3 RoPE scaling (core/models/common/embeddings/rotary_pos_embedding.py).
MEGATRON_LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
ROPE, LEARNED, NO_POSITIONS = "rope", "learned_absolute", "none"


def whole(value: Any) -> Any:
    """Whole numbers as int, since Megatron-LM parses these options with `int`."""
    return int(value) if value is not None and float(value).is_integer() else value


def scaling_of(spec: ModelSpec, kind: str) -> RopeScaling | None:
    """Rotary scaling of a model, if it is of this kind."""
    scaling = spec.values.get("rope_scaling")
    return scaling if isinstance(scaling, RopeScaling) and scaling.kind == kind else None


# -- heads


def _groups(context: Context) -> Any:
    """Query groups; for multi-latent attention, which has none, Megatron-LM's default."""
    return context.value("num_query_groups", 1)


def _groups_queries(context: Context) -> bool:
    return not is_latent(context.spec) and _groups(context) != context.value("num_attention_heads")


def _channels(context: Context) -> Any:
    """Size of a head; for multi-latent attention, which has others, Megatron-LM's default."""
    return context.value("kv_channels") or context.spec.hidden_size // context.value("num_attention_heads")


def _read_groups(args: Args) -> Properties:
    heads = args.get("num_attention_heads")
    return {"num_query_groups": args.get("num_query_groups") or heads if args.get("group_query_attention") else heads}


def _read_channels(args: Args) -> Properties:
    return {"kv_channels": args.get("kv_channels") or args["hidden_size"] // args["num_attention_heads"]}


# -- positions


def _positions(context: Context) -> str:
    if context.spec.learned_positions:
        return LEARNED
    return ROPE if any(context.per_layer("rope")) else NO_POSITIONS


def _read_positions(args: Args) -> Properties:
    kind = args.get("position_embedding_type", ROPE)
    if args.get("use_rotary_position_embeddings"):  # the older spelling
        kind = ROPE
    if kind not in (ROPE, LEARNED, NO_POSITIONS):
        raise ConversionError(
            f"the checkpoint's args have position_embedding_type={kind!r}; only {ROPE!r}, {LEARNED!r} and {NO_POSITIONS!r} "
            "are supported"
        )
    skipped = _without_rope(args) if kind == ROPE else ()
    layers = args["num_layers"]
    rope: Any = kind == ROPE
    if skipped:
        rope = PerLayer(layer not in skipped for layer in range(layers))
    return {"learned_positions": kind == LEARNED, "rope": rope}


def _without_rope(args: Args) -> tuple[int, ...]:
    """Layers without rotary embeddings: of N each N-th, of a list those with 1."""
    freq, layers = args.get("no_rope_freq"), args["num_layers"]
    if not freq or (isinstance(freq, list) and not any(freq)):
        return ()
    if isinstance(freq, int) and freq > 0:
        return tuple(layer for layer in range(layers) if (layer + 1) % freq == 0)
    if isinstance(freq, list) and len(freq) == layers:
        return tuple(layer for layer, skips in enumerate(freq) if skips)
    raise ConversionError(
        f"the checkpoint's args have no_rope_freq={freq!r}; it must be a number or a list of {layers} values, one per layer"
    )


def _no_rope(context: Context) -> list[int] | None:
    """List of 1 for each layer without rotary embeddings; None where all have them, or none."""
    rope = context.per_layer("rope")
    mixed = [each for each in rope if each is not None]
    return [int(each is False) for each in rope] if any(mixed) and not all(mixed) else None


def _scaled_by(kind: str, absent: Any) -> Any:
    def write(context: Context) -> Any:
        scaling = scaling_of(context.spec, kind)
        return absent if scaling is None else scaling.factor

    return write


def _read_scaling(args: Args) -> Properties:
    linear = args.get("rotary_seq_len_interpolation_factor")
    if args.get("use_rope_scaling"):
        if linear:
            raise ConversionError(
                "the checkpoint's args have both llama3 and linear RoPE scaling; no supported model has both"
            )
        factor = args.get("rope_scaling_factor") or MEGATRON_LLAMA3.factor
        return {"rope_scaling": RopeScaling("llama3", number(factor, "rope_scaling_factor"))}
    if linear:
        return {"rope_scaling": RopeScaling("linear", number(linear, "rotary_seq_len_interpolation_factor"))}
    return {"rope_scaling": None}


def _llama3_limit(spec: ModelSpec) -> str:
    scaling = scaling_of(spec, "llama3")
    if scaling is None or scaling == (built_in := RopeScaling("llama3", scaling.factor)):
        return ""
    return (
        "llama3 RoPE scaling with low_freq_factor, high_freq_factor and original_max_position_embeddings of "
        f"{scaling.low_freq_factor}, {scaling.high_freq_factor} and {scaling.original_max_position_embeddings}: "
        f"Megatron-LM has {built_in.low_freq_factor}, {built_in.high_freq_factor} and "
        f"{built_in.original_max_position_embeddings} built in"
    )


def _linear_limit(spec: ModelSpec) -> str:
    scaling = scaling_of(spec, "linear")
    if scaling is None or float(scaling.factor).is_integer():
        return ""
    return f"linear RoPE scaling by {scaling.factor}: Megatron-LM's --rotary-seq-len-interpolation-factor is a whole number"


def _base_limit(spec: ModelSpec) -> str:
    base = spec.values.get("rotary_base")
    if base is None or not any(spec.in_layers("rope")):
        return ""
    if isinstance(base, PerLayer):
        return "a rotary base of its own for some layers: Megatron-LM's --rotary-base holds for every layer"
    if not float(base).is_integer():
        return f"a rotary base of {base}: Megatron-LM's --rotary-base is a whole number"
    return ""


# -- MLP


def _read_activation(args: Args) -> Properties:
    if args.get("swiglu", True):
        return {"activation": SILU, "gated": True}
    if args.get("squared_relu"):
        return {"activation": SQUARED_RELU, "gated": False}
    # The fused kernel of bias and GELU is the tanh form; Megatron-LM uses it unless --no-bias-gelu-fusion (core/fusions).
    fused = args.get("bias_gelu_fusion", True) and args.get("add_bias_linear", True)
    return {"activation": GELU_TANH if fused else GELU, "gated": False}


def _fuses_gelu(context: Context) -> bool | None:
    """Whether bias and activation are one kernel; None where Megatron-LM's default does not matter."""
    if context.value("gated", True):
        return None
    return bool(context.value("activation") == GELU_TANH)


def _activation_limit(spec: ModelSpec) -> str:
    activation, gated = spec.values.get("activation", SILU), spec.values.get("gated", True)
    if gated and activation != SILU:
        return f"a gated MLP with {activation}: Megatron-LM's only flag of a gated MLP, --swiglu, has silu"
    if not gated and activation == SILU:
        return "an MLP of silu without a gate: Megatron-LM has no flag for it"
    if activation == GELU_TANH and not spec.values.get("mlp_bias"):
        return "the tanh form of GELU in an MLP without biases: Megatron-LM computes it in a kernel that needs biases"
    return ""


# -- biases and norms


def _all_biases(context: Context) -> bool:
    return bool(context.value("proj_bias")) and bool(context.value("mlp_bias", context.value("proj_bias")))


def _read_biases(args: Args) -> Properties:
    linear = bool(args.get("add_bias_linear", True))
    return {
        "qkv_bias": linear or bool(args.get("add_qkv_bias", False)),
        "proj_bias": linear,
        "mlp_bias": linear,
    }


def _bias_limit(spec: ModelSpec) -> str:
    proj, mlp = spec.values.get("proj_bias", False), spec.values.get("mlp_bias")
    if mlp is None or proj == mlp:
        return ""
    return "a bias on only one of the attention output and the MLP: Megatron-LM's --add-bias-linear means both"


def _read_epsilon(args: Args) -> Properties:
    names = [name for name in ("norm_epsilon", "layernorm_epsilon") if args.get(name) is not None]
    found = {number(args[name], name) for name in names}
    if len(found) > 1:
        raise Unclear(
            f"the checkpoint's args have norm_epsilon={args['norm_epsilon']} and "
            f"layernorm_epsilon={args['layernorm_epsilon']}; say which is right with --hf-config DIR"
        )
    return {"norm_epsilon": found.pop() if found else 1e-5}


def _read_norm_kind(args: Args) -> Properties:
    kind = args.get("normalization", RMS_NORM)
    if kind not in (RMS_NORM, LAYER_NORM):
        raise ConversionError(
            f"the checkpoint's args have normalization={kind!r}; only {RMS_NORM!r} and {LAYER_NORM!r} are supported"
        )
    centred = args.get("apply_layernorm_1p") or args.get("layernorm_zero_centered_gamma")
    return {"normalization": kind, "zero_centred": bool(centred)}


def _read_head_norms(args: Args) -> Properties:
    if args.get("qk_layernorm_over_heads"):
        return {"qk_norm": ALL_HEADS}
    return {"qk_norm": EACH_HEAD if args.get("qk_layernorm") else ""}


def _head_norm_limit(spec: ModelSpec) -> str:
    if spec.values.get("qk_norm") != ALL_HEADS:
        return ""
    return (
        "query and key norms over all heads together: Megatron-LM's --qk-layernorm normalises each head by itself, and "
        "refuses weights of this size; give the model an attention of your own"
    )


# -- windows


def _windows(context: Context) -> list[int | None]:
    return context.per_layer("sliding_window")


def _window_size(context: Context) -> tuple[int, int] | None:
    """Window as Megatron-LM counts it: positions to the left, without the token's own."""
    widest = max((window for window in _windows(context) if window is not None), default=None)
    return None if widest is None else (widest - 1, 0)


def _window_pattern(context: Context) -> list[int] | None:
    """List of 1 for each layer with the window, or None where it is on all layers or none."""
    on = [int(window is not None) for window in _windows(context)]
    return on if any(on) and not all(on) else None


def _read_window(args: Args) -> Properties:
    """Sliding window as Hugging Face counts it: with the position itself, while Megatron-LM counts only those to its left."""
    value = args.get("window_size")
    if value is None:
        return {"sliding_window": None}
    parts = value.split(",") if isinstance(value, str) else value
    sizes = [str(part).strip() for part in parts] if isinstance(parts, (list, tuple)) else []
    if len(sizes) != 2 or not sizes[0].isdecimal() or sizes[1] != "0":
        raise ConversionError(
            f"the checkpoint's args have window_size={value!r}; only a causal window (N, 0) is supported"
        )
    window, layers = int(sizes[0]) + 1, args["num_layers"]
    full = _full_layers(args.get("window_attn_skip_freq"), layers)
    if not full:
        return {"sliding_window": window}
    return {"sliding_window": PerLayer(None if layer in full else window for layer in range(layers))}


def _full_layers(freq: Any, layers: int) -> tuple[int, ...]:
    """Layers without the window: of N each N-th, of a list those with 0 (core_v0.15 on, `is_layer_window_attention`)."""
    if freq is None or (isinstance(freq, list) and all(freq)):
        return ()
    if isinstance(freq, int) and freq > 0:
        return tuple(layer for layer in range(layers) if (layer + 1) % freq == 0)
    if isinstance(freq, list) and len(freq) == layers:
        return tuple(layer for layer, on in enumerate(freq) if not on)
    raise ConversionError(
        f"the checkpoint's args have window_attn_skip_freq={freq!r}; it must be a number or a list of {layers} values, one per "
        "layer"
    )


def _window_limit(spec: ModelSpec) -> str:
    value = spec.values.get("sliding_window")
    sizes = sorted({window for window in value if window is not None}) if isinstance(value, PerLayer) else []
    if len(sizes) < 2:
        return ""
    return f"sliding windows of {sizes} positions: Megatron-LM's --window-size is one number"


_INTERPOLATION = "pass seq_len_interpolation_factor to GPTModel in your model provider"

SIZES = (
    said("num_layers", "num_layers", flag=flag("--num-layers"), build=Build.CONFIG),
    Argument("encoder_num_layers", lambda context: context.spec.num_layers),
    said("hidden_size", "hidden_size", flag=flag("--hidden-size"), build=Build.CONFIG),
    said("ffn_hidden_size", "ffn_hidden_size", flag=flag("--ffn-hidden-size"), build=Build.CONFIG),
    said("num_attention_heads", "num_attention_heads", flag=flag("--num-attention-heads"), build=Build.CONFIG),
    Argument(
        "group_query_attention",
        _groups_queries,
        flag=flag("--group-query-attention", switch),
        build=Build.MODEL,
    ),
    Argument(
        "num_query_groups",
        _groups,
        _read_groups,
        flag=flag("--num-query-groups", needs="group_query_attention"),
        build=Build.MODEL,
    ),
    Argument(
        "kv_channels",
        _channels,
        _read_channels,
        flag=flag("--kv-channels"),
        build=Build.CONFIG,
    ),
    said(
        "max_position_embeddings",
        "max_position_embeddings",
        flag=flag("--max-position-embeddings"),
        build=Build.MODEL,
    ),
    Argument("vocab_size", lambda context: context.spec.vocab_size),
)
#: Set by a training run or its defaults, and not by the model.
SEQ_LENGTH = Argument("seq_length", group=Group.RUN, flag=flag("--seq-length"))
POSITIONS = (
    Argument(
        "position_embedding_type",
        _positions,
        _read_positions,
        absent=ROPE,
        flag=flag("--position-embedding-type"),
        build=Build.MODEL,
    ),
    Argument("add_position_embedding", lambda _: True),
    Argument("use_rotary_position_embeddings", lambda _: False),
    Argument(
        "rotary_base",
        lambda context: whole(context.value("rotary_base", 10000)),
        lambda args: {"rotary_base": number(args.get("rotary_base") or 10000, "rotary_base")},
        limit=_base_limit,
        flag=flag("--rotary-base", lost=True),  # before 0.10 the checkpoint does not restore it
        build=Build.MODEL,
    ),
    said("rotary_percent", "rotary_percent", absent=1.0, flag=flag("--rotary-percent", default=1.0), build=Build.MODEL),
    said(
        "rotary_interleaved",
        "rotary_interleaved",
        absent=False,
        flag=flag("--rotary-interleaved", switch),
        build=Build.OPTIONAL,
    ),
    Argument(
        "no_rope_freq",
        _no_rope,
        flag=flag("--no-rope-freq", frequency, lost=True, since="0.13"),
        build=Build.OPTIONAL,
    ),
    Argument(
        "use_rope_scaling",
        lambda context: scaling_of(context.spec, "llama3") is not None,
        _read_scaling,
        absent=False,
        limit=_llama3_limit,
        flag=flag("--use-rope-scaling", switch, lost=True, since="0.10"),
        build=Build.MODEL,
    ),
    Argument(
        "rope_scaling_factor",
        _scaled_by("llama3", MEGATRON_LLAMA3.factor),
        absent=MEGATRON_LLAMA3.factor,
        flag=flag("--rope-scaling-factor", lost=True, default=MEGATRON_LLAMA3.factor, since="0.11"),
        build=Build.MODEL,
    ),
    Argument(
        "rotary_seq_len_interpolation_factor",
        lambda context: whole(_scaled_by("linear", None)(context)),
        limit=_linear_limit,
        flag=flag("--rotary-seq-len-interpolation-factor", lost=True, effective_since="0.19", instead=_INTERPOLATION),
        build=Build.MODEL,
    ),
)
BLOCKS = (
    Argument(
        "swiglu",
        lambda context: context.value("gated", True) and context.value("activation", SILU) == SILU,
        _read_activation,
        absent=True,
        limit=_activation_limit,
        flag=flag("--swiglu", switch),
        build=Build.MODEL,
    ),
    Argument(
        "squared_relu",
        lambda context: context.value("activation") == SQUARED_RELU,
        absent=False,
        flag=flag("--squared-relu", switch, lost=True),  # before 0.10 the checkpoint does not restore it
        build=Build.OPTIONAL,
    ),
    Argument(
        "bias_gelu_fusion",
        _fuses_gelu,
        optional=True,
        flag=flag("--no-bias-gelu-fusion", off_switch, lost=True),
        build=Build.OPTIONAL,
    ),
    only("quick_geglu", False, "a quick GELU"),
    only("glu_linear_offset", 0.0, "an offset in the MLP's activation"),
    only("activation_func_clamp_value", None, "a clamped activation"),
    Argument("openai_gelu", lambda _: False),
    Argument(
        "normalization",
        lambda context: context.spec.norm.normalization,
        _read_norm_kind,
        absent=RMS_NORM,
        flag=flag("--normalization"),
        build=Build.CONFIG,
    ),
    # --norm-epsilon sets norm_epsilon up to 0.15, and layernorm_epsilon from 0.16 on.
    Argument("norm_epsilon", lambda context: context.spec.norm.norm_epsilon, flag=flag("--norm-epsilon", lost=True)),
    Argument("layernorm_epsilon", lambda context: context.spec.norm.norm_epsilon, _read_epsilon, build=Build.CONFIG),
    # From 0.16 on the flag sets the second, which no release restores.
    Argument(
        "apply_layernorm_1p",
        lambda context: context.spec.norm.zero_centred,
        absent=False,
        flag=flag("--apply-layernorm-1p", switch, lost=True),
        build=Build.REFUSED,
    ),
    Argument(
        "layernorm_zero_centered_gamma",
        lambda context: context.spec.norm.zero_centred,
        absent=False,
        build=Build.REFUSED,
    ),
    Argument(
        "add_bias_linear",
        _all_biases,
        _read_biases,
        limit=_bias_limit,
        flag=flag("--disable-bias-linear", off_switch),
        build=Build.CONFIG,
    ),
    Argument(
        "add_qkv_bias",
        lambda context: context.value("qkv_bias", False),
        absent=False,
        flag=flag("--add-qkv-bias", switch),
        build=Build.CONFIG,
    ),
    Argument(
        "qk_layernorm",
        lambda context: bool(context.value("qk_norm")) or is_latent(context.spec),
        _read_head_norms,
        absent=False,
        limit=_head_norm_limit,
        flag=flag("--qk-layernorm", switch, lost=True),
        build=Build.CONFIG,
    ),
    # This project's own: Megatron-LM has no such norm.
    Argument(
        "qk_layernorm_over_heads",
        lambda context: context.value("qk_norm") == ALL_HEADS,
        absent=False,
        build=Build.REFUSED,
    ),
    only("qk_l2_norm", False, "queries and keys of length 1"),
    Argument(
        "untie_embeddings_and_output_weights",
        lambda context: not context.spec.tied,
        lambda args: {"tied": not args.get("untie_embeddings_and_output_weights", False)},
        flag=flag("--untie-embeddings-and-output-weights", switch),
        build=Build.MODEL,
    ),
    Argument(
        "window_size",
        _window_size,
        _read_window,
        limit=_window_limit,
        flag=flag("--window-size", joined, lost=True, since="0.15"),
        build=Build.CONFIG,
    ),
    Argument(
        "window_attn_skip_freq",
        _window_pattern,
        flag=flag("--window-attn-skip-freq", frequency, lost=True, since="0.15"),
        build=Build.OPTIONAL,
    ),
    only("softmax_type", "vanilla", "attention sinks"),
    only("apply_residual_connection_post_layernorm", False, "residuals taken after the norms", build=Build.OPTIONAL),
    only("heterogeneous_layers_config_path", None, "layers that differ in shape"),
    only("heterogeneous_layers_config_encoded_json", None, "layers that differ in shape"),
    only("softmax_scale", None, "another scale of attention scores"),
)
TRAINING = (
    said("attention_dropout", "attention_dropout", flag=flag("--attention-dropout", lost=True)),
    Argument("hidden_dropout", lambda _: 0.0, flag=flag("--hidden-dropout", lost=True)),
    said("init_method_std", "initializer_range", flag=flag("--init-method-std")),
    Argument("bf16", lambda c: c.spec.dtype.name == "bfloat16", flag=flag("--bf16", switch, lost=True)),
    Argument("fp16", lambda c: c.spec.dtype.name == "float16", flag=flag("--fp16", switch, lost=True)),
    Argument("params_dtype", lambda context: context.spec.dtype),
    Argument("apply_query_key_layer_scaling", lambda _: False, build=Build.REFUSED),
    Argument("attention_softmax_in_fp32", lambda _: False),
    Argument("use_legacy_models", lambda _: False, build=Build.REFUSED),
)

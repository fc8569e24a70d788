"""Arguments of every model: sizes, positions, activation, norms, biases, dtype.

Names: Megatron-LM core_v0.8.0 to core_v0.19.0, training/arguments.py and core/transformer/transformer_config.py.
"""

from __future__ import annotations

from typing import Any

from ...basics.errors import ConversionError, Unclear
from ...basics.quantities import count
from ...model.checks import number
from ...model.layers import (
    EACH_HEAD,
    LAYER_NORM,
    RMS_NORM,
    BlockExperts,
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
    is_latent,
    off_switch,
    only,
    said,
    switch,
)
from .rows_activation import ACTIVATION, LIVE_ONLY
from .rows_layers import LAYERS
from .rows_positions import MASK, WINDOWS

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


def _feed_limit(spec: ModelSpec) -> str:
    if not any(isinstance(kind.feed, BlockExperts) for kind in spec.used):
        return ""
    return "block experts (BlockFFN), which no release of it has; the code that trains them must read these names"


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
            f"layernorm_epsilon={args['layernorm_epsilon']}",
            "say which is right with --hf-config DIR",
            names,
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
    return {"qk_norm": EACH_HEAD if args.get("qk_layernorm") else ""}


_VANILLA, _LEARNABLE = "vanilla", "learnable"


def _read_softmax(args: Args) -> Properties:
    kind = args.get("softmax_type") or _VANILLA
    if kind not in (_VANILLA, _LEARNABLE):
        raise ConversionError(
            f"the checkpoint's args have softmax_type={kind!r}; only {_VANILLA!r} and {_LEARNABLE!r}, attention sinks that are "
            "trained, are supported"
        )
    return {"sinks": kind == _LEARNABLE}


def _sinks_limit(spec: ModelSpec) -> str:
    if not isinstance(spec.values.get("sinks"), PerLayer):
        return ""
    return "attention sinks in some layers alone: Megatron-LM's --softmax-type holds for every layer"


def _head_bias_limit(spec: ModelSpec) -> str:
    return f"a bias of the output layer: Megatron-LM's has none; {LIVE_ONLY}" if spec.head_bias else ""


def _label_limit(spec: ModelSpec) -> str:
    if not spec.num_labels:
        return ""
    return (
        f"a classifier's head of {count(spec.num_labels, 'row')} (score): Megatron-LM's output layer has one for each token; "
        "the code that trains it must build this one in its place, uncut and without padding, as verl does"
    )


SIZES = (
    said("num_layers", "num_layers", flag=flag("--num-layers"), build=Build.CONFIG),
    Argument("encoder_num_layers", lambda context: context.spec.num_layers),
    said("hidden_size", "hidden_size", flag=flag("--hidden-size"), build=Build.CONFIG),
    said("ffn_hidden_size", "ffn_hidden_size", limit=_feed_limit, flag=flag("--ffn-hidden-size"), build=Build.CONFIG),
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
        flag=flag("--num-query-groups", needs=("group_query_attention",)),
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
BLOCKS = (
    *ACTIVATION,
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
        build=Build.ENGINE,
        config="layernorm_zero_centered_gamma",
    ),
    Argument(
        "layernorm_zero_centered_gamma",
        lambda context: context.spec.norm.zero_centred,
        absent=False,
        build=Build.ENGINE,
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
        flag=flag("--qk-layernorm", switch, lost=True, runs_since="0.10"),
        build=Build.CONFIG,
    ),
    *LAYERS,
    # This project's own, and built by a class of its own.
    said("head_bias", "head_bias", absent=False, optional=True, limit=_head_bias_limit, build=Build.OWN),
    said("num_labels", "num_labels", optional=True, limit=_label_limit, build=Build.REFUSED),
    only("qk_l2_norm", False, "queries and keys of length 1"),
    Argument(
        "untie_embeddings_and_output_weights",
        lambda context: not context.spec.tied,
        lambda args: {"tied": not args.get("untie_embeddings_and_output_weights", False)},
        flag=flag("--untie-embeddings-and-output-weights", switch),
        build=Build.MODEL,
    ),
    *MASK,
    *WINDOWS,
    Argument(
        "softmax_type",
        lambda context: _LEARNABLE if context.value("sinks") else _VANILLA,
        _read_softmax,
        absent=_VANILLA,
        limit=_sinks_limit,
        flag=flag("--softmax-type", lost=True, default=_VANILLA, since="0.15"),
        build=Build.OPTIONAL,
    ),
    only("apply_residual_connection_post_layernorm", False, "residuals taken after the norms", build=Build.OPTIONAL),
    only("heterogeneous_layers_config_path", None, "layers that differ in shape"),
    only("heterogeneous_layers_config_encoded_json", None, "layers that differ in shape"),
    only("softmax_scale", None, "another scale of attention scores", build=Build.OPTIONAL),
    only("enable_mhc_connections", False, "hyper-connections instead of residuals", optional=True),
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

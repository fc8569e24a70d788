"""Arguments of multi-latent attention, gated DeltaNet, muP's multipliers, and multi-token prediction.

Names: Megatron-LM core_v0.12.0 to core_v0.19.0, training/arguments.py and core/transformer/transformer_config.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ...basics.errors import ConversionError
from ...model.checks import number
from ...model.spec import ModelSpec, Multipliers, PerLayer
from .argument import Args, Argument, Build, Context, Properties, flag, frequency, is_latent, switch
from .options import FUSED
from .rows_sparse import DSA, SINCE, is_sparse, read_sparse

_GATED_DELTA = "gated_delta_net"
_LATENT_DEFAULTS = {"kv_lora_rank": 32, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128}


def _latent(name: str) -> Argument:
    """Size of multi-latent attention, which only such models have."""

    def read(args: Args) -> Properties:
        return {name: args.get(name, _LATENT_DEFAULTS.get(name))} if args.get("multi_latent_attention") else {}

    return Argument(
        name,
        lambda context: context.value(name),
        read,
        written=is_latent,
        flag=flag("--" + name.replace("_", "-"), lost=True, since="0.12", needs=("multi_latent_attention",)),
        build=Build.CONFIG,
    )


LATENT = (
    Argument(
        "multi_latent_attention",
        lambda context: is_latent(context.spec),
        lambda args: {"mixer": "latent"} if args.get("multi_latent_attention") else {},
        absent=False,
        flag=flag("--multi-latent-attention", switch, lost=True, since="0.12"),
        build=Build.OPTIONAL,
    ),
    _latent("q_lora_rank"),
    *map(_latent, _LATENT_DEFAULTS),
    # Parsed from 0.17 on, but the rows of tensor-parallel ranks are told apart from 0.19 on alone.
    Argument(
        "mla_down_proj_fusion",
        lambda context: context.mla_layout == FUSED,
        written=is_latent,
        optional=True,
        absent=False,
        flag=flag("--mla-down-proj-fusion", switch, lost=True, since="0.19"),
        build=Build.REFUSED,
    ),
)


# -- gated DeltaNet


def _is_linear(context: Context) -> list[bool]:
    return [mixer == "gated delta" for mixer in context.per_layer("mixer")]


def _linear_frequency(context: Context) -> int | list[int] | None:
    """N where every N-th layer has full attention, else a list of 1 for each layer with linear attention."""
    linear = _is_linear(context)
    if not any(linear):
        return None
    first = [*linear, False].index(False) + 1
    every = [bool((layer + 1) % first) for layer in range(len(linear))]
    return first if every == linear else [int(each) for each in linear]


def _variant(context: Context) -> str | None:
    if is_sparse(context.spec):
        return DSA
    return _GATED_DELTA if any(_is_linear(context)) else None


def _read_variant(args: Args) -> Properties:
    variant, layers = args.get("experimental_attention_variant"), args["num_layers"]
    if variant is None:
        return {}
    if variant == DSA:
        return read_sparse(args)
    if variant != _GATED_DELTA:
        raise ConversionError(
            f"the checkpoint's args have experimental_attention_variant={variant!r}; only {_GATED_DELTA!r} and {DSA!r} are "
            "supported"
        )
    freq = args.get("linear_attention_freq")
    if isinstance(freq, int) and freq > 0:
        linear = [bool((layer + 1) % freq) for layer in range(layers)]
    elif isinstance(freq, list) and len(freq) == layers:
        linear = [bool(each) for each in freq]
    else:
        raise ConversionError(
            f"the checkpoint's args have linear_attention_freq={freq!r}; it must be a number or a list of {layers} values"
        )
    return {"mixer": PerLayer("gated delta" if each else "attention" for each in linear)}


def _linear(name: str) -> Argument:
    """Size of gated DeltaNet, which only such models have."""

    def read(args: Args) -> Properties:
        return {name: args.get(name)} if args.get("experimental_attention_variant") == _GATED_DELTA else {}

    return Argument(
        name,
        lambda context: context.value(name),
        read,
        optional=True,
        flag=flag("--" + name.replace("_", "-"), lost=True, since="0.16"),
        build=Build.ENGINE,
    )


GATED_DELTA = (
    Argument(
        "experimental_attention_variant",
        _variant,
        _read_variant,
        flag=flag("--experimental-attention-variant", lost=True, since="0.16", later={DSA: SINCE}),
        build=Build.ENGINE,
    ),
    Argument(
        "linear_attention_freq",
        _linear_frequency,
        optional=True,
        flag=flag("--linear-attention-freq", frequency, lost=True, since="0.16"),
        build=Build.ENGINE,
    ),
    *map(
        _linear,
        (
            "linear_conv_kernel_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_num_key_heads",
            "linear_num_value_heads",
        ),
    ),
    Argument(
        "attention_output_gate",
        lambda context: bool(context.value("attention_output_gate", False)),
        lambda args: {"attention_output_gate": bool(args.get("attention_output_gate", False))},
        absent=False,
        flag=flag("--attention-output-gate", switch, lost=True, since="0.16"),
        build=Build.OPTIONAL,
    ),
)


# -- muP


def _mup(name: str, write: Callable[[Context], Any], since: str = "0.17") -> Argument:
    """Multiplier of muP, which only models with multipliers have."""
    shown = flag("--" + name.replace("_", "-"), lost=True, since=since, needs=("use_mup",))
    return Argument(name, write, written=uses_mup, flag=shown, build=Build.REFUSED)


def uses_mup(spec: ModelSpec) -> bool:
    """Whether embeddings, attention scores or logits are scaled."""
    return spec.multipliers != Multipliers()


def _base_head_dim(context: Context) -> float:
    """Base b of the scale of scores, sqrt(b) / head size."""
    size, scale = context.value("kv_channels"), context.spec.multipliers.attention_multiplier
    return float(size) if scale is None else float((scale * size) ** 2)


def _read_mup(args: Args) -> Properties:
    if not args.get("use_mup"):
        return {}
    if args.get("mup_base_hidden_size") not in (None, args["hidden_size"]):
        raise ConversionError(
            f"the checkpoint's args have mup_base_hidden_size={args['mup_base_hidden_size']!r}; only the model's own size is "
            "supported"
        )
    size = args.get("kv_channels") or args["hidden_size"] // args["num_attention_heads"]
    usual = 1 / math.sqrt(size)
    base, power = args.get("mup_base_head_dim"), args.get("mup_attn_scale_power")
    top = number(1.0 if base is None else base, "mup_base_head_dim") ** 0.5
    scale = _whole_square(top / size ** number(1.0 if power is None else power, "mup_attn_scale_power"))
    return {
        "embedding_multiplier": number(args.get("mup_embedding_mult", 1.0), "mup_embedding_mult"),
        "logits_multiplier": number(args.get("mup_output_mult", 1.0), "mup_output_mult"),
        "attention_multiplier": None if math.isclose(scale, usual, rel_tol=1e-12) else scale,
    }


def _whole_square(scale: float) -> float:
    """Reciprocal root of a whole number where a scale differs from one by rounding alone (Gemma's query_pre_attn_scalar)."""
    square = scale**-2
    return round(square) ** -0.5 if square >= 1 and math.isclose(square, round(square), rel_tol=1e-12) else scale


MUP = (
    Argument(
        "use_mup",
        lambda context: uses_mup(context.spec),
        _read_mup,
        absent=False,
        flag=flag("--use-mup", switch, lost=True, since="0.17"),
        build=Build.REFUSED,
    ),
    _mup("mup_embedding_mult", lambda context: context.spec.multipliers.embedding_multiplier),
    _mup("mup_output_mult", lambda context: context.spec.multipliers.logits_multiplier),
    _mup("mup_base_head_dim", _base_head_dim),
    # The flag alone would change the scale of scores, so both of its parts are always said.
    _mup("mup_attn_scale_power", lambda _: 1.0),
)


# -- multi-token prediction

PREDICTION = (
    Argument(
        "mtp_num_layers",
        lambda context: len(context.spec.mtp) or None,
        lambda args: {"mtp_num_layers": args.get("mtp_num_layers") or 0},
        flag=flag("--mtp-num-layers", lost=True, since="0.12"),
        build=Build.OPTIONAL,
    ),
)

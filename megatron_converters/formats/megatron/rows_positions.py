"""Arguments of positions: kinds of position embeddings, rotary scaling, and sliding windows.

Names: Megatron-LM core_v0.8.0 to core_v0.19.0, training/arguments.py and core/transformer/transformer_config.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...basics.errors import ConversionError
from ...model.checks import number, whole
from ...model.layers import Layer
from ...model.rotary import RopeScaling
from ...model.spec import ModelSpec, PerLayer
from .argument import (
    Args,
    Argument,
    Build,
    Context,
    Properties,
    flag,
    frequency,
    is_latent,
    joined,
    said,
    switch,
)

#: Constants built into Megatron-LM's llama3 RoPE scaling (core/models/common/embeddings/rotary_pos_embedding.py).
MEGATRON_LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
ROPE, YARN, LEARNED, NO_POSITIONS = "rope", "yarn", "learned_absolute", "none"
_KINDS = (ROPE, YARN, LEARNED, NO_POSITIONS)


def scaling_of(spec: ModelSpec, kind: str) -> RopeScaling | None:
    """Rotary scaling of a model, if it is of this kind."""
    scaling = spec.values.get("rope_scaling")
    return scaling if isinstance(scaling, RopeScaling) and scaling.kind == kind else None


def plain_yarn(spec: ModelSpec) -> RopeScaling | None:
    """YaRN outside multi-latent attention, which has it in another way."""
    return None if is_latent(spec) else scaling_of(spec, YARN)


# -- positions


def _positions(context: Context) -> str:
    if context.spec.learned_positions:
        return LEARNED
    if not any(context.per_layer("rope")):
        return NO_POSITIONS
    return ROPE if plain_yarn(context.spec) is None else YARN


def _read_positions(args: Args) -> Properties:
    kind = args.get("position_embedding_type", ROPE)
    if args.get("use_rotary_position_embeddings"):  # the older spelling
        kind = ROPE
    latent = bool(args.get("multi_latent_attention"))  # whose YaRN is no kind of position embeddings
    if kind not in _KINDS or (kind == YARN and latent):
        *others, last = (repr(each) for each in _KINDS if not (each == YARN and latent))
        raise ConversionError(
            f"the checkpoint's args have position_embedding_type={kind!r}; only {', '.join(others)} and {last} are supported"
        )
    rotates = kind in (ROPE, YARN)
    skipped = _without_rope(args) if rotates else ()
    layers = args["num_layers"]
    rope: Any = rotates
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


def _prediction_limit(flag_name: str, what: str, has: Callable[[Layer], bool]) -> Callable[[ModelSpec], str]:
    """Limit of a list of layers: layer k of multi-token prediction has what the list says of layer k.

    So it is from 0.17 on (core/transformer/multi_token_prediction.py, `layer_number`); 0.16 looks beyond the list and fails.
    """

    def limit(spec: ModelSpec) -> str:
        listed = [has(spec.layer(number)) for number in range(spec.num_layers)]
        predicting = [has(spec.kinds[number]) for number in spec.mtp]
        if len({*listed}) == 1 or listed[: len(predicting)] == predicting:
            return ""
        return (
            f"multi-token prediction, whose layers differ in their {what} from the model's first: Megatron-LM's {flag_name} says "
            "one for both"
        )

    return limit


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
    linear = None if linear == 1 else linear  # positions divided by 1
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


def _longrope_limit(spec: ModelSpec) -> str:
    """LongRoPE is nothing only where all its factors are 1: no release has a flag or a class for it."""
    scaling = scaling_of(spec, "longrope")
    if scaling is None or ({*scaling.short_factor, *scaling.long_factor} <= {1.0} and scaling.amplitude == 1):
        return ""
    beyond = "" if scaling.short_factor == scaling.long_factor else ", which differ beyond the original positions"
    amplitude = (
        "" if scaling.amplitude == 1 else f", and rotated queries and keys are multiplied by {scaling.amplitude:g}"
    )
    return (
        f"LongRoPE: each rotary frequency has a divisor of its own{beyond}{amplitude}. No release of Megatron-LM has a flag for "
        "it; divide rotary_pos_emb.inv_freq by the factors in your model provider"
    )


def _base(context: Context) -> Any:
    """Base of rotary embeddings: the greatest where layers differ (`rows_providers.py` has the others)."""
    return whole(max((base for base in context.per_layer("rotary_base") if base is not None), default=10000))


def _base_limit(spec: ModelSpec) -> str:
    base = spec.values.get("rotary_base")
    if base is None or not any(spec.in_layers("rope")):
        return ""
    if isinstance(base, PerLayer):
        return "a rotary base of its own for some layers: Megatron-LM's --rotary-base holds for every layer"
    if not float(base).is_integer():
        return f"a rotary base of {base}: Megatron-LM's --rotary-base is a whole number"
    return ""


def _mask_limit(spec: ModelSpec) -> str:
    return (
        ""
        if spec.causal
        else "attention to later tokens (is_causal false): its GPTModel hides them (AttnMaskType.causal)"
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
_LLAMA3_FACTOR = "pass rope_scaling_factor to GPTModel in your model provider"

POSITIONS = (
    Argument(
        "position_embedding_type",
        _positions,
        _read_positions,
        absent=ROPE,
        limit=_longrope_limit,
        flag=flag("--position-embedding-type"),
        build=Build.MODEL,
    ),
    Argument("add_position_embedding", lambda _: True),
    Argument("use_rotary_position_embeddings", lambda _: False),
    Argument(
        "rotary_base",
        _base,
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
        limit=_prediction_limit("--no-rope-freq", "rotary embeddings", lambda layer: layer.without_rope),
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
        # gpt_builders.py, before 0.16 pretrain_gpt.py, and training/argument_utils.py of 0.19 pass --use-rope-scaling alone.
        flag=flag(
            "--rope-scaling-factor",
            lost=True,
            default=MEGATRON_LLAMA3.factor,
            since="0.11",
            needs=("use_rope_scaling",),
            built_as=MEGATRON_LLAMA3.factor,
            instead=_LLAMA3_FACTOR,
        ),
        build=Build.MODEL,
    ),
    Argument(
        "rotary_seq_len_interpolation_factor",
        lambda context: whole(_scaled_by("linear", None)(context)),
        neutral=(1,),
        limit=_linear_limit,
        flag=flag("--rotary-seq-len-interpolation-factor", lost=True, effective_since="0.19", instead=_INTERPOLATION),
        build=Build.MODEL,
    ),
)
MASK = (
    # No argument sets it: the layers' specs of GPTModel name the mask.
    Argument("attn_mask_type", written=lambda _: False, limit=_mask_limit),
)
WINDOWS = (
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
        limit=_prediction_limit("--window-attn-skip-freq", "sliding window", lambda layer: layer.window is not None),
        flag=flag("--window-attn-skip-freq", frequency, lost=True, since="0.15"),
        build=Build.OPTIONAL,
    ),
)

"""Arguments of MindSpeed-LLM, which scales activations by constants of its own and has LongRoPE and llama3 RoPE scaling of any
constants. Megatron-LM has none of them.

They are written where a checkpoint's weights are left unscaled (`--mup raw`). Names: MindSpeed-LLM 2.0, its arguments for MiniCPM,
and features_manager/common/rotary.py of 2.3.
"""

from __future__ import annotations

import math
from typing import Any

from ...basics.errors import ConversionError
from ...model.checks import check_size, number, whole
from ...model.rotary import RopeScaling
from ...model.spec import ModelSpec
from .argument import Args, Argument, Build, Properties, flag

SCALING_TYPE = "rope_scaling_type"
_LONGROPE, _LLAMA3 = "longrope", "llama3"
#: Arguments of llama3 RoPE scaling, read without defaults in core/models/common/embeddings/rotary_pos_embedding.py.
_LLAMA3_ARGUMENTS = ("rope_scaling_factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _never(_: ModelSpec) -> bool:
    """Whether the model alone decides to write it: the conventions of its checkpoint do (`conventions.py`)."""
    return False


def _row(name: str, **more: Any) -> Argument:
    shown = flag("--" + name.replace("_", "-"), lost=True)
    return Argument(name, written=_never, flag=shown, build=Build.REFUSED, **more)


def _read_scales(args: Args) -> Properties:
    """Scales of embeddings, of blocks' outputs and of logits; each does nothing where it is absent."""
    names = ("scale_emb", "scale_depth", "dim_model_base")
    embedding, depth, base = (None if args.get(name) is None else number(args[name], name) for name in names)
    found: Properties = {}
    if embedding is not None:
        found["embedding_multiplier"] = embedding
    if depth is not None:
        found["residual_multiplier"] = depth / math.sqrt(args["num_layers"])
    if base is not None:
        found["logits_multiplier"] = base / args["hidden_size"]
    return found


def _read_scaling(args: Args) -> Properties:
    """Scaling of the kinds that are read; other kinds are refused as what may change the model (`foreign_args.py`)."""
    kind = args.get(SCALING_TYPE)
    if kind == _LLAMA3:
        return {"rope_scaling": _llama3(args)}
    if kind != _LONGROPE:
        return {}
    name = "rope_scaling_original_max_position_embeddings"
    original = check_size(args.get(name), name)
    factor = args["max_position_embeddings"] / original
    short, long = (_numbers(args, name) for name in ("short_factor", "long_factor"))
    scaling = RopeScaling(kind, factor, original_max_position_embeddings=original, short_factor=short, long_factor=long)
    return {"rope_scaling": scaling}


def says_kind(value: Any) -> bool:
    """Whether a kind of scaling is read, or none."""
    return value in (None, _LONGROPE, _LLAMA3)


def _llama3(args: Args) -> RopeScaling:
    factor, low, high, original = (number(args.get(name), name) for name in _LLAMA3_ARGUMENTS)
    return RopeScaling(_LLAMA3, factor, low, high, check_size(whole(original), _LLAMA3_ARGUMENTS[-1]))


def _numbers(args: Args, name: str) -> tuple[float, ...]:
    """Numbers that are joined by commas, or, once MindSpeed-LLM has split them, a list."""
    value = args.get(name)
    try:
        return tuple(float(part) for part in (value if isinstance(value, list) else str(value).split(",")))
    except (ValueError, TypeError):
        raise ConversionError(
            f"the checkpoint's args have {name}={value!r:.80}; it must be numbers that are joined by commas"
        ) from None


MINDSPEED = (
    _row("scale_emb", read=_read_scales),
    _row("scale_depth"),
    _row("dim_model_base"),
    _row(SCALING_TYPE, read=_read_scaling),
    _row("short_factor"),
    _row("long_factor"),
    _row("rope_scaling_original_max_position_embeddings"),
    _row("low_freq_factor"),
    _row("high_freq_factor"),
    _row("original_max_position_embeddings"),
)

"""Arguments of MindSpeed-LLM, which scales activations by constants of its own and has LongRoPE. Megatron-LM has none of them.

They are written where a checkpoint's weights are left unscaled (`--mup raw`). Names: MindSpeed-LLM 2.0, its arguments for MiniCPM.
"""

from __future__ import annotations

import math
from typing import Any

from ...basics.errors import ConversionError
from ...model.layers import RopeScaling, check_size, number
from ...model.spec import ModelSpec
from .argument import Args, Argument, Build, Properties, flag

_LONGROPE = "longrope"


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


def _read_long_rope(args: Args) -> Properties:
    kind = args.get("rope_scaling_type")
    if kind is None:
        return {}
    if kind != _LONGROPE:
        raise ConversionError(f"the checkpoint's args have rope_scaling_type={kind!r}; only {_LONGROPE!r} is supported")
    name = "rope_scaling_original_max_position_embeddings"
    original = check_size(args.get(name), name)
    factor = args["max_position_embeddings"] / original
    short, long = (_numbers(args, name) for name in ("short_factor", "long_factor"))
    scaling = RopeScaling(kind, factor, original_max_position_embeddings=original, short_factor=short, long_factor=long)
    return {"rope_scaling": scaling}


def _numbers(args: Args, name: str) -> tuple[float, ...]:
    """Numbers that are joined by commas."""
    value = args.get(name)
    try:
        return tuple(float(part) for part in str(value).split(","))
    except ValueError:
        raise ConversionError(
            f"the checkpoint's args have {name}={value!r:.80}; it must be numbers that are joined by commas"
        ) from None


MINDSPEED = (
    _row("scale_emb", read=_read_scales),
    _row("scale_depth"),
    _row("dim_model_base"),
    _row("rope_scaling_type", read=_read_long_rope),
    _row("short_factor"),
    _row("long_factor"),
    _row("rope_scaling_original_max_position_embeddings"),
)

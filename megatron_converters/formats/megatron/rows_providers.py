"""Arguments for what Megatron-Bridge's providers compute and no release of Megatron-LM has: soft caps, and a rope for each layer.

The names of the caps are those of Bridge's Gemma2ModelProvider; `rotary_bases` and `rotary_scaled` are this project's own.
"""

from __future__ import annotations

from typing import Any

from ...basics.errors import ConversionError
from ...model.checks import number
from ...model.rotary import RopeScaling
from ...model.spec import ModelSpec, PerLayer
from .argument import Args, Argument, Build, Context, Properties, said

_PROVIDER = "Megatron-Bridge's providers compute it, or a class in your model provider"


def _cap_limit(field: str, what: str) -> Any:
    def limit(spec: ModelSpec) -> str:
        cap = spec.values.get(field)
        cap = next((each for each in cap if each is not None), None) if isinstance(cap, PerLayer) else cap
        return "" if cap is None else f"{what} capped softly at {cap:g}: no release has such a cap; {_PROVIDER}"

    return limit


def _each(context: Context, name: str) -> list[Any] | None:
    """Values of a property in the layers; None where one holds for all that have it."""
    value = context.spec.values.get(name)
    return list(value) if isinstance(value, PerLayer) else None


def _listed(args: Args, name: str) -> list[Any] | None:
    """List of a value for each layer; None where args have none."""
    values, layers = args.get(name), args["num_layers"]
    if values is None:
        return None
    if not isinstance(values, (list, tuple)) or len(values) != layers:
        raise ConversionError(f"the checkpoint's args have {name}={values!r}; it must be a list of {layers} values")
    return list(values)


def _read_bases(args: Args) -> Properties:
    bases = _listed(args, "rotary_bases")
    if bases is None:
        return {}
    return {"rotary_base": PerLayer(None if base is None else number(base, "rotary_bases") for base in bases)}


def _scaled(context: Context) -> list[Any] | None:
    """Which layers have rotary scaling, and the factor; None where one scaling holds for all."""
    scalings = _each(context, "rope_scaling")
    return None if scalings is None else [None if each is None else each.factor for each in scalings]


def _read_scaled(args: Args) -> Properties:
    factors = _listed(args, "rotary_scaled")
    if factors is None:
        return {}
    return {
        "rope_scaling": PerLayer(
            None if factor is None else RopeScaling("linear", number(factor, "rotary_scaled")) for factor in factors
        )
    }


def _scaled_limit(spec: ModelSpec) -> str:
    value = spec.values.get("rope_scaling")
    if not isinstance(value, PerLayer):
        return ""
    kinds = "; ".join(dict.fromkeys(str(scaling) for scaling in value if scaling is not None))
    return f"rotary scaling on some layers alone ({kinds}): Megatron-LM scales those of all layers; {_PROVIDER}"


CAPS = (
    said(
        *("attn_logit_softcapping", "attn_logit_softcapping"),
        optional=True,
        limit=_cap_limit("attn_logit_softcapping", "attention scores"),
        build=Build.REFUSED,
    ),
    said(
        *("final_logit_softcapping", "final_logit_softcapping"),
        optional=True,
        limit=_cap_limit("final_logit_softcapping", "logits"),
        build=Build.REFUSED,
    ),
)
LAYER_ROPES = (
    Argument(
        "rotary_bases",
        lambda context: _each(context, "rotary_base"),
        _read_bases,
        optional=True,
        build=Build.REFUSED,
    ),
    Argument("rotary_scaled", _scaled, _read_scaled, optional=True, limit=_scaled_limit, build=Build.REFUSED),
)

"""Arguments of YaRN: as multi-latent attention has it, and outside of that (`--position-embedding-type yarn`).

Names: Megatron-LM core_v0.12.0 to core_v0.19.0, training/arguments.py, and from 0.19 on `_apply_yarn_config_from_args` in
training/argument_utils.py. 0.18 knows the kind of position embeddings, but sets none of its parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ...basics.errors import ConversionError
from ...model.checks import number
from ...model.rotary import RopeScaling
from ...model.spec import ModelSpec
from .argument import Args, Argument, Build, Context, Properties, flag, is_latent, off_switch
from .rows_positions import YARN, plain_yarn, scaling_of

#: YaRN of multi-latent attention in Megatron-LM, which no flag sets (core/transformer/transformer_config.py).
_BETA_FAST, _BETA_SLOW, _ORIGINAL = 32.0, 1.0, 4096
#: Attribute that only YaRN outside multi-latent attention has.
_ELSEWHERE = "yarn_original_max_position_embeddings"
_SINCE = "0.19"


def has_yarn(spec: ModelSpec) -> bool:
    """Whether arguments of YaRN are written: always for multi-latent attention, for which they say that there is none."""
    return is_latent(spec) or plain_yarn(spec) is not None


# -- both


def _mscale(factor: float, mscale: float) -> float:
    """`_yarn_get_mscale` of Megatron-LM, and of transformers."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _factors(spec: ModelSpec) -> tuple[float, float, float]:
    """Values of `rotary_scaling_factor`, `mscale` and `mscale_all_dim`; those of plain rotary embeddings where there is no YaRN.

    transformers' classes other than those of multi-latent attention heed both mscales or neither, and an attention factor of
    its own before these; Megatron-LM has the ratio of two mscales in every case.
    """
    scaling = scaling_of(spec, YARN)
    if scaling is None:
        return 1.0, 1.0, 0.0
    factor, mscale, every, amplitude = scaling.factor, scaling.mscale, scaling.mscale_all_dim, scaling.attention_factor
    if is_latent(spec):
        return factor, mscale, every
    if amplitude is not None and factor > 1:
        return factor, (amplitude - 1) / (0.1 * math.log(factor)), 0.0
    return (factor, mscale, every) if mscale and every else (factor, 1.0, 0.0)


def _read_scaling(args: Args) -> Properties:
    if args.get("multi_latent_attention"):
        return {"rope_scaling": None} if args.get("rope_type") == "rope" else _scaling(args, _of_latent)
    if args.get("position_embedding_type") != YARN:
        return {}
    if args.get("rotary_scaling_factor") is None:
        raise ConversionError(
            f"the checkpoint's args have position_embedding_type={YARN!r} without rotary_scaling_factor, by which positions are "
            "scaled; give a reference model with --hf-config DIR"
        )
    return _scaling(args, _of_others)


def _scaling(args: Args, kind: Callable[[Args, float], dict[str, Any]]) -> Properties:
    """YaRN as args have it; a factor of 1 changes nothing."""
    factor = number(args.get("rotary_scaling_factor") or 1.0, "rotary_scaling_factor")
    return {"rope_scaling": None if factor == 1.0 else RopeScaling(YARN, factor, **kind(args, factor))}


def _of_latent(args: Args, _: float) -> dict[str, Any]:
    """Fields of multi-latent attention. Args of Megatron-LM do not have the first three; a recorded configuration does."""
    return {
        "original_max_position_embeddings": int(_given(args, "original_max_position_embeddings", _ORIGINAL)),
        "beta_fast": _given(args, "beta_fast", _BETA_FAST),
        "beta_slow": _given(args, "beta_slow", _BETA_SLOW),
        "mscale": _given(args, "mscale", 1.0),
        "mscale_all_dim": _given(args, "mscale_all_dim", 0.0),
    }


def _of_others(args: Args, factor: float) -> dict[str, Any]:
    """Fields of other attention; two mscales that transformers would not heed are an attention factor."""
    mscale, every = _given(args, "mscale", 1.0), _given(args, "mscale_all_dim", 0.0)
    amplitude = {"attention_factor": _mscale(factor, mscale) / _mscale(factor, every)}
    usual = (mscale, every) == (1.0, 0.0)
    truncate = args.get("yarn_correction_range_round_to_int")
    return {
        "original_max_position_embeddings": int(_given(args, _ELSEWHERE, _ORIGINAL)),
        "beta_fast": _given(args, "yarn_beta_fast", _BETA_FAST),
        "beta_slow": _given(args, "yarn_beta_slow", _BETA_SLOW),
        "truncate": truncate is None or bool(truncate),
        **({} if usual else {"mscale": mscale, "mscale_all_dim": every} if mscale and every else amplitude),
    }


def _given(args: Args, name: str, absent: float) -> float:
    value = args.get(name)
    return number(absent if value is None else value, name)


# -- what cannot be said


def _limit(spec: ModelSpec) -> str:
    scaling = scaling_of(spec, YARN)
    if scaling is None:
        return _other_scaling_limit(spec)
    return _latent_limit(scaling) if is_latent(spec) else _plain_limit(spec, scaling)


def _other_scaling_limit(spec: ModelSpec) -> str:
    """Scaling that multi-latent attention does not heed: its embedding is built without (`MultiLatentAttention.__init__`)."""
    found = next(filter(None, (scaling_of(spec, kind) for kind in ("linear", "llama3"))), None)
    if found is None or not is_latent(spec):
        return ""
    return f"{found.kind} RoPE scaling by {found.factor:g} in multi-latent attention, which knows YaRN alone"


def _latent_limit(scaling: RopeScaling) -> str:
    if scaling.attention_factor is not None:
        return f"YaRN with an attention factor of its own, {scaling.attention_factor:g}, in multi-latent attention"
    if not scaling.truncate:
        return "YaRN without truncation in multi-latent attention"
    held = scaling.beta_fast, scaling.beta_slow, scaling.original_max_position_embeddings
    if held == (_BETA_FAST, _BETA_SLOW, _ORIGINAL):
        return ""
    return (
        f"YaRN with beta_fast, beta_slow and original_max_position_embeddings of {held[0]:g}, {held[1]:g} and {held[2]}: "
        f"Megatron-LM has {_BETA_FAST:g}, {_BETA_SLOW:g} and {_ORIGINAL} built in for multi-latent attention"
    )


def _plain_limit(spec: ModelSpec, scaling: RopeScaling) -> str:
    """What Megatron-LM has YaRN not with (YarnRotaryEmbedding, and `validate_args` of training/arguments.py)."""
    lacking = [
        *(["in heads that rotate in part"] if spec.values["rotary_percent"] != 1 else []),
        *(["with interleaved rotary embeddings"] if spec.values["rotary_interleaved"] else []),
        *(["with multi-token prediction, which --without-mtp leaves out"] if spec.mtp else []),
        *(
            [f"by {scaling.factor:g} with an attention factor, {scaling.attention_factor:g}"]
            if scaling.attention_factor not in (None, 1.0) and scaling.factor <= 1
            else []
        ),
    ]
    return f"YaRN {' and '.join(lacking)}: its --position-embedding-type yarn does not have that" if lacking else ""


# -- rows


def _plain(field: str) -> Callable[[Context], Any]:
    """Writer of a field of YaRN outside multi-latent attention."""

    def write(context: Context) -> Any:
        scaling = plain_yarn(context.spec)
        return None if scaling is None else getattr(scaling, field)

    return write


def _factor(number: int) -> Callable[[Context], Any]:
    return lambda context: _factors(context.spec)[number]


def _has_plain(spec: ModelSpec) -> bool:
    return plain_yarn(spec) is not None


YARN_ROWS = (
    Argument(
        "rope_type",
        lambda context: "rope" if scaling_of(context.spec, YARN) is None else YARN,
        _read_scaling,
        written=is_latent,
        limit=_limit,
        flag=flag("--rope-type", lost=True, since="0.14", implied="rope"),
        build=Build.CONFIG,
    ),
    *(
        Argument(
            attribute,
            _factor(number),
            written=has_yarn,
            flag=flag(
                "--" + attribute.replace("_", "-"),
                lost=True,
                since="0.12",
                needs=("multi_latent_attention", _ELSEWHERE),
            ),
            build=Build.CONFIG,
        )
        for number, attribute in enumerate(("rotary_scaling_factor", "mscale", "mscale_all_dim"))
    ),
    *(
        Argument(
            attribute,
            _plain(field),
            written=_has_plain,
            flag=flag("--" + attribute.replace("_", "-"), lost=True, since=_SINCE),
            build=Build.USED,
        )
        for attribute, field in (
            (_ELSEWHERE, "original_max_position_embeddings"),
            ("yarn_beta_fast", "beta_fast"),
            ("yarn_beta_slow", "beta_slow"),
        )
    ),
    Argument(
        "yarn_correction_range_round_to_int",
        _plain("truncate"),
        written=_has_plain,
        absent=True,
        neutral=(None,),
        flag=flag("--no-yarn-correction-range-round-to-int", off_switch, lost=True, since=_SINCE),
        build=Build.USED,
    ),
)

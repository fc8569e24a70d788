"""Argument of ms-swift (Megatron-SWIFT), which takes RoPE scaling in Hugging Face's words from config.json.

Source: ms-swift v3.5.0 to v3.10.0, swift/megatron/argument/megatron_args.py and swift/megatron/model/gpt_model.py.
"""

from __future__ import annotations

from typing import Any

from ...basics.errors import ConversionError
from ...families.rules_attention import LINEAR, LLAMA3, Rope
from .argument import Args, Argument, Build, Properties

ROPE_SCALING = "rope_scaling"
_RULE = Rope(scalings=(LINEAR, LLAMA3))


def says_scaling(value: Any) -> bool:
    """Whether a value of the argument is a kind of scaling that is read; others are refused as what may change the model."""
    return bool(_read({ROPE_SCALING: value})) if isinstance(value, dict) and value else not value


def _read(args: Args) -> Properties:
    value = args.get(ROPE_SCALING)
    if not isinstance(value, dict) or not value:
        return {}
    try:
        return {"rope_scaling": _RULE.read({"rope_scaling": value})["rope_scaling"]}
    except ConversionError:
        return {}


SWIFT = (Argument(ROPE_SCALING, read=_read, written=lambda _: False, build=Build.REFUSED),)

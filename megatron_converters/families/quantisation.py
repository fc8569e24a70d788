"""Quantised weights as config.json describes them: FP8 in blocks with a scale each is the one kind that can be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..basics.errors import ConversionError, one_line

#: Key of config.json for it.
KEY = "quantization_config"
_BLOCKS = "weight_block_size"
#: Values that each key may have; any value where None is listed. A key that is absent or null means the same as the first value
#: (DeepSeek-V3's config.json; transformers 5.23, utils/quantization_config.py, FineGrainedFP8Config).
_ADMITTED: Mapping[str, tuple[Any, ...] | None] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3", "float8_e4m3fn"),
    _BLOCKS: None,
    "activation_scheme": ("dynamic",),  # of a forward pass; "static" comes with tensors of its own
    "scale_fmt": ("float", "ue8m0"),  # each scale tensor's dtype says so, too
    "expert_dtype": ("fp8",),
    "modules_to_not_convert": None,  # the tensors themselves tell
    "modules_to_convert": None,
    "ignored_layers": None,
    "dequantize": None,  # what transformers does when it loads the weights
}


def unquantised(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the model once its weights are decoded."""
    return {key: value for key, value in config.items() if key != KEY}


def block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block of FP8 weights with one scale; None for a model that is not quantised.

    Raises `ConversionError` for any other quantisation.
    """
    described = config.get(KEY)
    if not described:
        return None
    if not isinstance(described, Mapping):
        raise ConversionError(f"config.json has {KEY}={one_line(described)}; it must be an object")
    others = [
        f"{key}={one_line(value)}"
        for key, value in {"quant_method": None, **described}.items()
        if key not in _ADMITTED or (value is None and key == "quant_method") or not _is_admitted(value, _ADMITTED[key])
    ]
    if others:
        raise ConversionError(
            f"config.json has a {KEY} with {', '.join(others)}; only FP8 with block scales can be read (quant_method fp8, fmt "
            "e4m3, weight_block_size): convert the unquantised model instead"
        )
    block = described.get(_BLOCKS)
    if not isinstance(block, list) or len(block) != 2 or not all(type(side) is int and side > 0 for side in block):
        raise ConversionError(
            f"config.json has a {KEY} with {_BLOCKS}={one_line(block)} instead of the rows and columns of a block; FP8 with one "
            "scale for a tensor or a channel cannot be read: convert the unquantised model instead"
        )
    return block[0], block[1]


def _is_admitted(value: Any, known: tuple[Any, ...] | None) -> bool:
    return known is None or value is None or value in known

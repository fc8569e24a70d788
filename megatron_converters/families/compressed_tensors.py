"""Weights that compressed-tensors stores (LLM Compressor, vLLM): rows of its formats and strategies.

Source: compressed-tensors 0.20 (quantization/quant_config.py, quant_scheme.py, quant_args.py, and compressors/).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..basics.errors import ConversionError, one_line
from .quantisation_schemes import EXPONENTS, FLOATS, Scheme, micro_scaled, packed_integers, scaled_blocks, unadmitted

#: `quant_method` of it.
METHOD = "compressed-tensors"
#: Values of the settings of all weights: which weights are quantised the tensors tell, and activations are none.
ADMITTED: Mapping[str, tuple[Any, ...] | None] = {
    "config_groups": None,
    "format": None,
    "ignore": None,
    "kv_cache_scheme": None,
    "quantization_status": None,
    "global_compression_ratio": None,
    "version": None,
    "sparsity_config": ({"format": "dense"},),
}
_WEIGHT, _PACKED, _SCALE, _SHAPE = ".weight", ".weight_packed", (".weight_scale",), ".weight_shape"


class _Kind(NamedTuple):
    """Kind of numbers that weights are: their bits, and whether they are integers ("int") or not ("float")."""

    bits: int
    type: str


def _bytes(kind: str, scales: tuple[str, ...], block: tuple[int, int]) -> Scheme:
    code = "float8_e4m3fn" if kind == "float" else "int8"
    return Scheme(_WEIGHT, _WEIGHT, (code,), _SCALE, scales, scaled_blocks(block))


def _whole(kind: str, weights: Mapping[str, Any]) -> Scheme:
    return _bytes(kind, FLOATS, (0, 0))


def _by_row(kind: str, weights: Mapping[str, Any]) -> Scheme:
    return _bytes(kind, FLOATS, (1, 0))


def _by_group(kind: str, weights: Mapping[str, Any]) -> Scheme:
    return _bytes(kind, FLOATS, (1, _group(weights)))


def _by_block(kind: str, weights: Mapping[str, Any]) -> Scheme:
    block = weights.get("block_structure")
    if not isinstance(block, list) or len(block) != 2 or not all(type(side) is int and side > 0 for side in block):
        raise ConversionError(
            f"config.json has block_structure={one_line(block)} instead of the rows and columns of a block"
        )
    return _bytes(kind, FLOATS, (block[0], block[1]))


def _mx_bytes(kind: str, weights: Mapping[str, Any]) -> Scheme:
    return _bytes(kind, EXPONENTS, (1, _group(weights)))


def _integers(kind: str, weights: Mapping[str, Any]) -> Scheme:
    group = _group(weights) if _strategy(weights) == "group" else 0
    return Scheme(_WEIGHT, _PACKED, ("int32",), _SCALE, FLOATS, packed_integers(group), _SHAPE)


def _mx_packed(kind: str, weights: Mapping[str, Any]) -> Scheme:
    return Scheme(_WEIGHT, _PACKED, ("uint8",), _SCALE, EXPONENTS, micro_scaled)


_OF_BYTES = {"tensor": _whole, "channel": _by_row, "group": _by_group, "block": _by_block}
#: Schemes by `format`, kind of numbers and `strategy`.
_FORMATS: Mapping[str, Mapping[_Kind, Mapping[str, Callable[[str, Mapping[str, Any]], Scheme]]]] = {
    "float-quantized": {_Kind(8, "float"): _OF_BYTES},
    "int-quantized": {_Kind(8, "int"): _OF_BYTES},
    "naive-quantized": {_Kind(8, "float"): _OF_BYTES, _Kind(8, "int"): _OF_BYTES},
    "pack-quantized": {_Kind(4, "int"): {"group": _integers, "channel": _integers}},
    "mxfp4-pack-quantized": {_Kind(4, "float"): {"group": _mx_packed}},
    "mxfp8-quantized": {_Kind(8, "float"): {"group": _mx_bytes}},
}
#: Values of a group's settings of its weights.
_OF_WEIGHTS: Mapping[str, tuple[Any, ...] | None] = {
    "symmetric": (True,),
    "dynamic": (False,),
    "actorder": ("weight", "static", False),  # an order that calibration alone has
    **dict.fromkeys(("num_bits", "type", "strategy", "group_size", "block_structure")),
    **dict.fromkeys(
        ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    ),  # how scales were found, and their type
}


def scheme(described: Mapping[str, Any]) -> Scheme:
    """How the weights of all groups are stored; raises `ConversionError` for what cannot be read."""
    groups = described.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise _refusal(f"config_groups={one_line(groups)}")
    found = {name: group for name, group in groups.items() if group.get("weights") is not None}
    distinct: list[tuple[Any, Mapping[str, Any]]] = []
    for name, group in found.items():
        weights = group["weights"]
        if not isinstance(weights, Mapping):
            raise _refusal(f"weights={one_line(weights)} in {one_line(name)}")
        others = list(unadmitted(weights, _OF_WEIGHTS))
        if others:
            raise _refusal(f"{', '.join(others)} in {one_line(name)}")
        stored = group.get("format") or described.get("format"), _kind(weights), _strategy(weights)
        sizes = weights.get("group_size"), weights.get("block_structure")
        if (stored, sizes) not in [known for known, _ in distinct]:
            distinct.append(((stored, sizes), weights))
    if len(distinct) != 1:
        raise _refusal(f"{len(distinct)} ways to store weights in its groups instead of one")
    ((form, kind, strategy), _), weights = distinct[0]
    make = _FORMATS.get(str(form), {}).get(kind, {}).get(strategy)
    if make is None:
        raise _refusal(f"format={one_line(form)}, num_bits={kind.bits}, type={kind.type}, strategy={strategy}")
    return make(kind.type, weights)


def _kind(weights: Mapping[str, Any]) -> _Kind:
    return _Kind(weights.get("num_bits", 8), str(weights.get("type", "int")).lower())


def _strategy(weights: Mapping[str, Any]) -> str:
    """What shares a scale, which follows from the size of groups where it is not said."""
    group = weights.get("group_size")
    absent = "tensor" if group is None else "channel" if group == -1 else "group"
    return str(weights.get("strategy") or absent).lower()


def _group(weights: Mapping[str, Any]) -> int:
    size = weights.get("group_size")
    if type(size) is not int or size < 1 or size % 2:
        raise _refusal(f"group_size={one_line(size)}")
    return size


def _refusal(what: str) -> ConversionError:
    return ConversionError(
        f"config.json says that the weights are quantised by {METHOD} (LLM Compressor) with {what}, which cannot be read; convert "
        "the unquantised model instead"
    )

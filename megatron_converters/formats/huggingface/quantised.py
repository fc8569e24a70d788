"""Quantised weights of a Hugging Face folder: each pair of codes and scales as one tensor that is decoded as it is read.

Names: DeepSeek-V3 and transformers' FineGrainedFP8 (`X.weight`, `X.weight_scale_inv`). Despite its name the scale is what a code is
multiplied by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...basics.errors import raise_all
from ...basics.quantities import count
from ...families.quantisation import block_size, refuse_packed
from ...storage.decoding import CODES, SCALES, ScaledBlocks, block_counts
from ...storage.tensor import StoredTensor

#: Tensor of a folder: as it is stored, or decoded from several stored ones.
Weight = StoredTensor | ScaledBlocks
_SUFFIX = "_scale_inv"


def decoded(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> dict[str, Weight]:
    """Tensors with each quantised one in place of its codes and scales, as `quantization_config` of config.json describes it.

    Raises `ConversionError` for a quantisation that cannot be read, and for codes and scales that do not belong together.
    """
    block = block_size(config)
    if block is None:
        beside = folder.iterdir() if folder.is_dir() else ()
        refuse_packed(str(folder), tensors, sorted(path.name for path in beside))
        return dict(tensors)
    problems: list[str] = []
    found: dict[str, Weight] = {}
    for name, data in tensors.items():
        if name.endswith(_SUFFIX):
            problems += _scale_faults(name, tensors.get(name.removesuffix(_SUFFIX)))
        elif data.dtype.name != CODES:
            found[name] = data
        else:
            scale = tensors.get(name + _SUFFIX)
            faults = list(_pair_faults(name, data, scale, block))
            problems += faults
            if scale is not None and not faults:
                found[name] = ScaledBlocks(name, data, name + _SUFFIX, scale, block)
    raise_all(
        f"{folder}: the quantised tensors and their scales do not belong together:",
        problems,
        remedy="copy the folder again",
    )
    return found


def decoded_note(tensors: Mapping[str, Weight]) -> list[str]:
    """Note for the user on tensors that are decoded, if there are any."""
    quantised = [data for data in tensors.values() if isinstance(data, ScaledBlocks)]
    if not quantised:
        return []
    return [f"{count(len(quantised), 'tensor')}: {quantised[0].computed}, rounded to {quantised[0].dtype}"]


def _scale_faults(name: str, weight: StoredTensor | None) -> Iterator[str]:
    """Problem of scales that belong to no quantised weight."""
    owner = name.removesuffix(_SUFFIX)
    if weight is None:
        yield f"{name} has no {owner}"
    elif weight.dtype.name != CODES:
        yield f"{name} belongs to {owner}, which is {weight.dtype} instead of {CODES}"


def _pair_faults(name: str, codes: StoredTensor, scale: StoredTensor | None, block: tuple[int, int]) -> Iterator[str]:
    """Problems of a quantised weight and its scales."""
    if scale is None:
        yield f"{name} is {codes.dtype}, but there is no {name}{_SUFFIX}"
        return
    if scale.dtype.name not in SCALES:
        yield f"{name}{_SUFFIX} is {scale.dtype} instead of one of {', '.join(SCALES)}"
    if len(codes.shape) != 2:
        yield f"{name} is {codes.dtype} of shape {list(codes.shape)}; only a matrix can have scales for blocks"
    elif scale.shape != (wanted := block_counts(codes.shape, block)):
        yield (
            f"{name}{_SUFFIX} has shape {list(scale.shape)}; {name} of shape {list(codes.shape)} has {list(wanted)} blocks of "
            f"{block[0]}×{block[1]}"
        )

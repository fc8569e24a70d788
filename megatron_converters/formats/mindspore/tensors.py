"""Tensors that files hold whole or in slices, and what a form of files yields."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...basics.dtypes import DType
from ...basics.errors import ConversionError, one_line
from ...storage.tensor import StoredTensor


class Slice(NamedTuple):
    """Part of a tensor as one file holds it: data of the local shape, and the element offset in the whole tensor."""

    data: StoredTensor
    offset: tuple[int, ...]


class Tensor(NamedTuple):
    """Whole tensor in slices that cover each element once; `copies` are further slices that must equal those."""

    shape: tuple[int, ...]
    dtype: DType
    slices: tuple[Slice, ...]
    copies: tuple[Slice, ...] = ()


class Placed(NamedTuple):
    """Tensor of one file that lies at an element offset of a larger one."""

    tensor: Tensor
    offset: tuple[int, ...]


@dataclass(frozen=True)
class WeightFiles:
    """Weights that were found under a path."""

    #: Folder that holds them; the parent of a single file.
    root: Path
    #: Weights by name, without everything that is none.
    tensors: Mapping[str, Tensor]
    #: Number of tensors that are no weights, by group.
    dropped: Mapping[str, int]
    #: Every file that was read.
    files: tuple[Path, ...]
    #: Form of the files in words, for messages.
    form: str
    notes: tuple[str, ...] = ()


def whole(data: StoredTensor) -> Tensor:
    """Tensor that one file holds in one piece."""
    return Tensor(data.shape, data.dtype, (Slice(data, (0,) * len(data.shape)),))


def assembled(where: str, shape: tuple[int, ...], parts: Iterable[Placed]) -> Tensor:
    """Tensor of `shape` from parts of one local shape, which must form a full grid; parts at one offset are copies.

    Raises `ConversionError`, which begins with `where`, if parts are missing, overlap or differ in shape or dtype.
    """
    firsts: dict[tuple[int, ...], Tensor] = {}
    copies: list[Slice] = []
    for part, offset in parts:
        if offset in firsts:
            copies += _shifted(part, offset)
        else:
            firsts[offset] = part
        first = next(iter(firsts.values()))
        if (part.shape, part.dtype) != (first.shape, first.dtype):
            raise ConversionError(
                f"{where}: its slices do not agree: {first.dtype} {first.shape} and {part.dtype} {part.shape}"
            )
    if not firsts:
        raise ConversionError(f"{where}: no file holds it; copy the checkpoint again")
    local, dtype = first.shape, first.dtype
    _check_grid(where, shape, local, firsts)
    return Tensor(
        shape, dtype, tuple(item for at, part in firsts.items() for item in _shifted(part, at)), tuple(copies)
    )


def _shifted(part: Tensor, offset: tuple[int, ...]) -> list[Slice]:
    return [Slice(data, tuple(a + b for a, b in zip(inner, offset, strict=True))) for data, inner in part.slices]


def _check_grid(where: str, shape: tuple[int, ...], local: tuple[int, ...], offsets: Iterable[tuple[int, ...]]) -> None:
    """The offsets must be those of a grid of local shapes that fills the whole shape."""
    if len(local) != len(shape) or any(whole % max(part, 1) for whole, part in zip(shape, local, strict=True)):
        raise ConversionError(f"{where}: slices of shape {local} do not tile {one_line(shape)}")
    present = list(offsets)
    for offset in present:
        if any(at % max(part, 1) or at + part > size for at, part, size in zip(offset, local, shape, strict=True)):
            raise ConversionError(
                f"{where}: a slice of shape {local} at {one_line(offset)} overlaps others or leaves {shape}"
            )
    wanted = math.prod(size // max(part, 1) for size, part in zip(shape, local, strict=True))
    if len(present) != wanted:
        raise ConversionError(
            f"{where}: {len(present)} of {one_line(wanted)} slices were found; copy the missing files"
        )

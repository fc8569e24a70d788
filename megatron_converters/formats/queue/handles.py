"""Handles that send a tensor to another process as references to files instead of bytes.

A process of this project receives the handle and copies from the files; any other process receives an ordinary torch tensor,
which is built from the same references while it unpickles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from ...basics.dtypes import DType, dtype_named
from ...basics.errors import ConversionError
from ...basics.handover import receives_own_types
from ...conversion.composing import Piece, Planner, StoredName
from ...conversion.gathering import materialise
from ...model.layouts import RowMap, interned, runs
from ...model.values import Affine, composed
from ...storage.decoding import Constant, ScaledBlocks
from ...storage.tensor import StoredTensor, as_torch, contiguous_strides

#: Row map as its `layouts.runs`: (row of the tensor, first row of the slot, number of rows).
_Runs = tuple[tuple[int, int, int], ...]
#: Stored tensor as plain values: the arguments of `StoredTensor`.
_PackedTensor = tuple[str, int, str, tuple[int, ...], tuple[int, ...]]
#: Piece as plain values: the class of its data and the arguments of that, the runs of its rows, its first column, its name, and
#: numerator and denominator of the scale and the shift of its value.
_PackedPiece = tuple[str, Any, _Runs, int, tuple[str, ...], tuple[tuple[int, int], ...]]


class TensorHandle:
    """Tensor of `shape`, to be converted to `dtype`, composed of pieces of files, which map to its own rows and columns."""

    def __init__(self, shape: tuple[int, ...], dtype: DType, pieces: Sequence[Piece]) -> None:
        self.shape = shape
        self.dtype = dtype
        self.pieces = tuple(pieces)

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (self.shape, self.dtype.name, tuple(_pack(piece) for piece in self.pieces))


class StackedHandle:
    """Handles of all experts, one each; a process not of this project receives them as one tensor stacked along a first axis."""

    def __init__(self, handles: Sequence[TensorHandle] = ()) -> None:
        self.handles = list(handles)

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive_stack, (tuple(self.handles),)


def _receive_stack(handles: tuple[Any, ...]) -> Any:
    if receives_own_types():
        return StackedHandle(handles)
    import torch

    return torch.stack(handles)


def part_of(pieces: Sequence[Piece], rows: RowMap, whole_rows: int, value: Affine | None = None) -> list[Piece]:
    """Pieces of `value` of one part of a slot, whose row i is the slot's row `rows[i]`, from the pieces of the slot."""
    part_row = np.full(whole_rows + 1, -1, np.int64)  # the last entry stays -1, for padding
    part_row[rows] = np.arange(rows.size)
    mapped = [
        dataclasses.replace(piece, rows=part_row[piece.rows], value=composed(piece.value, value)) for piece in pieces
    ]
    return [piece for piece in mapped if bool((piece.rows >= 0).any())]


def _pack(piece: Piece) -> _PackedPiece:
    data = piece.data
    if isinstance(data, ScaledBlocks):
        packed: Any = (data.name, _pack_tensor(data.weight), data.scale_name, _pack_tensor(data.scale), data.block)
    elif isinstance(data, Constant):
        packed = data.dtype.name, data.shape, data.value
    elif isinstance(data, StoredTensor):
        packed = _pack_tensor(data)
    else:
        raise ConversionError(f"{piece.name} is not in a file, so it cannot be sent to another process")
    numbers = () if piece.value is None else (Fraction(piece.value.scale), Fraction(piece.value.shift))
    value = tuple(number.as_integer_ratio() for number in numbers)
    return type(data).__name__, packed, tuple(runs(piece.rows)), piece.col, tuple(piece.name), value


def _pack_tensor(data: StoredTensor) -> _PackedTensor:
    return data.path, data.offset, data.dtype.name, data.shape, data.strides


def _unpack(packed: _PackedPiece) -> Piece:
    kind, content, row_runs, col, name, value = packed
    data = _UNPACK[kind](content)
    function = Affine(*(Fraction(*number) for number in value)) if value else None
    return Piece(data, _rows(row_runs, data.shape[0]), col, StoredName(*name), function)


def _unpack_tensor(packed: _PackedTensor) -> StoredTensor:
    path, offset, dtype, shape, strides = packed
    return StoredTensor(path, offset, dtype_named(dtype), shape, strides)


def _unpack_blocks(packed: tuple[str, _PackedTensor, str, _PackedTensor, tuple[int, int]]) -> ScaledBlocks:
    name, weight, scale_name, scale, block = packed
    return ScaledBlocks(name, _unpack_tensor(weight), scale_name, _unpack_tensor(scale), block)


def _unpack_constant(packed: tuple[str, tuple[int, ...], float]) -> Constant:
    dtype, shape, value = packed
    return Constant(dtype_named(dtype), shape, value)


_UNPACK: dict[str, Callable[[Any], StoredTensor | ScaledBlocks | Constant]] = {
    "StoredTensor": _unpack_tensor,
    "ScaledBlocks": _unpack_blocks,
    "Constant": _unpack_constant,
}


def _rows(packed: _Runs, count: int) -> RowMap:
    rows = np.full(count, -1, np.int64)
    for start, first, length in packed:
        rows[start : start + length] = np.arange(first, first + length)
    return interned(rows)


def _receive(shape: tuple[int, ...], dtype: str, packed: tuple[_PackedPiece, ...]) -> Any:
    handle = TensorHandle(shape, dtype_named(dtype), [_unpack(piece) for piece in packed])
    return handle if receives_own_types() else to_torch(handle)


def to_torch(handle: TensorHandle) -> Any:
    """Ordinary torch tensor of a handle: memory-mapped if one stored tensor equals it, else gathered into memory."""
    import torch

    stored = _identical(handle)
    if stored is not None:
        return as_torch(stored)
    array = materialise(Planner(), handle.pieces, handle.shape, handle.dtype)
    return torch.from_numpy(array.view(f"i{handle.dtype.itemsize}")).view(handle.dtype.torch)


def _identical(handle: TensorHandle) -> StoredTensor | None:
    """Stored tensor that equals the handle's tensor element by element; None if there is none."""
    if len(handle.pieces) != 1:
        return None
    data, rows = handle.pieces[0].data, handle.pieces[0].rows
    if (
        handle.pieces[0].value is not None
        or not isinstance(data, StoredTensor)
        or data.dtype != handle.dtype
        or data.shape != handle.shape
    ):
        return None
    if data.strides == contiguous_strides(data.shape) and np.array_equal(rows, np.arange(rows.size)):
        return data
    return None

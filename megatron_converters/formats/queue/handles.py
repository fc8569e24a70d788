"""Handles that send a tensor to another process as references to files instead of bytes.

A process of this project receives the handle and copies from the files; any other process receives an ordinary torch tensor,
which is built from the same references while it unpickles.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...basics.dtypes import DType, dtype_named
from ...basics.errors import ConversionError
from ...basics.handover import receives_own_types
from ...conversion.composing import Piece, Planner, StoredName
from ...conversion.copying import materialise
from ...model.layouts import RowMap, interned, runs
from ...storage.tensor import StoredTensor, contiguous_strides

#: Row map as its `layouts.runs`: (row of the tensor, first row of the slot, number of rows).
_Runs = tuple[tuple[int, int, int], ...]
#: Piece as plain values: the arguments of its `StoredTensor`, the runs of its rows, its first column and its name.
_PackedPiece = tuple[str, int, str, tuple[int, ...], tuple[int, ...], Any, int, tuple[str, ...]]


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


def part_of(pieces: Sequence[Piece], rows: RowMap, whole_rows: int) -> list[Piece]:
    """Pieces of one part of a slot, whose row i is the slot's row `rows[i]`, from the pieces of the slot."""
    part_row = np.full(whole_rows + 1, -1, np.int64)  # the last entry stays -1, for padding
    part_row[rows] = np.arange(rows.size)
    mapped = [Piece(piece.data, part_row[piece.rows], piece.col, piece.name) for piece in pieces]
    return [piece for piece in mapped if bool((piece.rows >= 0).any())]


def _pack(piece: Piece) -> _PackedPiece:
    data = piece.data
    if not isinstance(data, StoredTensor):
        raise ConversionError(f"{piece.name} is not in a file, so it cannot be sent to another process")
    return (
        data.path,
        data.offset,
        data.dtype.name,
        data.shape,
        data.strides,
        tuple(runs(piece.rows)),
        piece.col,
        tuple(piece.name),
    )


def _unpack(packed: _PackedPiece) -> Piece:
    path, offset, dtype, shape, strides, row_runs, col, name = packed
    data = StoredTensor(path, offset, dtype_named(dtype), shape, strides)
    return Piece(data, _rows(row_runs, shape[0]), col, StoredName(*name))


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
    array = (
        materialise(Planner(), handle.pieces, handle.shape, handle.dtype) if stored is None else _writable_view(stored)
    )
    return torch.from_numpy(array.view(f"i{handle.dtype.itemsize}")).view(handle.dtype.torch)


def _identical(handle: TensorHandle) -> StoredTensor | None:
    """Stored tensor that equals the handle's tensor element by element; None if there is none."""
    if len(handle.pieces) != 1:
        return None
    data, rows = handle.pieces[0].data, handle.pieces[0].rows
    if not isinstance(data, StoredTensor) or data.dtype != handle.dtype or data.shape != handle.shape:
        return None
    if data.strides == contiguous_strides(data.shape) and np.array_equal(rows, np.arange(rows.size)):
        return data
    return None


def _writable_view(data: StoredTensor) -> np.ndarray[Any, Any]:
    """Array on a private mapping, since torch expects writable memory; writes never reach the file."""
    start = (
        data.offset - data.offset % mmap.ALLOCATIONGRANULARITY
    )  # map only its own pages, since writable pages count as memory
    length = data.offset + data.nbytes - start
    with open(data.path, "rb") as file:
        private = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
    return np.ndarray(data.shape, data.dtype.carrier, private, data.offset - start)

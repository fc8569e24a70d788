"""A tensor that crosses a process boundary as directions to files, not as bytes.

A process of ours receives the handle itself and copies from the files; any other receives an ordinary torch tensor that is
made from the same directions while it unpickles.
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

#: `layouts.runs` of a row map. A plain tensor has one.
_Runs = tuple[tuple[int, int, int], ...]
_PackedPiece = tuple[str, int, str, tuple[int, ...], tuple[int, ...], Any, int, tuple[str, ...]]


class TensorHandle:
    """A tensor of `shape`, to be of `dtype`, made of pieces of files. The pieces' rows and columns count within it."""

    def __init__(self, shape: tuple[int, ...], dtype: DType, pieces: Sequence[Piece]) -> None:
        self.shape = shape
        self.dtype = dtype
        self.pieces = tuple(pieces)

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (self.shape, self.dtype.name, tuple(_pack(piece) for piece in self.pieces))


class StackedHandle:
    """One handle for each expert; any other process than ours receives them as one tensor with a first dimension more."""

    def __init__(self, handles: Sequence[TensorHandle] = ()) -> None:
        self.handles = list(handles)

    def __reduce__(self) -> tuple[Any, ...]:
        return _received_stack, (tuple(self.handles),)


def _received_stack(handles: tuple[Any, ...]) -> Any:
    if receives_own_types():
        return StackedHandle(handles)
    import torch

    return torch.stack(handles)


def part_of(pieces: Sequence[Piece], rows: RowMap, whole_rows: int) -> list[Piece]:
    """The pieces of a slot seen from one of its parts, whose row i is the slot's `rows[i]`."""
    place = np.full(whole_rows + 1, -1, np.int64)  # the last entry stays -1, for padding
    place[rows] = np.arange(rows.size)
    seen = [Piece(piece.data, place[piece.rows], piece.col, piece.name) for piece in pieces]
    return [piece for piece in seen if bool((piece.rows >= 0).any())]


def _pack(piece: Piece) -> _PackedPiece:
    data = piece.data
    if not isinstance(data, StoredTensor):
        raise ConversionError(f"{piece.name} is not in a file and cannot be handed over")
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


def _received(shape: tuple[int, ...], dtype: str, packed: tuple[_PackedPiece, ...]) -> Any:
    handle = TensorHandle(shape, dtype_named(dtype), [_unpack(piece) for piece in packed])
    return handle if receives_own_types() else to_torch(handle)


def to_torch(handle: TensorHandle) -> Any:
    """An ordinary torch tensor: mapped where it lies in one file as it is wanted, else gathered into memory."""
    import torch

    plain = _plain(handle)
    array = (
        materialise(Planner(), handle.pieces, handle.shape, handle.dtype) if plain is None else _writable_view(plain)
    )
    return torch.from_numpy(array.view(f"i{handle.dtype.itemsize}")).view(handle.dtype.torch)


def _plain(handle: TensorHandle) -> StoredTensor | None:
    """The one stored tensor that is the handle's, element by element, if there is one."""
    if len(handle.pieces) != 1:
        return None
    data, rows = handle.pieces[0].data, handle.pieces[0].rows
    if not isinstance(data, StoredTensor) or data.dtype != handle.dtype or data.shape != handle.shape:
        return None
    if data.strides == contiguous_strides(data.shape) and np.array_equal(rows, np.arange(rows.size)):
        return data
    return None


def _writable_view(data: StoredTensor) -> np.ndarray[Any, Any]:
    """A private mapping, since torch expects to be allowed to write; writes never reach the file."""
    start = data.offset - data.offset % mmap.ALLOCATIONGRANULARITY  # only its own pages: writable ones count as memory
    length = data.offset + data.nbytes - start
    with open(data.path, "rb") as file:
        private = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
    return np.ndarray(data.shape, data.dtype.carrier, private, data.offset - start)

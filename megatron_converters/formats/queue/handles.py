"""Handles that send a tensor to another process as references to files instead of bytes.

A process of this project receives the handle and copies from the files; any other process receives an ordinary torch tensor,
which is built from the same references while it unpickles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from ...basics.dtypes import DType, dtype_named
from ...basics.errors import ConversionError
from ...basics.handover import receives_own_types
from ...conversion.composing import Piece, Planner, StoredName
from ...conversion.gathering import materialise
from ...model.layouts import RowMap, interned, runs
from ...model.values import Affine, composed
from ...storage.decoding import Constant, Transposed, UnitRows
from ...storage.decoding_4bit import MicroScaled, PackedIntegers
from ...storage.decoding_8bit import ScaledBlocks
from ...storage.tensor import StoredTensor, as_torch, contiguous_strides

#: Row map as its `layouts.runs`: (row of the tensor, first row of the slot, number of rows).
_Runs = tuple[tuple[int, int, int], ...]


class _Packed(NamedTuple):
    """Record as plain values: the name of its class, and its fields."""

    kind: str
    content: tuple[Any, ...]


#: Piece as plain values: its data, the runs of its rows, its first column, its name, and numerator and denominator of the scale and
#: the shift of its value.
_PackedPiece = tuple[_Packed, _Runs, int, tuple[str, ...], tuple[tuple[int, int], ...]]


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
    if type(data).__name__ not in _CLASSES:
        raise ConversionError(f"{piece.name} is not in a file, so it cannot be sent to another process")
    numbers = () if piece.value is None else (Fraction(piece.value.scale), Fraction(piece.value.shift))
    value = tuple(number.as_integer_ratio() for number in numbers)
    return _packed(data), tuple(runs(piece.rows)), piece.col, tuple(piece.name), value


def _packed(value: Any) -> Any:
    """Field of a piece's data as plain values: of a record its class and fields."""
    if isinstance(value, DType):
        return _Packed(DType.__name__, (value.name,))
    if not dataclasses.is_dataclass(value):
        return value
    return _Packed(
        type(value).__name__, tuple(_packed(getattr(value, each.name)) for each in dataclasses.fields(value))
    )


def _unpacked(value: Any) -> Any:
    """What `_packed` has packed."""
    if not isinstance(value, _Packed):
        return value
    return _CLASSES[value.kind](*map(_unpacked, value.content))


def _unpack(packed: _PackedPiece) -> Piece:
    content, row_runs, col, name, value = packed
    data = _unpacked(content)
    function = Affine(*(Fraction(*number) for number in value)) if value else None
    return Piece(data, _rows(row_runs, data.shape[0]), col, StoredName(*name), function)


_RECORDS = (StoredTensor, Constant, UnitRows, ScaledBlocks, PackedIntegers, MicroScaled, Transposed)
#: What makes a record of its fields, by the name of its class.
_CLASSES: dict[str, Callable[..., Any]] = {
    DType.__name__: dtype_named,
    **{each.__name__: each for each in _RECORDS},
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

"""Where each element of a tensor comes from: stored pieces of a slot, composed with the pieces that must be written.

A piece maps the rows of one stored tensor to rows of a whole slot, and its columns to a range of the slot's columns.
Composing a target piece with source pieces is then array look-up, and "exactly once" is counting.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..basics.dtypes import DType
from ..basics.errors import ConversionError
from ..model.layouts import RowMap
from ..model.slots import Ref
from ..model.spec import ModelSpec


class TensorData(Protocol):
    """A tensor that can be viewed as an array of its dtype's carrier type; on disk or in memory."""

    @property
    def dtype(self) -> DType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def array(self) -> npt.NDArray[Any]: ...


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A shape as rows and columns: a vector has one column."""
    return shape[0], 1 if len(shape) == 1 else shape[1]


class StoredName(NamedTuple):
    """Name of a stored tensor: its file, or what else holds it; its own name there; and what else to say of it."""

    file: str
    tensor: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {self.tensor} ({self.note})" if self.note else f"{self.file}: {self.tensor}"


@dataclass(frozen=True, eq=False)
class Piece:
    """A stored part of a slot: `rows[i]` is the slot's row of stored row i (-1: padding), `col` the slot's first column."""

    data: TensorData
    rows: RowMap
    col: int
    name: StoredName

    @property
    def cols(self) -> int:
        """Columns of the stored tensor."""
        return as_matrix(self.data.shape)[1]


@dataclass(frozen=True)
class Sources:
    """One slot as an endpoint holds it: the pieces that cover it once, and further copies that must agree with them."""

    pieces: tuple[Piece, ...]
    replicas: tuple[Piece, ...] = ()

    @property
    def dtype(self) -> DType:
        """The pieces' common dtype."""
        return self.pieces[0].data.dtype


@dataclass(frozen=True, eq=False)
class Gather:
    """What one source gives to a target: source row per target row (-1: none), and the matching column ranges."""

    source: Piece
    rows: RowMap
    source_cols: slice
    target_cols: slice
    whole_width: bool


#: Look-ups kept at most. A model has some hundred distinct ones; the bound keeps memory flat if ever one has more.
_MAX_KEPT = 4096


@dataclass
class Planner:
    """Composes targets with sources. Layers repeat, so results are kept by the identity of the row maps."""

    _covers: dict[Any, Any] = field(default_factory=dict)
    _lookups: dict[Any, Any] = field(default_factory=dict)

    def check_cover(self, ref: Ref, spec: ModelSpec, sources: Sources) -> None:
        """Every element of the slot must be in exactly one piece, and all pieces must share one dtype."""
        dtypes = sorted({str(piece.data.dtype) for piece in sources.pieces})
        if len(dtypes) != 1:
            raise ConversionError(
                f"{ref}: its parts are of {len(dtypes)} dtypes ({', '.join(dtypes) or 'no parts'}); they must agree"
            )
        shape = ref.slot.matrix(spec)
        key = (shape, *((id(piece.rows), piece.col, piece.cols) for piece in sources.pieces))
        if key not in self._covers:
            _count_cover(ref, shape, sources.pieces)
            self._covers[key] = [piece.rows for piece in sources.pieces]  # holds the maps, so that ids stay theirs

    def compose(self, rows: RowMap, col: int, cols: int, pieces: Iterable[Piece]) -> list[Gather]:
        """What each piece gives to a target whose rows and columns are these rows and columns of the slot."""
        gathers = []
        for piece in pieces:
            left, right = max(col, piece.col), min(col + cols, piece.col + piece.cols)
            if left >= right:
                continue
            found = self._look_up(rows, piece.rows)
            if found is None:
                continue
            source_cols = slice(left - piece.col, right - piece.col)
            target_cols = slice(left - col, right - col)
            gathers.append(Gather(piece, found, source_cols, target_cols, right - left == cols == piece.cols))
        return gathers

    def _look_up(self, wanted: RowMap, stored: RowMap) -> RowMap | None:
        """For each wanted row of the slot, the stored row that holds it, or -1; None if there is none at all."""
        key = (id(wanted), id(stored))
        if key not in self._lookups:
            size = max(int(wanted.max(initial=-1)), int(stored.max(initial=-1))) + 1
            table = np.full(size + 1, -1, np.int64)  # index -1, the last entry, stays -1: padding maps to nothing
            valid = stored >= 0
            table[stored[valid]] = np.flatnonzero(valid)
            found = table[wanted]
            if len(self._lookups) > _MAX_KEPT:
                self._lookups.clear()
            self._lookups[key] = (found if bool((found >= 0).any()) else None, wanted, stored)
        result: RowMap | None = self._lookups[key][0]
        return result


def coverage(shape: tuple[int, int], parts: Sequence[tuple[RowMap, int, int]]) -> Iterator[tuple[int, int, RowMap]]:
    """How often parts, each as rows, first column and columns of a matrix of this shape, hold each row, for each range of columns
    in which that is the same: first column, end, and a count for each row. Rows of -1 are no row of it.

    Raises `ConversionError` for a row or column that the matrix does not have.
    """
    rows, cols = shape
    edges = sorted({0, cols, *(col for _, col, _ in parts), *(col + width for _, col, width in parts)})
    if edges[0] < 0 or edges[-1] > cols:
        raise ConversionError(f"columns {edges[0]} to {edges[-1]} are stored, but the tensor has {cols}")
    beyond = max((int(held.max(initial=-1)) for held, _, _ in parts), default=-1)
    if beyond >= rows:
        raise ConversionError(f"row {beyond} is stored, but the tensor has {rows}")
    for left, right in pairwise(edges):
        counts = np.zeros(rows, np.int64)
        for held, col, width in parts:
            if col <= left and right <= col + width:
                counts += np.bincount(held[held >= 0], minlength=rows)
        yield left, right, counts


def _count_cover(ref: Ref, shape: tuple[int, int], pieces: Sequence[Piece]) -> None:
    try:
        counted = list(coverage(shape, [(piece.rows, piece.col, piece.cols) for piece in pieces]))
    except ConversionError as error:
        raise ConversionError(f"{ref}: {error}") from None
    for left, right, counts in counted:
        wrong = np.flatnonzero(counts != 1)
        if wrong.size:
            times = int(counts[wrong[0]])
            raise ConversionError(
                f"{ref}: row {wrong[0]}, columns {left} to {right - 1}, is stored {times} times instead of once "
                f"({wrong.size} of {shape[0]} rows are affected)"
            )

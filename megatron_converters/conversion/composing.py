"""Composition of source pieces and target fills: where each element to be written comes from.

A piece maps the rows of one stored tensor to rows of a whole slot, and its columns to a range of the slot's columns.
Composing a fill with source pieces is then array look-up, and "exactly once" is counting.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import islice, pairwise
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from ..basics.dtypes import DType
from ..basics.errors import ConversionError
from ..model.layouts import RowMap, runs
from ..model.slots import Ref
from ..model.spec import ModelSpec
from ..model.values import Affine
from ..storage.tensor import StoredTensor
from .outline import Fill


class TensorData(Protocol):
    """Tensor on disk or in memory that can be viewed as an array of its dtype's carrier type."""

    @property
    def dtype(self) -> DType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    def array(self) -> npt.NDArray[Any]: ...


@runtime_checkable
class Reader(Protocol):
    """Matrix that is decoded from stored tensors as it is read, such as FP8 codes with block scales.

    `stored` has those tensors by name, first the one that gives the matrix its name, and none for a constant; `path` is the file of
    that one. Unless `exact`, values are rounded once to `dtype`. `computed` says in words what is done.
    """

    @property
    def dtype(self) -> DType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def path(self) -> str: ...
    @property
    def stored(self) -> Mapping[str, StoredTensor]: ...
    @property
    def exact(self) -> bool: ...
    @property
    def computed(self) -> str: ...
    def read(
        self,
        rows: slice | RowMap,
        cols: slice,
        dtype: DType | None = None,
        out: npt.NDArray[Any] | None = None,
    ) -> npt.NDArray[Any]:
        """Decode these rows (a range, or their numbers) and columns, to `dtype` or another floating type of at most 32 bits.

        The array is of the type's carrier type, and the same as is written into `out`, if that is given.
        """
        ...


@cache
def _reads(kind: type) -> bool:
    """Whether objects of a class are readers; asked once, since a look at all members of a protocol takes long."""
    return hasattr(kind, "read")


_MATRIX = 2  # dimensions


@lru_cache(maxsize=1024)
def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape as (rows, columns), which are the product of all further dimensions; a vector has one column."""
    return shape[0], math.prod(shape[1:])


class StoredName(NamedTuple):
    """Name of a stored tensor for messages: the file (or message) that holds it, its name there, and an optional note."""

    file: str
    tensor: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {self.tensor} ({self.note})" if self.note else f"{self.file}: {self.tensor}"


@dataclass(frozen=True, eq=False)
class Piece:
    """Stored part of a slot: stored row i is the slot's row `rows[i]` (-1: padding), stored column 0 its column `col`.

    The slot's elements are `value` of the stored ones, which None leaves as they are.
    """

    data: TensorData | Reader
    rows: RowMap
    col: int
    name: StoredName
    value: Affine | None = None

    @property
    def cols(self) -> int:
        """Number of columns of the stored tensor."""
        return as_matrix(self.data.shape)[1]

    def matrix(self) -> npt.NDArray[Any]:
        """View of a tensor that is not decoded, as rows and columns."""
        array: npt.NDArray[Any] = cast(TensorData, self.data).array()
        return array if array.ndim == _MATRIX else array.reshape(as_matrix(self.data.shape))

    @property
    def is_stored(self) -> bool:
        """Whether the slot's elements are those of one stored tensor: nothing is decoded or computed."""
        return self.value is None and isinstance(self.data, StoredTensor)

    @property
    def reader(self) -> Reader | None:
        """Data of the piece, where they are decoded; else None."""
        return cast(Reader, self.data) if _reads(type(self.data)) else None

    @property
    def has_tensor(self) -> bool:
        """Whether any stored tensor is read, which a constant needs not."""
        return self.reader is None or bool(self.reader.stored)

    @property
    def names(self) -> list[StoredName]:
        """Names of all stored tensors that it is read from, its own first."""
        reader = self.reader
        if reader is None:
            return [self.name]
        others = [*reader.stored.items()][1:]
        return [self.name, *(StoredName(os.path.basename(data.path), name) for name, data in others)]

    def elements(self, rows: slice | RowMap, cols: slice) -> npt.NDArray[Any]:
        """Stored elements at these rows (a range, or their numbers) and columns, decoded where a reader does that."""
        reader = self.reader
        return self.matrix()[:, cols][rows] if reader is None else reader.read(rows, cols)


@dataclass(frozen=True)
class Sources:
    """Pieces that cover one ref exactly once, and replicas: further copies that must equal them."""

    pieces: tuple[Piece, ...]
    replicas: tuple[Piece, ...] = ()

    @property
    def dtype(self) -> DType:
        """Common dtype of the pieces."""
        return self.pieces[0].data.dtype


#: Maximum number of runs of a chunk that is gathered run by run; one with more is gathered by index.
_MAX_RUNS = 32


class Lookup:
    """Source row of each target row (-1: none). Layers share look-ups, so the runs of one are found once."""

    __slots__ = ("_runs", "rows")

    def __init__(self, rows: RowMap) -> None:
        self.rows = rows
        self._runs: dict[tuple[int, int], tuple[tuple[int, int, int], ...] | None] = {}

    def runs(self, start: int, stop: int) -> tuple[tuple[int, int, int], ...] | None:
        """Runs of the target's rows `start` to `stop` as (row after `start`, source row, length); None for more than 32."""
        key = start, stop
        if key not in self._runs:
            found = tuple(islice(runs(self.rows[start:stop]), _MAX_RUNS + 1))
            self._runs[key] = found if len(found) <= _MAX_RUNS else None
        return self._runs[key]


class Gather(NamedTuple):
    """Share of a target that one piece provides: source row of each target row, and matching column ranges.

    The target's elements are `value` of the slot's.
    """

    source: Piece
    lookup: Lookup
    source_cols: slice
    target_cols: slice
    whole_width: bool
    value: Affine | None = None

    def shifted(self, cols: int) -> Gather:
        """Gather to columns that lie this many further on in a wider target."""
        there = slice(self.target_cols.start + cols, self.target_cols.stop + cols)
        return self._replace(target_cols=there, whole_width=False)

    @property
    def rows(self) -> RowMap:
        """Source row of each target row, -1 for none."""
        return self.lookup.rows

    def divided(self, mask: Mask) -> Iterator[Gather]:
        """Gather of the target's rows where the mask is true, then one of the others with values as the slot has them."""
        for chosen, value in ((mask, self.value), (~mask, None)):
            rows = np.where(chosen, self.rows, -1)
            if (rows >= 0).any():
                yield self._replace(lookup=Lookup(rows), value=value)


#: Whether each row of a target is meant.
Mask = npt.NDArray[np.bool_]
#: Maximum number of cached look-ups, and of plans. A model has some hundred distinct ones; the bound limits memory if one has more.
_MAX_LOOKUPS = 4096


@dataclass
class Planner:
    """Composer of fills with pieces. Layers repeat, so results are cached by the ids of the row maps."""

    _covers: dict[Any, Any] = field(default_factory=dict)
    _lookups: dict[Any, Any] = field(default_factory=dict)
    #: By what decides it, for each gather of a target the number of its piece and its other fields; and what keeps ids valid.
    _plans: dict[Any, tuple[list[tuple[int, tuple[Any, ...]]], Any]] = field(default_factory=dict)

    def check_cover(self, ref: Ref, spec: ModelSpec, sources: Sources) -> None:
        """Check that every element of the slot is in exactly one piece and that the pieces share one dtype.

        Raises `ConversionError`.
        """
        dtypes = {piece.data.dtype for piece in sources.pieces}
        if len(dtypes) != 1:
            raise ConversionError(
                f"{ref}: its parts have {len(dtypes)} dtypes ({', '.join(sorted(map(str, dtypes))) or 'no parts'}); all must have "
                "the same"
            )
        shape = ref.matrix(spec)
        key = shape, _places(sources.pieces)
        if key not in self._covers:
            _check_counts(ref, shape, sources.pieces)
            self._covers[key] = [piece.rows for piece in sources.pieces]  # holding the maps keeps their ids valid

    def compose_fill(self, fill: Fill, pieces: Sequence[Piece]) -> list[Gather]:
        """Gathers from each piece to a fill."""
        if not fill.swapped:
            return self.compose(fill.rows, fill.col, as_matrix(fill.shape)[1], pieces, fill.value, fill.only)
        return [
            gather.shifted(first)
            for first, col, cols in fill.spans
            for gather in self.compose(fill.rows, col, cols, pieces, fill.value, fill.only)
        ]

    def compose(
        self,
        rows: RowMap,
        col: int,
        cols: int,
        pieces: Sequence[Piece],
        value: Affine | None = None,
        only: Mask | None = None,
    ) -> list[Gather]:
        """Gathers from each piece to a target that holds `rows` of the slot and `cols` of its columns from `col` on.

        The target's elements are `value` of the slot's, of all its rows or those where `only` is true.
        """
        key = id(rows), col, cols, value, id(only), _places(pieces)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _MAX_LOOKUPS:
                self._plans.clear()
            found = list(self._gathers(rows, col, cols, pieces, value, only))
            plan = self._plans[key] = found, (rows, only, [piece.rows for piece in pieces])
        return [Gather(pieces[number], *rest) for number, rest in plan[0]]

    def _gathers(
        self, rows: RowMap, col: int, cols: int, pieces: Sequence[Piece], value: Affine | None, only: Mask | None
    ) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Number of the piece of each gather, and the gather's other fields."""
        for number, piece in enumerate(pieces):
            left, right = max(col, piece.col), min(col + cols, piece.col + piece.cols)
            if left >= right:
                continue
            found = self._look_up(rows, piece.rows)
            if found is None:
                continue
            source_cols = slice(left - piece.col, right - piece.col)
            target_cols = slice(left - col, right - col)
            gather = Gather(piece, found, source_cols, target_cols, right - left == cols == piece.cols, value)
            for part in [gather] if only is None or value is None else gather.divided(only):
                yield number, part[1:]

    def _look_up(self, wanted: RowMap, stored: RowMap) -> Lookup | None:
        """Stored row of each wanted row of the slot, -1 where it is not stored; None if none is."""
        key = (id(wanted), id(stored))
        if key not in self._lookups:
            size = max(int(wanted.max(initial=-1)), int(stored.max(initial=-1))) + 1
            table = np.full(size + 1, -1, np.int64)  # index -1, the last entry, stays -1: padding maps to nothing
            valid = stored >= 0
            table[stored[valid]] = np.flatnonzero(valid)
            found = table[wanted]
            if len(self._lookups) > _MAX_LOOKUPS:
                self._lookups.clear()
            self._lookups[key] = (Lookup(found) if bool((found >= 0).any()) else None, wanted, stored)
        result: Lookup | None = self._lookups[key][0]
        return result


def _places(pieces: Sequence[Piece]) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    """What decides of which elements of a slot pieces are."""
    return tuple([(id(piece.rows), piece.col, piece.data.shape) for piece in pieces])


def coverage(shape: tuple[int, int], parts: Sequence[tuple[RowMap, int, int]]) -> Iterator[tuple[int, int, RowMap]]:
    """Count how often parts of a matrix hold each of its rows, as (first column, end column, count of each row).

    A part is (rows, first column, number of columns); a row of -1 is padding. There is one result for each range of columns in
    which the counts are the same. Raises `ConversionError` for a row or column that the matrix does not have.
    """
    rows, cols = shape
    edges = sorted({0, cols, *(col for _, col, _ in parts), *(col + width for _, col, width in parts)})
    if edges[0] < 0 or edges[-1] > cols:
        raise ConversionError(f"columns {edges[0]} to {edges[-1]} are stored, but the tensor has {cols} columns")
    beyond = max((int(held.max(initial=-1)) for held, _, _ in parts), default=-1)
    if beyond >= rows:
        raise ConversionError(f"row {beyond} is stored, but the tensor has {rows} rows")
    for left, right in pairwise(edges):
        counts = np.zeros(rows, np.int64)
        for held, col, width in parts:
            if col <= left and right <= col + width:
                counts += np.bincount(held[held >= 0], minlength=rows)
        yield left, right, counts


def _check_counts(ref: Ref, shape: tuple[int, int], pieces: Sequence[Piece]) -> None:
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

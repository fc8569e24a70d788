"""Gathering of a target's rows from its sources, chunk by chunk: viewed where the bytes lie as they must, else copied to a buffer.

On the way elements may be decoded (`Reader`), computed (`Affine`) and cast; none of this changes which element goes where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from ..basics.dtypes import DType
from ..basics.errors import ConversionError
from ..model.layouts import RowMap
from ..model.values import Affine, composed
from .composing import Gather, Piece, Planner, Reader, as_matrix
from .computing import Computation

#: Bytes of a chunk: large enough to amortise calls, small enough to stay in a core's cache.
CHUNK_BYTES = 1 << 20

Array = npt.NDArray[Any]


def gather_chunks(
    gathers: Sequence[Gather],
    shape: tuple[int, int],
    dtype: DType,
    what: str,
    wanted: RowMap | None = None,
    *,
    value: Affine | None = None,
    lost: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Array]]:
    """Chunks of the target's rows in order, as (first row, array of whole rows); the next chunk reuses the array.

    The elements are `value` of the slot's. `lost` is told of computed elements from which their stored bits cannot be computed
    again, by their number. A row where `wanted` is -1 may stay unfilled and then holds arbitrary values. Raises `ConversionError`,
    which names the target as `what`, where the gathers leave any other element unfilled, so that uninitialised memory is never
    written.
    """
    rows, cols = shape
    step = max(1, CHUNK_BYTES // (cols * dtype.itemsize))
    supplies = [_supply(gather, dtype, value) for gather in gathers]
    buffer: Array | None = None
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        direct = _direct(supplies, start, stop)
        if direct is None:
            buffer = np.empty((min(step, rows), cols), dtype.carrier) if buffer is None else buffer
            direct = buffer[: stop - start]
            copied = sum([supply.copy_rows(direct, start, stop, lost) for supply in supplies])
            expected = cols * (stop - start if wanted is None else int(np.count_nonzero(wanted[start:stop] >= 0)))
            if copied != expected:
                raise ConversionError(
                    f"{what}: rows {start} to {stop - 1} get {copied} elements instead of {expected}; this is a fault of this "
                    "program, please report it"
                )
        yield start, direct


def transposed_chunks(
    gathers: Sequence[Gather],
    shape: tuple[int, int],
    dtype: DType,
    what: str,
    *,
    value: Affine | None = None,
    lost: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, Array]]:
    """Chunks of the transposed target, as (first column, array [columns, rows]); `shape` is that before transposing."""
    rows, cols = shape
    step = max(1, CHUNK_BYTES // (rows * dtype.itemsize))
    for start in range(0, cols, step):
        stop = min(start + step, cols)
        narrowed = [part for gather in gathers for part in _columns(gather, start, stop)]
        result = np.empty((rows, stop - start), dtype.carrier)
        for first, chunk in gather_chunks(narrowed, result.shape, dtype, what, value=value, lost=lost):
            result[first : first + chunk.shape[0]] = chunk
        yield start, np.ascontiguousarray(result.T)


def _columns(gather: Gather, start: int, stop: int) -> Iterator[Gather]:
    """Gather limited to the target's columns from `start` to `stop`; nothing if it has none of them."""
    left, right = max(start, gather.target_cols.start), min(stop, gather.target_cols.stop)
    if left < right:
        shift = gather.source_cols.start - gather.target_cols.start
        yield gather._replace(
            source_cols=slice(left + shift, right + shift),
            target_cols=slice(left - start, right - start),
            whole_width=False,
        )


class _Supply(NamedTuple):
    """Gather, what is computed on the way, and a view of the piece at the gather's columns, or what decodes it.

    The computation is None where a view's elements are copied as they are.
    """

    gather: Gather
    computation: Computation | None
    data: Array | Reader

    def copy_rows(self, target: Array, start: int, stop: int, lost: Callable[[int], None] | None) -> int:
        """Copy rows `start` to `stop` of the target into `target`, which holds these; returns the number of elements copied."""
        target = _columns_of(target, self.gather.target_cols)
        width = int(target.shape[1])
        found = self.gather.lookup.runs(start, stop)
        if found is None:
            wanted = self.gather.rows[start:stop]
            chosen = wanted >= 0
            elements = np.empty((int(np.count_nonzero(chosen)), width), target.dtype)
            self._compute(wanted[chosen], elements, lost)
            target[chosen] = elements
            return elements.size
        rows = 0
        for position, first, length in found:
            self._compute(slice(first, first + length), target[position : position + length], lost)
            rows += length
        return rows * width

    def _compute(self, rows: slice | RowMap, target: Array, lost: Callable[[int], None] | None) -> None:
        """Write what these rows of the piece become."""
        data, cols, computation = self.data, self.gather.source_cols, self.computation
        if computation is None:
            target[...] = cast(Array, data)[rows]
            return
        if isinstance(data, np.ndarray):
            part = data[rows]
        elif computation.copies:
            data.read(rows, cols, computation.target, target)
            return
        else:
            part = data.read(rows, cols, computation.read)
        computation.apply(part, target)
        if lost is not None and computation.value is not None:
            lost(computation.count_lost(part, target))


def _supply(gather: Gather, dtype: DType, value: Affine | None) -> _Supply:
    """Supply of a target of this dtype, whose elements are `value` of the slot's."""
    piece = gather.source
    if gather.value is None and value is None and piece.is_stored and piece.data.dtype is dtype:  # most: the short way
        return _Supply(gather, None, _columns_of(piece.matrix(), gather.source_cols))
    computation = Computation.of(piece, dtype, composed(gather.value, value))
    if piece.reader is not None:
        return _Supply(gather, computation, piece.reader)
    return _Supply(gather, None if computation.copies else computation, _columns_of(piece.matrix(), gather.source_cols))


def _columns_of(matrix: Array, cols: slice) -> Array:
    """Columns of a matrix; itself where they are all."""
    return matrix if cols.stop - cols.start == matrix.shape[1] else matrix[:, cols]


def _direct(supplies: Sequence[_Supply], start: int, stop: int) -> Array | None:
    """View of the source, if it holds the chunk exactly as the target will; else None."""
    if len(supplies) != 1:
        return None
    gather, computation, source = supplies[0]
    if not isinstance(source, np.ndarray) or not gather.whole_width or computation is not None:
        return None
    found = gather.lookup.runs(start, stop)
    if not found or found[0][2] != stop - start:
        return None
    first = found[0][1]
    view = source[first : first + stop - start]
    return view if view.flags.c_contiguous else None


def materialise(planner: Planner, pieces: Sequence[Piece], shape: tuple[int, ...], dtype: DType) -> Array:
    """Whole tensor of the pieces, in memory, as an array of the dtype's carrier type."""
    rows, cols = as_matrix(shape)
    result = np.empty((rows, cols), dtype.carrier)
    gathers = planner.compose(np.arange(rows, dtype=np.int64), 0, cols, pieces)
    for start, chunk in gather_chunks(gathers, (rows, cols), dtype, "a tensor of the queue"):
        result[start : start + chunk.shape[0]] = chunk
    return result.reshape(shape)

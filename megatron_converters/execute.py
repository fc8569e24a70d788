"""Run a plan: fill each target tensor a chunk at a time from views of its sources, and compare copies that must agree.

Memory is one buffer a thread, whatever the model's size. Threads help since copying, checksums and writing release the GIL.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from .dtypes import DType, cast
from .errors import ConversionError
from .layouts import RowMap, runs
from .plan import Gather, Piece, Planner, as_matrix
from .storage.output import OutputFile

#: Bytes gathered and written at a time: large enough to amortise calls, small enough to stay in a core's cache.
CHUNK_BYTES = 1 << 20
#: Chunks with more runs than this are gathered by index instead of run by run.
_MAX_RUNS = 32
_THREADS = 2
_QUEUED = 64

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Target:
    """A tensor to fill: its place in a laid-out file, and the slot's row of each of its rows (padding resolved)."""

    file: OutputFile
    name: str
    dtype: DType
    shape: tuple[int, ...]
    rows: RowMap
    col: int


def gather_chunks(gathers: Sequence[Gather], shape: tuple[int, int], dtype: DType) -> Iterator[tuple[int, Array]]:
    """The target's rows in order, as (first row, array of whole rows); the array is reused by the next chunk."""
    rows, cols = shape
    step = max(1, CHUNK_BYTES // (cols * dtype.itemsize))
    sources = [(gather, _matrix(gather.source)) for gather in gathers]
    buffer = np.empty((min(step, rows), cols), dtype.carrier)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        direct = _direct(sources, start, stop, dtype)
        if direct is None:
            direct = buffer[: stop - start]
            for gather, source in sources:
                _place(direct[:, gather.target_cols], dtype, source[:, gather.source_cols], gather, start, stop)
        yield start, direct


def _matrix(piece: Piece) -> Array:
    return piece.data.array().reshape(as_matrix(piece.data.shape))


def _direct(sources: Sequence[tuple[Gather, Array]], start: int, stop: int, dtype: DType) -> Array | None:
    """A view of the source itself where the chunk lies in it as it will lie in the target."""
    if len(sources) != 1:
        return None
    gather, source = sources[0]
    wanted = gather.rows[start:stop]
    if not gather.whole_width or gather.source.data.dtype != dtype or not _is_run(wanted):
        return None
    view = source[wanted[0] : wanted[0] + wanted.size]
    return view if view.flags.c_contiguous else None


def _is_run(wanted: RowMap) -> bool:
    first, last = int(wanted[0]), int(wanted[-1])
    return first >= 0 and last - first == wanted.size - 1 and next(runs(wanted))[2] == wanted.size


def _place(target: Array, dtype: DType, source: Array, gather: Gather, start: int, stop: int) -> None:
    wanted = gather.rows[start:stop]
    source_dtype = gather.source.data.dtype
    stretches = list(islice(runs(wanted), _MAX_RUNS + 1))
    if len(stretches) > _MAX_RUNS:
        chosen = wanted >= 0
        target[chosen] = _converted(source[wanted[chosen]], source_dtype, dtype, gather.source.where)
        return
    for position, first, length in stretches:
        part = source[first : first + length]
        target[position : position + length] = _converted(part, source_dtype, dtype, gather.source.where)


def _converted(part: Array, source: DType, target: DType, where: str) -> Array:
    if source == target:
        return part
    result = np.empty(part.shape, target.carrier)
    if not cast(part, source, result, target):
        raise ConversionError(
            f"{where} holds values beyond the range of {target}; keep its dtype or convert to bfloat16"
        )
    return result


def materialise(planner: Planner, pieces: Sequence[Piece], shape: tuple[int, ...], dtype: DType) -> Array:
    """The whole tensor that the pieces make up, in memory, in the dtype's carrier type."""
    rows, cols = as_matrix(shape)
    result = np.empty((rows, cols), dtype.carrier)
    gathers = planner.compose(np.arange(rows, dtype=np.int64), 0, cols, pieces)
    for start, chunk in gather_chunks(gathers, (rows, cols), dtype):
        result[start : start + chunk.shape[0]] = chunk
    return result.reshape(shape)


@dataclass
class Executor:
    """Fills targets on a few threads. `progress(bytes)` is called from them as bytes are written.

    The first failure stops the rest and is raised by the next `fill` or by `finish`.
    """

    progress: Callable[[int], None] = lambda _: None
    planner: Planner = field(default_factory=Planner)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="fill")
        self._room = threading.Semaphore(_QUEUED)
        self._futures: list[Future[None]] = []
        self._stop = threading.Event()

    def fill(self, target: Target, pieces: Sequence[Piece]) -> None:
        """Queue one tensor; waits while many are queued."""
        gathers = self.planner.compose(target.rows, target.col, as_matrix(target.shape)[1], pieces)
        self._submit(self._fill, target, gathers)

    def compare(self, replica: Piece, pieces: Sequence[Piece], what: str) -> None:
        """Queue a check that a further copy of a tensor equals the pieces, bit for bit."""
        gathers = self.planner.compose(replica.rows, replica.col, replica.cols, pieces)
        self._submit(self._compare, replica, gathers, what)

    def finish(self) -> None:
        """Wait for all that is queued; raise the first failure."""
        self._pool.shutdown(wait=True)
        self._raise_failure(self._futures)

    def cancel(self) -> None:
        """Stop as soon as the chunks in flight are done; raises nothing."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, function: Callable[..., None], *args: Any) -> None:
        self._room.acquire()
        future = self._pool.submit(self._run, function, *args)
        future.add_done_callback(lambda _: self._room.release())
        done = [future for future in self._futures if future.done()]
        self._raise_failure(done)
        self._futures = [*(future for future in self._futures if future not in done), future]

    def _run(self, function: Callable[..., None], *args: Any) -> None:
        try:
            function(*args)
        except BaseException:
            self._stop.set()  # all that is queued would be thrown away
            raise

    @staticmethod
    def _raise_failure(futures: Sequence[Future[None]]) -> None:
        for future in futures:
            if not future.cancelled():
                future.result()

    def _fill(self, target: Target, gathers: Sequence[Gather]) -> None:
        shape = as_matrix(target.shape)
        row_bytes = shape[1] * target.dtype.itemsize
        for start, chunk in gather_chunks(gathers, shape, target.dtype):
            if self._stop.is_set():
                return
            target.file.write(target.name, start * row_bytes, chunk)
            self.progress(chunk.nbytes)

    def _compare(self, replica: Piece, gathers: Sequence[Gather], what: str) -> None:
        stored = _matrix(replica)
        kept = replica.rows >= 0
        for start, chunk in gather_chunks(gathers, as_matrix(replica.data.shape), replica.data.dtype):
            if self._stop.is_set():
                return
            rows = slice(start, start + chunk.shape[0])
            differs = (stored[rows] != chunk).any(axis=1) & kept[rows]
            if differs.any():
                row = start + int(np.flatnonzero(differs)[0])
                raise ConversionError(f"{what}: {replica.where} differs from {gathers[0].source.where} in row {row}")

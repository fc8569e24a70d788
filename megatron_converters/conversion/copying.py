"""Chunked copying from source views to output files, and comparison of replicas.

Memory is one buffer per lane (thread), whatever the model's size. Where there are enough files, each has a lane of its own, since
two threads that write into one file wait for each other. Copying, checksums and writing release the interpreter lock.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from ..basics.dtypes import DType, cast
from ..basics.errors import ConversionError
from ..model.layouts import RowMap, runs
from ..model.slots import Ref
from ..model.spec import ModelSpec
from ..storage.output_file import OutputFile
from .composing import Gather, Piece, Planner, Sources, StoredName, as_matrix
from .outline import Fill

#: Bytes of a chunk: large enough to amortise calls, small enough to stay in a core's cache.
CHUNK_BYTES = 1 << 20
#: Maximum number of runs of a chunk that is gathered run by run; one with more is gathered by index.
_MAX_RUNS = 32
_MAX_LANES = 4
#: Maximum number of tasks queued in a lane: enough to reach beyond one file of a few GB, so that other lanes get work.
_MAX_QUEUED = 1024
#: Seconds between looks at a full lane, or at lanes that are to end. The main thread sleeps instead of waiting for a lock, since
#: Ctrl-C may reach it just after it has taken one in Python code, which would then never be released.
_POLL = 0.002

Array = npt.NDArray[Any]
#: Tasks of a thread, which ends at None.
_Lane = queue.SimpleQueue[Callable[[], None] | None]


def gather_chunks(
    gathers: Sequence[Gather], shape: tuple[int, int], dtype: DType, what: str, wanted: RowMap | None = None
) -> Iterator[tuple[int, Array]]:
    """Chunks of the target's rows in order, as (first row, array of whole rows); the next chunk reuses the array.

    A row where `wanted` is -1 may stay unfilled and then holds arbitrary values. Raises `ConversionError`, which names the target
    as `what`, where the gathers leave any other element unfilled, so that uninitialised memory is never written.
    """
    rows, cols = shape
    step = max(1, CHUNK_BYTES // (cols * dtype.itemsize))
    sources = [(gather, _matrix(gather.source)) for gather in gathers]
    buffer = np.empty((min(step, rows), cols), dtype.carrier)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        direct = _direct(sources, start, stop, dtype)
        if direct is None:
            direct = buffer[: stop - start]
            copied = sum(
                _copy_rows(direct[:, gather.target_cols], dtype, source[:, gather.source_cols], gather, start, stop)
                for gather, source in sources
            )
            expected = cols * (stop - start if wanted is None else int(np.count_nonzero(wanted[start:stop] >= 0)))
            if copied != expected:
                raise ConversionError(
                    f"{what}: rows {start} to {stop - 1} get {copied} elements instead of {expected}; this is a fault of this "
                    "program, please report it"
                )
        yield start, direct


def transposed_chunks(
    gathers: Sequence[Gather], shape: tuple[int, int], dtype: DType, what: str
) -> Iterator[tuple[int, Array]]:
    """Chunks of the transposed target, as (first column, array [columns, rows]); `shape` is that before transposing."""
    rows, cols = shape
    step = max(1, CHUNK_BYTES // (rows * dtype.itemsize))
    for start in range(0, cols, step):
        stop = min(start + step, cols)
        narrowed = [part for gather in gathers for part in _columns(gather, start, stop)]
        result = np.empty((rows, stop - start), dtype.carrier)
        for first, chunk in gather_chunks(narrowed, result.shape, dtype, what):
            result[first : first + chunk.shape[0]] = chunk
        yield start, np.ascontiguousarray(result.T)


def _columns(gather: Gather, start: int, stop: int) -> Iterator[Gather]:
    """Gather limited to the target's columns from `start` to `stop`; nothing if it has none of them."""
    left, right = max(start, gather.target_cols.start), min(stop, gather.target_cols.stop)
    if left < right:
        shift = gather.source_cols.start - gather.target_cols.start
        yield dataclasses.replace(
            gather,
            source_cols=slice(left + shift, right + shift),
            target_cols=slice(left - start, right - start),
            whole_width=False,
        )


def _matrix(piece: Piece) -> Array:
    return piece.data.array().reshape(as_matrix(piece.data.shape))


def _direct(sources: Sequence[tuple[Gather, Array]], start: int, stop: int, dtype: DType) -> Array | None:
    """View of the source, if it holds the chunk exactly as the target will; else None."""
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


def _copy_rows(target: Array, dtype: DType, source: Array, gather: Gather, start: int, stop: int) -> int:
    """Copy a gather's rows from `start` to `stop` into `target`; returns the number of elements copied."""
    wanted = gather.rows[start:stop]
    source_dtype, width = gather.source.data.dtype, int(target.shape[1])
    found = list(islice(runs(wanted), _MAX_RUNS + 1))
    if len(found) > _MAX_RUNS:
        chosen = wanted >= 0
        target[chosen] = _as_dtype(source[wanted[chosen]], source_dtype, dtype, gather.source.name)
        return int(np.count_nonzero(chosen)) * width
    for position, first, length in found:
        part = source[first : first + length]
        target[position : position + length] = _as_dtype(part, source_dtype, dtype, gather.source.name)
    return sum(length for _, _, length in found) * width


def _as_dtype(part: Array, source: DType, target: DType, name: StoredName) -> Array:
    if source == target:
        return part
    result = np.empty(part.shape, target.carrier)
    if not cast(part, source, result, target):
        raise ConversionError(
            f"{name} holds values beyond the range of {target}; keep its dtype ({source}) or convert to bfloat16"
        )
    return result


def materialise(planner: Planner, pieces: Sequence[Piece], shape: tuple[int, ...], dtype: DType) -> Array:
    """Whole tensor of the pieces, in memory, as an array of the dtype's carrier type."""
    rows, cols = as_matrix(shape)
    result = np.empty((rows, cols), dtype.carrier)
    gathers = planner.compose(np.arange(rows, dtype=np.int64), 0, cols, pieces)
    for start, chunk in gather_chunks(gathers, (rows, cols), dtype, "a tensor of the queue"):
        result[start : start + chunk.shape[0]] = chunk
    return result.reshape(shape)


def default_lanes() -> int:
    """Default number of lanes of an executor."""
    # The CPUs that this process may use, which can be fewer than the machine has.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MAX_LANES, cpus)


class Executor:
    """Runner of fills and comparisons in a few lanes (threads); `files` is the number of files that the run writes.

    The lanes call `progress(bytes)` as bytes are written and `filled(file)` when all tensors of a file are.
    The first failure stops the rest; the next `fill` or `compare`, or `finish`, raises it.
    """

    def __init__(
        self,
        progress: Callable[[int], None] = lambda _: None,
        filled: Callable[[OutputFile], None] = lambda _: None,
        *,
        files: int = 1,
        lanes: int | None = None,
    ) -> None:
        self.planner = Planner()
        self._progress, self._filled = progress, filled
        self._stopped = False
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._files: dict[OutputFile, tuple[int, Iterator[int]]] = {}
        self._lanes: list[_Lane] = [queue.SimpleQueue() for _ in range(lanes or default_lanes())]
        self._lanes_per_file = max(1, len(self._lanes) // max(files, 1))
        self._threads = [threading.Thread(target=self._serve, args=(lane,), daemon=True) for lane in self._lanes]
        for thread in self._threads:
            thread.start()

    def check(self, ref: Ref, spec: ModelSpec, sources: Sources, *, replicas: bool = True) -> None:
        """Raise unless the pieces cover the ref exactly once; queue the comparison of its replicas."""
        self.planner.check_cover(ref, spec, sources)
        for replica in sources.replicas if replicas else ():
            self.compare(replica, sources.pieces, str(ref))

    def plan(self, fill: Fill, pieces: Sequence[Piece]) -> list[Gather]:
        """Gathers from the pieces to one fill."""
        return self.planner.compose(fill.rows, fill.col, as_matrix(fill.shape)[1], pieces)

    def fill(self, file: OutputFile, fill: Fill, gathers: Sequence[Gather]) -> None:
        """Queue one fill of `file`; waits while the lane's queue is full."""
        self._submit(self._next_lane(file), lambda: self._fill(file, fill, gathers))

    def _next_lane(self, file: OutputFile) -> int:
        """Next lane of a file: its only one, or the next in turn where there are more lanes than files."""
        if file not in self._files:
            self._files[file] = len(self._files) * self._lanes_per_file, itertools.cycle(range(self._lanes_per_file))
        first, turns = self._files[file]
        return (first + next(turns)) % len(self._lanes)

    def compare(self, replica: Piece, pieces: Sequence[Piece], what: str) -> None:
        """Queue a check that a replica equals the pieces bit for bit; `what` names the ref in the message."""
        gathers = self.planner.compose(replica.rows, replica.col, replica.cols, pieces)
        # Among lanes with equally short queues the last one, which is the least likely to be filling a file.
        shortest = min(reversed(range(len(self._lanes))), key=lambda lane: self._lanes[lane].qsize())
        self._submit(shortest, lambda: self._compare(replica, gathers, what))

    def finish(self) -> None:
        """Wait for all queued tasks; raise the first failure."""
        self._join()
        self._raise_failure()

    def cancel(self) -> None:
        """Stop as soon as the chunks in flight are done; raises nothing."""
        self._stopped = True
        self._join()

    def _join(self) -> None:
        for lane in self._lanes:
            lane.put(None)
        while any(thread.is_alive() for thread in self._threads):
            time.sleep(_POLL)

    def _submit(self, lane: int, task: Callable[[], None]) -> None:
        while self._lanes[lane].qsize() >= _MAX_QUEUED and not self._stopped:
            time.sleep(_POLL)
        self._raise_failure()
        self._lanes[lane].put(task)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _serve(self, lane: _Lane) -> None:
        while (task := lane.get()) is not None:
            if not self._stopped:  # after a failure the queued tasks are dropped
                self._run(task)

    def _run(self, task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:  # noqa: BLE001 - raised again where the executor is used
            with self._lock:
                self._failure = self._failure or error
            self._stopped = True

    def _fill(self, file: OutputFile, fill: Fill, gathers: Sequence[Gather]) -> None:
        shape = as_matrix(fill.shape)
        chunks = transposed_chunks if fill.transposed else gather_chunks
        line_bytes = shape[0 if fill.transposed else 1] * fill.dtype.itemsize
        for line, chunk in chunks(gathers, shape, fill.dtype, f"{fill.file}: {fill.name}"):
            if self._stopped:
                return
            file.write(fill.name, fill.start + line * line_bytes, chunk)
            self._progress(chunk.nbytes)
        if file.claim():
            self._filled(file)

    def _compare(self, replica: Piece, gathers: Sequence[Gather], what: str) -> None:
        stored = _matrix(replica)
        kept = replica.rows >= 0
        shape, dtype = as_matrix(replica.data.shape), replica.data.dtype
        for start, chunk in gather_chunks(gathers, shape, dtype, str(replica.name), replica.rows):
            if self._stopped:
                return
            rows = slice(start, start + chunk.shape[0])
            differs = (stored[rows] != chunk).any(axis=1) & kept[rows]
            if differs.any():
                row = start + int(np.flatnonzero(differs)[0])
                raise ConversionError(f"{what}: {replica.name} differs from {gathers[0].source.name} in row {row}")

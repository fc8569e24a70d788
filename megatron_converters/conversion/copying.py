"""Chunked copying from sources to output files, and comparison of replicas.

Memory is one buffer per lane (thread), whatever the model's size. Where there are enough files, each has a lane of its own, since
two threads that write into one file wait for each other. Copying, checksums and writing release the interpreter lock.
"""

from __future__ import annotations

import itertools
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ..basics.casting import floats
from ..basics.errors import ConversionError
from ..model.slots import Ref
from ..model.spec import ModelSpec
from ..model.values import inverse
from .composing import Gather, Piece, Planner, Sources, as_matrix
from .gathering import gather_chunks, transposed_chunks
from .outline import Fill

_MAX_LANES = 4
#: Bytes up to which a fill is done at once by the thread that plans. Lanes would wait longer for the interpreter's lock, which each
#: call of the system gives away, than they would copy.
_SMALL_BYTES = 256 << 10
#: Maximum number of tasks queued in a lane: enough to reach beyond one file of a few GB, so that other lanes get work.
_MAX_QUEUED = 1024
#: Seconds between looks at a full lane, or at lanes that are to end. The main thread sleeps instead of waiting for a lock, since
#: Ctrl-C may reach it just after it has taken one in Python code, which would then never be released.
_POLL = 0.002

#: Tasks of a thread, which ends at None.
_Lane = queue.SimpleQueue[Callable[[], None] | None]


class Sink(Protocol):
    """Place that tensors are written to: a file, or whatever else takes their bytes."""

    def write(self, name: str, start: int, data: npt.NDArray[Any], /) -> None:
        """Write C-contiguous `data`, a part of the tensor `name` that begins at its byte `start`.

        The parts of a fill come in ascending order, from one thread at a time.
        """
        ...

    def writeback(self) -> Callable[[], None] | None:
        """Return what begins to write to a disk, where much waits for that; it may take long, and is called soon, by any thread."""
        ...

    def claim(self) -> bool:
        """Whether the caller must complete the sink: true once all of its tensors are written, for the first caller only."""
        ...


S = TypeVar("S", bound=Sink)


def default_lanes() -> int:
    """Default number of lanes of an executor."""
    # The CPUs that this process may use, which can be fewer than the machine has.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MAX_LANES, cpus)


class Executor(Generic[S]):
    """Runner of fills and comparisons in a few lanes (threads); `files` is the number of files (or other sinks) to be written.

    The lanes call `progress(bytes)` as bytes are written, `filled(file)` when all tensors of a file are, and `lost(fill, count)`
    for computed elements from which their stored bits cannot be computed again. While it waits for the lanes, the executor calls
    `check()`, which may raise. The first failure stops the rest; the next `fill` or `compare`, or `finish`, raises it.
    """

    def __init__(
        self,
        progress: Callable[[int], None] = lambda _: None,
        filled: Callable[[S], None] = lambda _: None,
        *,
        lost: Callable[[Fill, int], None] | None = None,
        check: Callable[[], None] = lambda: None,
        files: int = 1,
        lanes: int | None = None,
    ) -> None:
        self.planner = Planner()
        self._progress, self._filled, self._lost, self._check = progress, filled, lost, check
        self._stopped = False
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._files: dict[S, tuple[int, Iterator[int]]] = {}
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
        return self.planner.compose_fill(fill, pieces)

    def fill(self, file: S, fill: Fill, gathers: Sequence[Gather]) -> None:
        """Do one fill of `file` if it is small, else queue it; waits while the lane's queue is full."""
        if math.prod(fill.shape) * fill.dtype.itemsize > _SMALL_BYTES:
            self._submit(self._next_lane(file), lambda: self._fill(file, fill, gathers))
            return
        self._check()
        self._raise_failure()
        self._write(file, fill, gathers, lambda task: self._submit(self._next_lane(file), task))
        if file.claim():
            self._submit(self._next_lane(file), lambda: self._filled(file))

    def _next_lane(self, file: S) -> int:
        """Next lane of a file: its only one, or the next in turn where there are more lanes than files."""
        if file not in self._files:
            self._files[file] = len(self._files) * self._lanes_per_file, itertools.cycle(range(self._lanes_per_file))
        first, turns = self._files[file]
        return (first + next(turns)) % len(self._lanes)

    def compare(self, replica: Piece, pieces: Sequence[Piece], what: str) -> None:
        """Queue a check that a replica equals the pieces bit for bit; `what` names the ref in the message."""
        gathers = self.planner.compose(replica.rows, replica.col, replica.cols, pieces)
        if math.prod(replica.data.shape) * replica.data.dtype.itemsize <= _SMALL_BYTES:
            self._check()
            self._raise_failure()
            self._compare(replica, gathers, what)
            return
        # Among lanes with equally short queues the last one, which is the least likely to be filling a file.
        shortest = min(reversed(range(len(self._lanes))), key=lambda lane: self._lanes[lane].qsize())
        self._submit(shortest, lambda: self._compare(replica, gathers, what))

    def expect(self, fill: Fill, pieces: Sequence[Piece], what: str) -> None:
        """Queue a check that all elements of a slot, which the target has no place for, are the fill's constant."""
        gathers = self.planner.compose(fill.rows, fill.col, as_matrix(fill.shape)[1], pieces)
        self._submit(len(self._lanes) - 1, lambda: self._expect(fill, gathers, what))

    def finish(self) -> None:
        """Wait for all queued tasks; raise the first failure."""
        self._end_lanes()
        while not self._ended:
            self._check()
            time.sleep(_POLL)
        self._raise_failure()

    def cancel(self, seconds: float = math.inf) -> bool:
        """Stop as soon as the chunks in flight are done; waits at most `seconds` and returns whether they are. Raises nothing."""
        self._stopped = True
        self._end_lanes()
        deadline = time.monotonic() + seconds
        while not self._ended and time.monotonic() < deadline:
            time.sleep(_POLL)
        return self._ended

    def _end_lanes(self) -> None:
        for lane in self._lanes:
            lane.put(None)

    @property
    def _ended(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def _submit(self, lane: int, task: Callable[[], None]) -> None:
        self._check()
        while self._lanes[lane].qsize() >= _MAX_QUEUED and not self._stopped:
            self._check()
            time.sleep(_POLL)
        self._raise_failure()
        self._lanes[lane].put(task)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _serve(self, lane: _Lane) -> None:
        while self._serve_next(lane):
            pass

    def _serve_next(self, lane: _Lane) -> bool:
        """Run the next task of a lane, and forget it: what it reads may take memory. Returns whether there was one."""
        task = lane.get()
        if task is not None and not self._stopped:  # after a failure the queued tasks are dropped
            self._run(task)
        return task is not None

    def _run(self, task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:  # noqa: BLE001 - raised again where the executor is used
            with self._lock:
                self._failure = self._failure or error
            self._stopped = True

    def _fill(self, file: S, fill: Fill, gathers: Sequence[Gather]) -> None:
        self._write(file, fill, gathers, lambda task: task())
        if file.claim():
            self._filled(file)

    def _write(
        self, file: S, fill: Fill, gathers: Sequence[Gather], waiting: Callable[[Callable[[], None]], None]
    ) -> None:
        """Write one fill; `waiting` runs what waits for the disk, in a lane."""
        shape = as_matrix(fill.shape)
        chunks = transposed_chunks if fill.transposed else gather_chunks
        line_bytes = shape[0 if fill.transposed else 1] * fill.dtype.itemsize
        lost = None if self._lost is None else partial(self._lost, fill)
        what = f"{fill.file}: {fill.name}"
        for line, chunk in chunks(gathers, shape, fill.dtype, what, lost=lost):
            if self._stopped:
                return
            file.write(fill.name, fill.start + line * line_bytes, chunk)
            self._progress(chunk.nbytes)
            writeback = file.writeback()
            if writeback is not None:
                waiting(writeback)

    def _expect(self, fill: Fill, gathers: Sequence[Gather], what: str) -> None:
        dtype = gathers[0].source.data.dtype  # rounding could make a value the constant
        for start, chunk in gather_chunks(gathers, as_matrix(fill.shape), dtype, what):
            differs = (floats(chunk, dtype) != fill.constant).any(axis=1)
            if differs.any():
                row = start + int(np.flatnonzero(differs)[0])
                raise ConversionError(
                    f"{what}: {gathers[0].source.name} is not {fill.constant:g} in all elements (the first other is in row {row}); "
                    f"{fill.name}"
                )

    def _compare(self, replica: Piece, gathers: Sequence[Gather], what: str) -> None:
        kept, stored_cols = replica.rows >= 0, slice(0, replica.cols)
        shape, dtype = as_matrix(replica.data.shape), replica.data.dtype
        # As the replica stores them, so that nothing is computed where all copies are stored alike.
        value = inverse(replica.value)
        for start, chunk in gather_chunks(gathers, shape, dtype, str(replica.name), replica.rows, value=value):
            if self._stopped:
                return
            rows = slice(start, start + chunk.shape[0])
            differs = (replica.elements(rows, stored_cols) != chunk).any(axis=1) & kept[rows]
            if differs.any():
                row = start + int(np.flatnonzero(differs)[0])
                raise ConversionError(f"{what}: {replica.name} differs from {gathers[0].source.name} in row {row}")

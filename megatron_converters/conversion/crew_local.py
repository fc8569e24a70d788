"""Crew of several processes on one machine (`--workers N`): the first process starts the others and ends them.

The others can be killed at any moment, since what they have not finished is written again by the next run. So nothing waits for
them once the run has failed, and they do not outlive the first process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection as connections
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar

from ..basics.errors import ConversionError, Stopped
from ..families.registry import FAMILIES, Packed
from .crew import ALONE, Crew, Report, failure_of, meet

T = TypeVar("T")
#: Function that each process calls with its crew. It must belong to a module, since the other processes import it.
Work = Callable[[Crew, Any], T]
#: Function that is told, in a thread of its own, of the first failure of another process.
OnFailure = Callable[[ConversionError], None]
#: Seconds that the other processes have to end after they have done their part, and after they were killed. A process that waits
#: for a disk ends when the disk has answered.
_GRACE_SECONDS, _KILLED_SECONDS = 5.0, 1.0
#: Seconds between looks for reports; the main thread sleeps for the reason that `copying.py` gives.
_POLL = 0.002


class _Worker(NamedTuple):
    """Process that the first one started, and the first one's end of the connection to it."""

    process: BaseProcess
    connection: Connection


class _Leader:
    """Crew of the first process, which collects all reports and sends them to the others."""

    rank = 0

    def __init__(self, workers: list[_Worker], on_failure: OnFailure) -> None:
        self._workers, self._on_failure = workers, on_failure
        self.size = len(workers) + 1
        self._received: list[deque[Report]] = [deque() for _ in workers]
        #: By rank, how a process ended; after its last report that is no failure if its exit code is 0.
        self._ended: dict[int, Report] = {}
        self._failure: tuple[int, Report] | None = None
        self._released = False
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def exchange(self, report: Report) -> list[Report]:
        while report.failure is None and self._failure is None and not all(map(self._next_report, range(1, self.size))):
            time.sleep(_POLL)
        reports = [report, *(self._next_report(rank) or Report() for rank in range(1, self.size))]
        if self._failure is not None:
            rank, failed = self._failure
            reports[rank] = failed
        elif report.failure is None:
            for worker, received in zip(self._workers, self._received, strict=True):
                with suppress(IndexError, OSError):  # of a process that is gone, which its report says
                    received.popleft()
                    worker.connection.send(reports)
        return reports

    def _next_report(self, rank: int) -> Report | None:
        """Next report of a process, or that it is gone; None while there is none yet."""
        received = self._received[rank - 1]
        return received[0] if received else self._ended.get(rank)

    def check(self) -> None:
        """Raise if another process has failed or is gone."""
        if self._failure is not None:
            raise failure_of(*self._failure)

    def release(self) -> Crew | None:
        """Let the others end; the first process shows the result alone."""
        self._released = True
        return ALONE

    def end_others(self) -> bool:
        """Kill the others."""
        return self._end(0.0)

    def close(self) -> None:
        """Wait for the others to end; those that take too long are killed."""
        self._end(_GRACE_SECONDS)

    def _end(self, grace: float) -> bool:
        self._released = True
        ended = _end(self._workers, grace)
        self._listener.join(_KILLED_SECONDS)
        return ended

    def _listen(self) -> None:
        """Take in reports and the ends of the other processes."""
        listening: dict[Any, int] = {worker.connection: rank for rank, worker in enumerate(self._workers, 1)}
        while listening:
            for ready in connections.wait(list(listening)):
                rank = listening[ready]
                report = self._receive(rank)
                if report is not None:
                    self._received[rank - 1].append(report)
                else:
                    del listening[ready]
                    process = self._workers[rank - 1].process
                    self._ended[rank] = report = Report(failure=_end_of(rank, process), resumable=True)
                    if process.exitcode == 0:
                        continue
                if report.failure is not None and self._failure is None and not self._released:
                    self._failure = rank, report
                    self._on_failure(failure_of(rank, report))

    def _receive(self, rank: int) -> Report | None:
        """Next report of a process; None if it is gone."""
        try:
            report: Report = self._workers[rank - 1].connection.recv()
        except (EOFError, OSError):
            return None
        return report


def _end_of(rank: int, process: BaseProcess) -> str:
    """Words for how a worker ended."""
    process.join()
    code = process.exitcode or 0
    if code >= 0:
        return f"worker {rank} ended with exit code {code}"
    cause = "; was it short of memory?" if code == -signal.SIGKILL else ""
    return f"worker {rank} was ended by signal {-code}{cause}"


def _end(workers: list[_Worker], grace: float) -> bool:
    """Wait `grace` seconds for workers to end, and kill those that have not; returns whether all have ended.

    Their sentinels are watched, since only one thread can take a process's exit code, which is the listener.
    """
    for worker in _running(workers, grace):
        worker.process.kill()
    return not _running(workers, _KILLED_SECONDS)


def _running(workers: list[_Worker], seconds: float) -> list[_Worker]:
    """Workers that still run after at most so many seconds."""
    deadline = time.monotonic() + seconds
    running = {worker.process.sentinel: worker for worker in workers}
    while running:
        ended = connections.wait(list(running), max(deadline - time.monotonic(), 0.0))
        if not ended:
            break
        for sentinel in ended:
            del running[sentinel]  # type: ignore[arg-type] # the sentinels are integers
    return list(running.values())


class _Member:
    """Crew of a process that the first one started. It ends when that ends, or kills it."""

    def __init__(self, rank: int, size: int, connection: Connection) -> None:
        self.rank, self.size = rank, size
        self._connection = connection

    def exchange(self, report: Report) -> list[Report]:
        try:
            self._connection.send(report)
            reports: list[Report] = self._connection.recv()
        except (EOFError, OSError) as error:
            raise Stopped("the process that leads the conversion is gone") from error
        return reports

    def check(self) -> None:
        """Do nothing: the first process ends this one when another has failed."""

    def release(self) -> Crew | None:
        """Return None: this process has done its part."""
        return None

    def end_others(self) -> bool:
        """Do nothing: that is for the first process."""
        return False

    def close(self) -> None:
        """Close the connection, which the leader notices."""
        self._connection.close()


def _ignore(failure: ConversionError) -> None:
    """Do nothing: the failure is raised where the crew is next used."""


def run(count: int, work: Work[Any], argument: Any, lead: Callable[[Crew], T], on_failure: OnFailure = _ignore) -> T:
    """Run `lead(crew)` in this process and `work(crew, argument)` in `count` - 1 others; returns the result of `lead`."""
    workers: list[_Worker] = []
    try:
        with sigint_blocked():
            _start(workers, count, work, argument)
            leader = _Leader(workers, on_failure)
        result = lead(leader)
    except BaseException:
        _end(workers, 0.0)
        raise
    leader.close()
    return result


def _start(workers: list[_Worker], count: int, work: Work[Any], argument: Any) -> None:
    """Start the other processes, and add them to `workers`."""
    context = multiprocessing.get_context("spawn")
    families = FAMILIES.pack()
    for rank in range(1, count):
        own_end, other_end = context.Pipe()
        process = context.Process(
            target=_run_member, args=(rank, count, other_end, work, argument, families), name=f"worker {rank}"
        )
        process.start()
        workers.append(_Worker(process, own_end))
        other_end.close()


@contextmanager
def sigint_blocked() -> Iterator[None]:
    """Block SIGINT, so that processes started meanwhile ignore Ctrl-C; the leader gets it too, and ends them."""
    resource_tracker.ensure_running()  # if the first process had to start the tracker, that would unblock SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_member(rank: int, size: int, connection: Connection, work: Work[Any], argument: Any, families: Packed) -> None:
    threading.Thread(target=_end_with_leader, daemon=True).start()
    crew = _Member(rank, size, connection)
    with suppress(ConversionError):  # the leader has received the failure and reports it
        try:
            FAMILIES.unpack(families)
        except ConversionError as error:
            meet(crew, None, error)
        work(crew, argument)


def _end_with_leader() -> None:
    """End this process when the one that started it is gone, however that ended and whatever this one is doing."""
    leader = multiprocessing.parent_process()
    if leader is not None:
        connections.wait([leader.sentinel])
        os._exit(1)

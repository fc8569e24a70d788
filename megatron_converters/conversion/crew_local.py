"""Crew of several processes on one machine (`--workers N`): the first process starts the others and ends them."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from ..basics.errors import ConversionError, Stopped
from ..families.registry import FAMILIES, Packed
from .crew import Crew, Report, meet

T = TypeVar("T")
#: Function that each process calls with its crew. It must belong to a module, since the other processes import it.
Work = Callable[[Crew, Any], T]
#: Seconds that the other processes have to end once the first is done.
_GRACE_SECONDS = 5.0


class _Leader:
    """Crew of the first process, which collects all reports and sends them to the others."""

    rank = 0

    def __init__(self, others: list[tuple[BaseProcess, Connection]]) -> None:
        self._others = others
        self.size = len(others) + 1

    def exchange(self, report: Report) -> list[Report]:
        reports = [report, *(self._receive(rank) for rank in range(1, self.size))]
        for _, connection in self._others:
            with suppress(OSError):  # `_receive` has reported a process that is gone
                connection.send(reports)
        return reports

    def close(self) -> None:
        """Close the connections, which ends the others."""
        for _, connection in self._others:
            connection.close()

    def _receive(self, rank: int) -> Report:
        process, connection = self._others[rank - 1]
        try:
            report: Report = connection.recv()
        except (EOFError, OSError):
            process.join()
            code = process.exitcode or 0
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            return Report(failure=f"worker {rank} {how}", resumable=True)
        return report


class _Member:
    """Crew of a process that the first one started."""

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

    def close(self) -> None:
        """Close the connection, which the leader notices."""
        self._connection.close()


def run(count: int, work: Work[Any], argument: Any, lead: Callable[[Crew], T]) -> T:
    """Run `lead(crew)` in this process and `work(crew, argument)` in `count` - 1 others; returns the result of `lead`."""
    context = multiprocessing.get_context("spawn")
    others: list[tuple[BaseProcess, Connection]] = []
    families = FAMILIES.pack()
    try:
        for rank in range(1, count):
            own_end, other_end = context.Pipe()
            process = context.Process(
                target=_run_member, args=(rank, count, other_end, work, argument, families), name=f"worker {rank}"
            )
            with sigint_blocked():
                process.start()
            other_end.close()
            others.append((process, own_end))
        return lead(_Leader(others))
    finally:
        _stop(others)


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
    crew = _Member(rank, size, connection)
    with suppress(ConversionError):  # the leader has received the failure and reports it
        try:
            FAMILIES.unpack(families)
        except ConversionError as error:
            meet(crew, None, error)
        work(crew, argument)


def _stop(others: list[tuple[BaseProcess, Connection]]) -> None:
    for _, connection in others:
        connection.close()
    for process, _ in others:
        process.join(_GRACE_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()

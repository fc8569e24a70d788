"""Several processes on one machine (`--workers N`): the first starts the others and ends with them."""

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
from .crew import Crew, Word

T = TypeVar("T")
#: What each process does with its crew. A function of a module, since the others import it.
Work = Callable[[Crew, Any], T]
#: Seconds that the others have to end once the first has.
_GRACE = 5.0


class _Leader:
    """The first process's crew: it hears all others and tells them what it heard."""

    rank = 0

    def __init__(self, others: list[tuple[BaseProcess, Connection]]) -> None:
        self._others = others
        self.size = len(others) + 1

    def exchange(self, word: Word) -> list[Word]:
        words = [word, *(self._hear(rank) for rank in range(1, self.size))]
        for _, connection in self._others:
            with suppress(OSError):  # one that is gone has been noticed above
                connection.send(words)
        return words

    def close(self) -> None:
        """Let the others end."""
        for _, connection in self._others:
            connection.close()

    def _hear(self, rank: int) -> Word:
        process, connection = self._others[rank - 1]
        try:
            word: Word = connection.recv()
        except (EOFError, OSError):
            process.join()
            code = process.exitcode or 0
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            return Word(failure=f"worker {rank} {how}", resumable=True)
        return word


class _Member:
    """Another process's crew."""

    def __init__(self, rank: int, size: int, connection: Connection) -> None:
        self.rank, self.size = rank, size
        self._connection = connection

    def exchange(self, word: Word) -> list[Word]:
        try:
            self._connection.send(word)
            words: list[Word] = self._connection.recv()
        except (EOFError, OSError) as error:
            raise Stopped("the process that leads the conversion is gone") from error
        return words

    def close(self) -> None:
        """Let the leader notice."""
        self._connection.close()


def run(count: int, work: Work[Any], argument: Any, lead: Callable[[Crew], T]) -> T:
    """Run `lead(crew)` in this process and `work(crew, argument)` in `count` - 1 others; returns the first one's result."""
    context = multiprocessing.get_context("spawn")
    others: list[tuple[BaseProcess, Connection]] = []
    try:
        for rank in range(1, count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_member, args=(rank, count, theirs, work, argument), name=f"worker {rank}")
            with _deaf():
                process.start()
            theirs.close()
            others.append((process, ours))
        return lead(_Leader(others))
    finally:
        _end(others)


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes started here never hear of Ctrl-C, which reaches the leader too, who ends them; it waits meanwhile."""
    resource_tracker.ensure_running()  # which would undo this when the first process has it started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _member(rank: int, size: int, connection: Connection, work: Work[Any], argument: Any) -> None:
    with suppress(ConversionError):  # the leader has heard it and says it
        work(_Member(rank, size, connection), argument)


def _end(others: list[tuple[BaseProcess, Connection]]) -> None:
    for _, connection in others:
        connection.close()
    for process, _ in others:
        process.join(_GRACE)
        if process.is_alive():
            process.kill()
            process.join()

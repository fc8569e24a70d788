"""Processes that do jobs together and never outlive the one that started them.

Nothing is inherited from it but what a job is given. What they print is kept from the terminal, and shown where one dies.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from ..basics.errors import ConversionError

Setup = Callable[[int, int, Path], None]
"""What a process does first, given its number, their number, and a folder that they have in common until they end."""

_GRACE = 3.0  # seconds in which the others may finish once one has failed
_LAST_LINES = 5  # of what a process printed before it died
_INTERRUPTS = {signal.SIGINT}


_Outcome = Literal["done", "refused", "dead", "failed"]
#: Which outcome is the cause where there are several: the later ones follow from the earlier.
_CAUSES: tuple[_Outcome, ...] = ("refused", "dead", "failed")


class _Reply(NamedTuple):
    outcome: _Outcome
    value: Any  # what the job returns, or the error's text


class Pool:
    """`size` processes, each made ready by `setup`. They start at the first job, and anew after one that failed.

    `setup` and jobs are functions of modules. `context` says how processes start; None is `spawn`, with which the main
    module of a script must be importable: what it does stands under `if __name__ == "__main__":`.
    """

    def __init__(self, size: int, setup: Setup, time_limit: float, context: BaseContext | None = None) -> None:
        self.size = size
        self._setup = setup
        self._time_limit = time_limit
        self._context = context or multiprocessing.get_context("spawn")
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """What `job(*args)` returns on each process, in order.

        Raises `ConversionError` with what the processes refuse, or that one died, failed or gave no answer in time.
        """
        message = pickle.dumps((job, args))
        try:
            if not self._workers:
                self._start()
            for _, connection in self._workers:
                _send(connection, message)
            replies = self._replies()
        except BaseException:  # an interrupted wait: late replies would be taken for the next job's
            self.close()
            raise
        problems = self._problems(replies)
        if problems:
            # A refusal by every process is an orderly end; after any other failure they may wait for each other.
            if [reply.outcome for reply in replies.values()] != ["refused"] * self.size:
                self.close()
            raise ConversionError("\n".join(dict.fromkeys(problems)))
        return [replies[rank].value for rank in range(self.size)]

    def close(self) -> None:
        """End the processes."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers = []
        if self._folder:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        with _interrupts_held():
            for rank in range(self.size):
                ours, theirs = self._context.Pipe()
                given = (theirs, self._setup, rank, self.size, self.folder)
                # Of the process class that belongs to the context, which mypy does not know.
                process = cast("Any", self._context).Process(target=_serve, args=given, daemon=True)
                process.start()
                theirs.close()
                self._workers.append((process, ours))

    def _replies(self) -> dict[int, _Reply]:
        """Replies by number, of those that answer in time; once one has failed, the others have little time left."""
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._workers)}
        replies: dict[int, _Reply] = {}
        deadline = time.monotonic() + self._time_limit
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for connection in cast("list[Connection]", ready):
                rank = waiting.pop(connection)
                reply = replies[rank] = _received(connection) or _Reply("dead", self._death(rank))
                if reply.outcome != "done":
                    deadline = min(deadline, time.monotonic() + _GRACE)
        return replies

    def _problems(self, replies: dict[int, _Reply]) -> list[str]:
        for outcome in _CAUSES:
            found = [reply.value for reply in replies.values() if reply.outcome == outcome]
            if found:
                return found
        silent = [rank for rank in range(self.size) if rank not in replies]
        return [f"no answer from processes {silent} within {self._time_limit:g} seconds"] if silent else []

    def _death(self, rank: int) -> str:
        process, _ = self._workers[rank]
        process.join(_GRACE)  # its end of the pipe is closed, so it is ending
        code = process.exitcode or 0
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        why = " (most likely the machine ran out of memory)" if code == -signal.SIGKILL else ""
        log = _log_file(self.folder, rank)
        if not log.exists():
            why = f'{why} before it began; a script must come here under `if __name__ == "__main__":`'
            return f"process {rank} {how}{why}"
        printed = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
        return "\n".join([f"process {rank} {how}{why}{'; its last words:' if printed else ''}", *printed])

    @property
    def folder(self) -> Path:
        """A folder that the processes have in common with this one; it goes when they do, however that is."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="megatron_converters_")
        return Path(self._folder.name)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started within never see Ctrl-C, which a terminal sends to all: the one that started them ends them."""
    resource_tracker.ensure_running()  # else the first start would make it, and let interrupts through afterwards
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _send(connection: Connection, message: bytes) -> None:
    """Give a process its job, unless it is already dead, which the wait for its reply will show."""
    try:
        connection.send_bytes(message)
    except (BrokenPipeError, ConnectionResetError):
        return


def _received(connection: Connection) -> _Reply | None:
    """A process's reply, or None where it has died."""
    try:
        reply: _Reply = pickle.loads(connection.recv_bytes())  # noqa: S301 - from a process of ours
    except (EOFError, ConnectionResetError):
        return None
    return reply


def _serve(connection: Connection, setup: Setup, rank: int, size: int, folder: Path) -> None:
    """A process of a pool: do the jobs that arrive until the other side is gone."""
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    # Locks made under it leave no name in the system, which a process that is killed could not remove.
    multiprocessing.set_start_method("fork", force=True)
    _print_to(_log_file(folder, rank))
    ready = _outcome(setup, rank, size, folder)
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        reply = _outcome(_do, message) if ready.outcome == "done" else ready
        connection.send_bytes(pickle.dumps(reply))


def _end_with_parent(folder: Path) -> None:
    """End this process with the one that started it, whatever it is doing then, and remove what that one cannot any more."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)


def _print_to(path: Path) -> None:
    with path.open("wb") as log:
        for standard in (1, 2):
            os.dup2(log.fileno(), standard)


def _log_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.log"


def _do(message: bytes) -> Any:
    job, args = pickle.loads(message)  # noqa: S301 - from the process that started this one
    return job(*args)


def _outcome(job: Callable[..., Any], *args: Any) -> _Reply:
    try:
        return _Reply("done", job(*args))
    except ConversionError as error:
        return _Reply("refused", str(error))
    except Exception:  # noqa: BLE001 - whatever goes wrong here must reach the user, who sees no other output
        return _Reply("failed", f"an unexpected failure; please report it:\n{traceback.format_exc()}")

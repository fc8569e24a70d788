"""Pool of processes that run jobs together and never outlive the process that started them.

They inherit nothing from it but the arguments of a job. Their output is kept off the terminal, and shown if a process dies.
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
"""First call in a process: its number, the number of processes, and a folder that they share until they end."""

_GRACE = 3.0  # seconds that the other processes have to finish once one has failed
_LAST_LINES = 5  # shown of the output of a process that died
_INTERRUPTS = {signal.SIGINT}


_Outcome = Literal["done", "refused", "dead", "failed"]
#: Outcomes in the order in which they are reported: the later ones are consequences of the earlier.
_CAUSES: tuple[_Outcome, ...] = ("refused", "dead", "failed")


class _Reply(NamedTuple):
    outcome: _Outcome
    value: Any  # result of the job, or text of the error


class Pool:
    """Pool of `size` processes, each prepared by `setup`. They start at the first job, and again after one that failed.

    `setup` and jobs must be module-level functions. `context` chooses how processes start; None is `spawn`, which imports the
    main module of a script: its code must be under `if __name__ == "__main__":`.
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
        """Results of `job(*args)` on each process, in order.

        Raises `ConversionError` with the refusals of the processes, or if one died, failed or did not answer in time.
        """
        message = pickle.dumps((job, args))
        try:
            if not self._workers:
                self._start()
            for _, connection in self._workers:
                _send(connection, message)
            replies = self._collect_replies()
        except BaseException:  # else late replies would be taken for those of the next job
            self.close()
            raise
        problems = self._find_problems(replies)
        if problems:
            # If every process refused, all are idle again; after any other failure some may wait for others.
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
        with _interrupts_blocked():
            for rank in range(self.size):
                parent_end, child_end = self._context.Pipe()
                arguments = (child_end, self._setup, rank, self.size, self.folder)
                # The context's own process class, which mypy does not know.
                process = cast("Any", self._context).Process(target=_serve, args=arguments, daemon=True)
                process.start()
                child_end.close()
                self._workers.append((process, parent_end))

    def _collect_replies(self) -> dict[int, _Reply]:
        """Replies, by process number, that arrive in time; once one has failed, the others have `_GRACE` seconds."""
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._workers)}
        replies: dict[int, _Reply] = {}
        deadline = time.monotonic() + self._time_limit
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for connection in cast("list[Connection]", ready):
                rank = waiting.pop(connection)
                reply = replies[rank] = _receive(connection) or _Reply("dead", self._describe_death(rank))
                if reply.outcome != "done":
                    deadline = min(deadline, time.monotonic() + _GRACE)
        return replies

    def _find_problems(self, replies: dict[int, _Reply]) -> list[str]:
        for outcome in _CAUSES:
            found = [reply.value for reply in replies.values() if reply.outcome == outcome]
            if found:
                return found
        silent = [rank for rank in range(self.size) if rank not in replies]
        return [f"no answer from processes {silent} within {self._time_limit:g} seconds"] if silent else []

    def _describe_death(self, rank: int) -> str:
        process, _ = self._workers[rank]
        process.join(_GRACE)  # it has closed its end of the pipe, so it is about to end
        code = process.exitcode or 0
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        why = " (most likely the machine ran out of memory)" if code == -signal.SIGKILL else ""
        log = _log_file(self.folder, rank)
        if not log.exists():
            why = f'{why} before it started; a script must call this under `if __name__ == "__main__":`'
            return f"process {rank} {how}{why}"
        printed = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
        return "\n".join([f"process {rank} {how}{why}{'; its last output:' if printed else ''}", *printed])

    @property
    def folder(self) -> Path:
        """Folder that the processes share with this one; it is removed when they end, however they end."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="megatron_converters_")
        return Path(self._folder.name)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Context in which processes start with Ctrl-C blocked: a terminal sends it to all, but only the parent handles it."""
    resource_tracker.ensure_running()  # else the first start would create it, and unblock interrupts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _send(connection: Connection, message: bytes) -> None:
    """Send a process its job. A dead process is ignored; the wait for its reply reports it."""
    try:
        connection.send_bytes(message)
    except (BrokenPipeError, ConnectionResetError):
        return


def _receive(connection: Connection) -> _Reply | None:
    """Reply of a process, or None if it has died."""
    try:
        reply: _Reply = pickle.loads(connection.recv_bytes())  # noqa: S301 - from a process of parent_end
    except (EOFError, ConnectionResetError):
        return None
    return reply


def _serve(connection: Connection, setup: Setup, rank: int, size: int, folder: Path) -> None:
    """Main loop of a process: run the jobs that arrive until the connection is closed."""
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    # Locks made with `fork` have no name in the system, which a killed process could not remove.
    multiprocessing.set_start_method("fork", force=True)
    _print_to(_log_file(folder, rank))
    ready = _run(setup, rank, size, folder)
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        reply = _run(_run_message, message) if ready.outcome == "done" else ready
        connection.send_bytes(pickle.dumps(reply))


def _end_with_parent(folder: Path) -> None:
    """End this process, whatever it is doing, when its parent has ended, and remove the folder that the parent left."""
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


def _run_message(message: bytes) -> Any:
    job, args = pickle.loads(message)  # noqa: S301 - from the process that started this one
    return job(*args)


def _run(job: Callable[..., Any], *args: Any) -> _Reply:
    try:
        return _Reply("done", job(*args))
    except ConversionError as error:
        return _Reply("refused", str(error))
    except Exception:  # noqa: BLE001 - every failure must reach the user, who sees no other output
        return _Reply("failed", f"an unexpected failure; please report it:\n{traceback.format_exc()}")

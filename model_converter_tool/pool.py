"""Worker processes of a batch. A worker that is killed fails its own task alone, and another takes its place."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime, timezone
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from megatron_converters.basics.errors import Interrupted
from megatron_converters.conversion.crew_local import sigint_blocked

from .api import ConversionResult, ModelConverterAPI
from .debug import show_steps
from .options import Task

#: Seconds that workers have to leave what can be resumed, when the batch is interrupted.
_GRACE_SECONDS = 1.5


class Attempt(NamedTuple):
    """Attempt at a task, counted from 1."""

    number: int
    task: Task
    tries: int = 1


class Outcome(NamedTuple):
    """Result of an attempt."""

    attempt: Attempt
    result: ConversionResult
    again: bool

    @property
    def seconds(self) -> float:
        seconds: float = self.result.extra_info.get("seconds", 0.0)
        return seconds


class _Worker:
    """Process that converts one task after the other, and what it is doing."""

    def __init__(self, context: Any, workspace: Path) -> None:
        self.connection, other_end = context.Pipe()
        self.process: BaseProcess = context.Process(target=_work, args=(other_end, workspace), name="batch worker")
        with sigint_blocked():
            self.process.start()
        other_end.close()
        self.attempt: Attempt | None = None
        self.begun = datetime.now(timezone.utc)

    def begin(self, attempt: Attempt) -> None:
        """Send a task."""
        self.attempt, self.begun, self._start = attempt, datetime.now(timezone.utc), time.monotonic()
        with suppress(OSError):  # a process that is gone is noticed when its result is awaited
            self.connection.send(attempt.task)

    def result(self) -> ConversionResult | None:
        """Receive the result; None if the process is gone."""
        try:
            received: ConversionResult = self.connection.recv()
        except (EOFError, OSError):
            return None
        return received

    def lost(self) -> ConversionResult:
        """Result of a task whose process is gone."""
        self.process.join()
        code = self.process.exitcode or 0
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        cause = "; was it short of memory?" if code == -signal.SIGKILL else ""
        text = f"its worker process {how}{cause}; finished files are kept, and the same command goes on from there"
        output = self.attempt.task.output_path if self.attempt else None
        return ConversionResult(
            False, text, output, extra_info={"exit_code": 1, "seconds": time.monotonic() - self._start}
        )


def run_all(
    tasks: Iterable[Task], workers: int, retries: int, api: ModelConverterAPI, report: Callable[[Outcome], None]
) -> list[Outcome]:
    """Run every task, `workers` at once, each up to `retries` times again; returns the last outcome of each, in their order."""
    waiting = deque(Attempt(number, task) for number, task in enumerate(tasks, 1))
    last: dict[int, Outcome] = {}
    context = multiprocessing.get_context("spawn")
    pool: list[_Worker] = []
    try:
        while waiting or any(worker.attempt for worker in pool):
            for worker in pool:
                if worker.attempt is None and waiting:
                    worker.begin(waiting.popleft())
            while waiting and len(pool) < workers:
                pool.append(_Worker(context, api.workspace))
                pool[-1].begin(waiting.popleft())
            busy = {worker.connection: worker for worker in pool if worker.attempt}
            for ready in connection.wait(list(busy)):
                worker = busy[ready]
                outcome = _outcome(worker, retries, api)
                if not worker.process.is_alive():
                    pool.remove(worker)
                    worker.connection.close()
                if outcome.again:
                    waiting.append(outcome.attempt._replace(tries=outcome.attempt.tries + 1))
                last[outcome.attempt.number] = outcome
                report(outcome)
    except KeyboardInterrupt:
        raise Interrupted from None
    finally:
        _stop(pool)
    return [last[number] for number in sorted(last)]


def _outcome(worker: _Worker, retries: int, api: ModelConverterAPI) -> Outcome:
    attempt = worker.attempt
    if attempt is None:
        raise RuntimeError("a worker without a task has sent a result")
    result = worker.result()
    if result is None:
        result = worker.lost()
        api.record(attempt.task, worker.begun, result)
    worker.attempt = None
    return Outcome(attempt, result, not result.success and attempt.tries <= retries)


def _stop(pool: list[_Worker]) -> None:
    """End all workers: those that are converting as if they were interrupted, so that finished files are kept."""
    for worker in pool:
        worker.connection.close()
        if worker.attempt is not None:
            worker.process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for worker in pool:
        worker.process.join(max(deadline - time.monotonic(), 0.0))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _work(tasks: Connection, workspace: Path) -> None:
    """Convert what is received until the connection ends, or the parent does."""
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # the bars of several processes would overwrite each other
    show_steps()
    api = ModelConverterAPI(workspace)
    with suppress(EOFError, OSError, Interrupted, KeyboardInterrupt):
        while True:
            tasks.send(api.run(tasks.recv()))


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    """Interrupt this process when the one that started it is gone, however it ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_SECONDS)
        os._exit(1)

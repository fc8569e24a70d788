"""Processes that are forked from this one, which saves them the start of Python and the imports of torch and numpy.

They are for tests that start many processes and are about what these do. What it takes to start is for other tests, which start
an interpreter (`tests.helpers.start`).
"""

from __future__ import annotations

import io
import multiprocessing.process
import multiprocessing.util
import os
import runpy
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from tests.helpers import ROOT, Run

_TIMEOUT = 60.0
#: Packages that a script must find by itself.
_OURS = ("megatron_converters", "loaders", "savers", "tests")


def forked(call: Callable[[], Any], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Run:
    """Run `call` in a forked process; returns its exit code and all that it and its own processes print."""
    pipes = [os.pipe() for _ in range(2)]
    pid = os.fork()
    if pid == 0:
        _be_a_process_of_its_own(call, [write for _, write in pipes], cwd or Path("/"), env or {})
    for _, write in pipes:
        os.close(write)
    printed = _read_all([read for read, _ in pipes], pid)
    _, status = os.waitpid(pid, 0)
    return Run(os.waitstatus_to_exitcode(status), *(text.decode() for text in printed))


def forked_script(script: Path, *options: Any, cwd: Path | None = None) -> Run:
    """Run a script with the modules in its own folder, as `python SCRIPT …` does; ours must be among them."""

    def call() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] in _OURS]:
            del sys.modules[name]
        sys.path[:] = [str(script.parent), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
        sys.argv = [str(script), *map(str, options)]
        runpy.run_path(str(script), run_name="__main__")

    return forked(call, cwd=cwd)


def _read_all(pipes: list[int], pid: int) -> list[bytes]:
    """What arrives until no process holds the other ends; afterwards, or if that takes too long, the pipes are closed."""
    texts: dict[int, bytes] = dict.fromkeys(pipes, b"")
    waiting, deadline = set(pipes), time.monotonic() + _TIMEOUT
    try:
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise TimeoutError(f"not ended after {_TIMEOUT:g} seconds: {texts}")
            for pipe in ready:
                data = os.read(pipe, 1 << 16)
                texts[pipe] += data
                if not data:
                    waiting.discard(pipe)
    finally:
        for pipe in pipes:
            os.close(pipe)
    return list(texts.values())


def _be_a_process_of_its_own(call: Callable[[], Any], output: list[int], cwd: Path, env: Mapping[str, str]) -> NoReturn:
    """Run `call` as the main program of this process, forget whose child it is, and end it."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, pipe in enumerate(output, 1):
            os.dup2(pipe, number)
            os.close(pipe)
        sys.stdin = open(os.devnull)  # noqa: SIM115 - as long as the process
        sys.stdout, sys.stderr = (io.TextIOWrapper(open(number, "wb", 0), write_through=True) for number in (1, 2))  # noqa: SIM115
        os.chdir(cwd)
        os.environ.update(env)
        multiprocessing.process._parent_process = None  # type: ignore[attr-defined]
        multiprocessing.process._children = set()  # type: ignore[attr-defined]
        multiprocessing.util._finalizer_registry.clear()  # type: ignore[attr-defined]
        code = _exit_code(call)
        threading._shutdown()  # type: ignore[attr-defined]
        multiprocessing.util._exit_function()  # type: ignore[attr-defined]
    except BaseException:  # noqa: BLE001 - what Python prints at its end
        traceback.print_exc()
        code = 1
    finally:
        os._exit(code)


def _exit_code(call: Callable[[], Any]) -> int:
    """Exit code with which Python would end."""
    try:
        call()
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:  # noqa: BLE001 - what Python prints at its end
        traceback.print_exc()
        return 1
    return 0

"""Jobs for processes of a `Pool`, in a module that imports nothing slow."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from megatron_converters.basics.errors import ConversionError


def nothing(rank: int, size: int, folder: Path) -> None:
    """A setup that has nothing to do."""


def badly(rank: int, size: int, folder: Path) -> None:
    """A setup that fails."""
    raise RuntimeError("not ready")


def refuse(text: str) -> None:
    """Say why not."""
    raise ConversionError(text)


def wait_for_ever(folder: Path) -> None:
    """Leave the process id in the folder, and stay."""
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def end_first(folder: Path, refuses: bool) -> None:
    """Of two processes the first refuses, or is killed after a last word; the other stays."""
    (folder / str(os.getpid())).touch()
    while len(pids := sorted(int(path.name) for path in folder.iterdir())) < 2:
        time.sleep(0.01)
    if os.getpid() == pids[0]:
        if refuses:
            raise ConversionError("not I")
        print("its last line", flush=True)
        os.kill(pids[0], signal.SIGKILL)
    time.sleep(600)

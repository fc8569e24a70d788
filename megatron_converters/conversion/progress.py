"""Progress in bytes: a bar on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from typing import Any, Protocol, TextIO

from ..basics.quantities import duration, size
from ..basics.streams import write

#: Seconds between plain lines, at least and at most; between these a line for each such share of the whole, so that the log
#: of a day has some hundred lines.
_INTERVAL, _SILENCE = 10.0, 600.0
_STEP = 0.01


class Progress(Protocol):
    """Told of bytes as they are written, from several threads."""

    def start(self, total: int) -> None: ...
    def __call__(self, count: int) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """Shows nothing."""

    def start(self, total: int) -> None:
        """Ignored."""

    def __call__(self, count: int) -> None:
        """Ignored."""

    def stop(self) -> None:
        """Ignored."""


class Lines:
    """A line now and then with bytes, rate and time left; for logs, and where tqdm is not installed."""

    def __init__(self, stream: TextIO, done: str = "copied") -> None:
        self._stream = stream
        self._verb = done
        self._lock = threading.Lock()
        self._total = self._done = 0
        self._begun = self._shown = 0.0
        self._shown_bytes = 0

    def start(self, total: int) -> None:
        """Begin to count towards `total` bytes."""
        self._total, self._begun = total, time.monotonic()
        self._shown = self._begun

    def __call__(self, count: int) -> None:
        """Add bytes; called from several threads."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            waited, step = now - self._shown, self._done - self._shown_bytes
            if waited >= _INTERVAL and (step >= _STEP * self._total or waited >= _SILENCE):
                self._shown, self._shown_bytes = now, self._done
                self._show(now - self._begun)

    def stop(self) -> None:
        """Show what was done, if anything was."""
        if self._done:
            seconds = time.monotonic() - self._begun
            self._say(f"{self._so_far()} in {duration(seconds)} ({size(self._done / max(seconds, 1e-3))}/s)")

    def _show(self, seconds: float) -> None:
        rate = self._done / max(seconds, 1e-3)
        left = (self._total - self._done) / max(rate, 1.0)
        self._say(f"{self._so_far()} at {size(rate)}/s, {duration(left)} left")

    def _so_far(self) -> str:
        if self._done == self._total:
            return f"{self._verb} {size(self._done)}"
        share = 100 * self._done / max(self._total, 1)
        return f"{self._verb} {size(self._done)} of {size(self._total)} ({share:.0f} %)"

    def _say(self, line: str) -> None:
        write(self._stream, line)  # where it cannot be written, the copying goes on


class Bar:
    """A tqdm bar."""

    def __init__(self, tqdm: Any, doing: str = "copying") -> None:
        self._tqdm = tqdm
        self._verb = doing
        self._bar: Any = None
        self._lock = threading.Lock()

    def start(self, total: int) -> None:
        """Show the bar for `total` bytes."""
        self._bar = self._tqdm(total=total, unit="B", unit_scale=True, desc=self._verb)

    def __call__(self, count: int) -> None:
        """Add bytes; called from several threads."""
        with self._lock, suppress(OSError):  # a terminal that is gone stops no conversion
            self._bar.update(count)

    def stop(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()


def make_progress(quiet: bool, doing: str = "copying", done: str = "copied") -> Progress:
    """What fits: nothing if quiet, a bar on a terminal, lines otherwise. `doing` and `done` say what is done to the bytes."""
    if quiet or sys.stderr is None:
        return Silent()
    if not sys.stderr.isatty():
        return Lines(sys.stderr, done)
    try:
        from tqdm import tqdm
    except ImportError:  # tqdm is a convenience; weights move without it
        return Lines(sys.stderr, done)
    return Bar(tqdm, doing)

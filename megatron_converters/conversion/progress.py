"""Progress in bytes: a bar on a terminal, plain lines elsewhere, nothing when quiet, or calls of a caller's function."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, TextIO

from ..basics.quantities import duration, size
from ..basics.streams import write

#: Minimum and maximum seconds between plain lines.
_MIN_INTERVAL, _MAX_INTERVAL = 10.0, 600.0
#: Between these, a line per such fraction of the total, so that the log of a day has some hundred lines.
_FRACTION_PER_LINE = 0.01


class Progress(Protocol):
    """Display of the bytes written so far, which several threads may call."""

    def start(self, total: int) -> None: ...
    def __call__(self, count: int) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """No display at all."""

    def start(self, total: int) -> None:
        """Ignored."""

    def __call__(self, count: int) -> None:
        """Ignored."""

    def stop(self) -> None:
        """Ignored."""


class Lines:
    """Lines at intervals with bytes, rate and time left; for logs, and where tqdm is not installed."""

    def __init__(self, stream: TextIO, done: str = "copied") -> None:
        self._stream = stream
        self._verb = done
        self._lock = threading.Lock()
        self._total = self._done = 0
        self._begun = self._shown_at = 0.0
        self._shown_bytes = 0

    def start(self, total: int) -> None:
        """Start to count towards `total` bytes."""
        self._total, self._begun = total, time.monotonic()
        self._shown_at = self._begun

    def __call__(self, count: int) -> None:
        """Add bytes; called from several threads."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            waited, step = now - self._shown_at, self._done - self._shown_bytes
            if waited >= _MIN_INTERVAL and (step >= _FRACTION_PER_LINE * self._total or waited >= _MAX_INTERVAL):
                self._shown_at, self._shown_bytes = now, self._done
                self._show(now - self._begun)

    def stop(self) -> None:
        """Show the total, if any bytes were counted."""
        if self._done:
            seconds = time.monotonic() - self._begun
            self._write_line(f"{self._so_far()} in {duration(seconds)} ({size(self._done / max(seconds, 1e-3))}/s)")

    def _show(self, seconds: float) -> None:
        rate = self._done / max(seconds, 1e-3)
        left = (self._total - self._done) / max(rate, 1.0)
        self._write_line(f"{self._so_far()} at {size(rate)}/s, {duration(left)} left")

    def _so_far(self) -> str:
        if self._done == self._total:
            return f"{self._verb} {size(self._done)}"
        percent = 100 * self._done / max(self._total, 1)
        return f"{self._verb} {size(self._done)} of {size(self._total)} ({percent:.0f} %)"

    def _write_line(self, line: str) -> None:
        write(self._stream, line)  # a stream that fails does not stop the copying


class Bar:
    """Progress bar of tqdm."""

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
        with self._lock, suppress(OSError):  # a terminal that is gone must not stop the conversion
            self._bar.update(count)

    def stop(self) -> None:
        """Close the bar and leave it on the screen."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()


def make_progress(quiet: bool, doing: str = "copying", done: str = "copied") -> Progress:
    """Progress display: none if quiet, a bar on a terminal, else lines. `doing` and `done` are forms of a verb, for its text."""
    if quiet or sys.stderr is None:
        return Silent()
    if not sys.stderr.isatty():
        return Lines(sys.stderr, done)
    try:
        from tqdm import tqdm
    except ImportError:  # tqdm is a convenience; weights move without it
        return Lines(sys.stderr, done)
    return Bar(tqdm, doing)


class Reported:
    """Progress that is passed on to a caller."""

    def __init__(self, on_progress: Callable[[int, int], None]) -> None:
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._done = self._total = 0

    def start(self, total: int) -> None:
        """Begin to count towards `total` bytes."""
        self._done, self._total = 0, total
        self._on_progress(0, total)

    def __call__(self, count: int) -> None:
        """Add bytes; called from several threads."""
        with self._lock:
            self._done += count
            self._on_progress(self._done, self._total)

    def stop(self) -> None:
        """Nothing: the last call has told the last figure."""

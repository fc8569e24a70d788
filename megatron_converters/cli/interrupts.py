"""Ctrl-C: a line at once, then an orderly end, and a hard one where that takes too long or Ctrl-C is pressed again.

Python raises KeyboardInterrupt between two steps of the main thread, which may be waiting for a disk, as may what is then cleaned
up. So a thread hears of the signal by itself. It can end the process at any moment, since a conversion that is killed leaves
nothing that looks complete, and the same command goes on from there.
"""

from __future__ import annotations

import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NoReturn

from ..basics.errors import ConversionError, Interrupted
from ..basics.streams import write

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

#: Seconds that a process has to end by itself after Ctrl-C, and after a process that it works with was lost.
_PATIENCE = 2.4
#: Seconds in which a second SIGINT is taken for the same: a wrapper that passes signals on doubles those of a terminal.
_ECHO_SECONDS = 0.25


class _Watch:
    """Watch over the signals of this process."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)  # as `set_wakeup_fd` demands
        self._announced = threading.Lock()
        self._error: ConversionError = Interrupted()
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._over = False
        self.interrupted = False

    def start(self) -> None:
        """Begin to watch."""
        # Threads inherit what is blocked: SIGINT must reach the main thread, which blocks it while it starts processes.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self._thread.start()
        signal.signal(signal.SIGINT, self._interrupt)
        self._previous = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def stop(self) -> None:
        """End the watch. A process that was interrupted is about to end, so another Ctrl-C ends it without further ado."""
        signal.set_wakeup_fd(self._previous)
        signal.signal(signal.SIGINT, signal.SIG_DFL if self.interrupted else signal.default_int_handler)
        self._wake(last=True)
        self._thread.join()
        self._close()

    def forget(self) -> None:
        """End the watch in a process forked from this one, which has none of its threads."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._close()

    def end_soon(self, error: ConversionError) -> None:
        """End the process with this error unless it ends by itself soon."""
        self._error, self._deadline = error, time.monotonic() + _PATIENCE
        self._wake()

    def _wake(self, last: bool = False) -> None:
        if not self._over:
            self._over = last
            with suppress(BlockingIOError):  # there is much to read already
                os.write(self._write_end, b"\0")

    def _close(self) -> None:
        for end in (self._read_end, self._write_end):
            os.close(end)

    def _interrupt(self, number: int, frame: object) -> None:
        """Handle SIGINT in the main thread: the first raises, which ends what it does; the thread acts on a second."""
        if not self.interrupted:
            self.interrupted = True
            self._announce()
            raise KeyboardInterrupt

    def _announce(self) -> None:
        """Say once that the signal has arrived; of processes that work together, the first one does."""
        if self._announced.acquire(blocking=False) and not _is_started_by_another():
            self._tell("interrupted; stopping (Ctrl-C again ends it at once)")

    def _listen(self) -> None:
        """Read the numbers of signals, which Python writes as they arrive; end the process when it is time to."""
        first: float | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(self._read_end, selectors.EVENT_READ)
            while not self._over:
                patience = None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)
                numbers = os.read(self._read_end, 256) if selector.select(patience) else b""
                now = time.monotonic()
                again = signal.SIGINT in numbers and first is not None and now - first >= _ECHO_SECONDS
                if (again or not numbers) and not self._over:
                    self._end()
                if signal.SIGINT in numbers and first is None:
                    first, self._error, self._deadline = now, Interrupted(), now + _PATIENCE
                    self._announce()

    def _end(self) -> NoReturn:
        """End the process and those that it started."""
        for child in _children():
            child.kill()
        self._tell(f"error: {self._error}")
        os._exit(self._error.exit_code)

    def _tell(self, text: str) -> None:
        """Print a line past the stream, which the main thread may be writing to, and below a bar that stands there."""
        if sys.stderr is None:  # closed by the caller
            return
        line = f"{self._program}: {text}"
        try:
            below = "\n" if sys.stderr.isatty() else ""
            os.write(sys.stderr.fileno(), f"{below}{line}\n".encode(errors="backslashreplace"))
        except (OSError, ValueError):  # a stream without a file, or nobody reads it any more
            write(sys.stderr, line)


def _children() -> list[BaseProcess]:
    """Processes that this one has started by multiprocessing, which is imported only where it is used."""
    loaded = sys.modules.get("multiprocessing")
    return [] if loaded is None else loaded.active_children()


def _is_started_by_another() -> bool:
    loaded = sys.modules.get("multiprocessing")
    return loaded is not None and loaded.parent_process() is not None


_WATCHES: list[_Watch] = []


@contextmanager
def watched(program: str) -> Iterator[None]:
    """Context in which Ctrl-C ends this process within seconds. In a thread, or where a caller handles SIGINT, it does nothing."""
    in_charge = threading.current_thread() is threading.main_thread()
    if _WATCHES or not in_charge or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    watch = _Watch(program)
    _WATCHES.append(watch)
    try:
        watch.start()
        yield
    finally:
        if watch in _WATCHES:  # not in a forked process that returns here
            _WATCHES.remove(watch)
            watch.stop()


def end_soon(error: ConversionError) -> None:
    """End the watched process with this error unless it ends by itself within seconds; any thread may call this."""
    for watch in _WATCHES:
        watch.end_soon(error)


def _after_fork() -> None:
    while _WATCHES:
        _WATCHES.pop().forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

"""Sending and receiving over the queue between loader and saver, where neither side waits for one that is gone.

Works under this project's convert.py as well as under Megatron-LM's, where the saver is a child of the loader's process.
"""

from __future__ import annotations

import multiprocessing
import queue as queues
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ...basics.errors import ConversionError, Stopped, UsageError

if TYPE_CHECKING:
    from ...conversion.progress import Progress

#: Messages that end a transfer: after the whole model, and in place of what is missing.
DONE, EXIT = "done", "exit"
#: Seconds that `try_send` waits for room in the queue, by default.
_TRY_SECONDS = 2.0
#: Seconds between checks that the other process is alive.
_POLL = 0.5


def send(queue: Any, message: Any) -> None:
    """Send a message; raises `ConversionError` if the saver ends before there is room for it."""
    while True:
        try:
            queue.put(message, timeout=_POLL)
        except queues.Full:
            check_saver(queue)
        else:
            return


def try_send(queue: Any, message: Any, seconds: float = _TRY_SECONDS) -> None:
    """Send a message unless the queue stays full for `seconds`; used on the way out, where a stuck receiver must not block."""
    with suppress(queues.Full):
        queue.put(message, timeout=seconds)


def check_saver(queue: Any) -> None:
    """Raise if this process is the one that started the saver and no child of it is alive any more."""
    # active_children() also reaps, so a dead saver is missed for one poll at most.
    if _is_main_process() and not multiprocessing.active_children():
        queue.cancel_join_thread()  # nobody will read the buffered messages, so do not wait for that at exit
        raise ConversionError("the saver ended before it had received the whole model; see its message above")


def check_exit(saver: Any) -> None:
    """Wait for the saver's process to end; raise if it failed, with an error of the same exit code."""
    saver.join()
    code = saver.exitcode
    if code != 0:
        kind = UsageError if code == UsageError.exit_code else ConversionError
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise kind(f"the saver ended with {how}; nothing was saved")


def _is_main_process() -> bool:
    return multiprocessing.parent_process() is None


class WatchedProgress:
    """Progress that also checks, every `_POLL` seconds, that the parent process is alive; copying takes long."""

    def __init__(self, display: Progress, parent: str = "loader") -> None:
        self._display, self._parent = display, parent
        self._checked_at = time.monotonic()

    def start(self, total: int) -> None:
        """Start to count towards `total` bytes."""
        self._display.start(total)

    def __call__(self, count: int) -> None:
        """Add bytes; raises `Stopped` if the parent is gone. Called from several threads."""
        now = time.monotonic()
        if now - self._checked_at >= _POLL:
            self._checked_at = now
            check_parent(self._parent)
        self._display(count)

    def stop(self) -> None:
        """End the display."""
        self._display.stop()


def check_parent(what: str = "loader") -> None:
    """Raise `Stopped` if the parent process is gone; `what` names it in the message."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise Stopped(f"the {what} ended before its model was saved; nothing was saved")


_LOADER_GONE = "the loader ended before it had sent the whole model; nothing was saved"


def _close_writer(queue: Any) -> None:
    """Close this process's writing end, which would keep the pipe open after the loader died within a message."""
    writer = getattr(queue, "_writer", None)
    if writer is not None and not writer.closed:
        writer.close()


def receive(queue: Any) -> Any:
    """Receive the next message; raises if the loader is gone, or sent "exit"."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        _close_writer(queue)
    while True:
        try:
            message = queue.get(timeout=_POLL)
        except queues.Empty:
            if parent is None or parent.is_alive():
                continue
            raise Stopped(_LOADER_GONE) from None
        except (EOFError, OSError) as error:
            raise Stopped(_LOADER_GONE) from error
        if isinstance(message, str) and message == EXIT:
            raise ConversionError("the loader stopped; see its message above. Nothing was saved")
        return message

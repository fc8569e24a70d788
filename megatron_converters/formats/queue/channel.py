"""The queue between loader and saver, watched: neither side waits for a partner that is gone.

Works under Megatron-LM's own convert.py, where the saver is a child of the loader's process, as well as under ours.
"""

from __future__ import annotations

import multiprocessing
import queue as queues
import time
from contextlib import suppress
from typing import Any

from ...basics.errors import ConversionError, Stopped, UsageError
from ...conversion.progress import Progress

#: Seconds that a partner which does not read is given.
_PATIENCE = 2.0
#: Seconds between looks at whether the partner is alive.
_POLL = 0.5


def send(queue: Any, message: Any) -> None:
    """Put a message; raises if the saver ends before there is room for it."""
    while True:
        try:
            queue.put(message, timeout=_POLL)
        except queues.Full:
            check_saver(queue)
        else:
            return


def tell(queue: Any, message: Any) -> None:
    """Put a message if there is room for it soon. On the way out a partner that is stuck or gone must not hold us."""
    with suppress(queues.Full):
        queue.put(message, timeout=_PATIENCE)


def check_saver(queue: Any) -> None:
    """Raise if this process started a saver and none is alive any more."""
    # active_children() also reaps, so a dead saver is missed for one poll at most.
    if _had_child() and not multiprocessing.active_children():
        queue.cancel_join_thread()  # nobody will read what is still buffered; do not wait for it at exit
        raise ConversionError("the saver ended before it had received the whole model; see its message above")


def check_exit(saver: Any) -> None:
    """Wait for a saver's process to end; raise if it did not end well, with its kind of exit code."""
    saver.join()
    code = saver.exitcode
    if code != 0:
        kind = UsageError if code == UsageError.exit_code else ConversionError
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise kind(f"the saver ended with {how}; nothing was saved")


def _had_child() -> bool:
    return multiprocessing.parent_process() is None


class Watched:
    """Progress that looks now and then whether the process that started this one is alive, since copying takes long."""

    def __init__(self, shown: Progress, parent: str = "loader") -> None:
        self._shown, self._parent = shown, parent
        self._looked = time.monotonic()

    def start(self, total: int) -> None:
        """Begin to count towards `total` bytes."""
        self._shown.start(total)

    def __call__(self, count: int) -> None:
        """Add bytes; raises if that process is gone. Called from several threads."""
        now = time.monotonic()
        if now - self._looked >= _POLL:
            self._looked = now
            check_parent(self._parent)
        self._shown(count)

    def stop(self) -> None:
        """Show the last figure."""
        self._shown.stop()


def check_parent(what: str = "loader") -> None:
    """Raise if the process that started this one is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise Stopped(f"the {what} ended before its model was saved; nothing was saved")


_LOADER_GONE = "the loader ended before it had sent the whole model; nothing was saved"


def _only_read(queue: Any) -> None:
    """Close this process's own end for writing: else the pipe stays open without the loader, half a message in it."""
    writer = getattr(queue, "_writer", None)
    if writer is not None and not writer.closed:
        writer.close()


def receive(queue: Any) -> Any:
    """The next message; raises if the loader is gone or says that it stopped."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        _only_read(queue)
    while True:
        try:
            message = queue.get(timeout=_POLL)
        except queues.Empty:
            if parent is None or parent.is_alive():
                continue
            raise Stopped(_LOADER_GONE) from None
        except (EOFError, OSError) as error:
            raise Stopped(_LOADER_GONE) from error
        if isinstance(message, str) and message == "exit":
            raise ConversionError("the loader stopped; see its message above. Nothing was saved")
        return message

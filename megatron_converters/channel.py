"""The queue between loader and saver, watched: neither side waits for a partner that is gone.

Works under Megatron-LM's own convert.py, where the saver is a child of the loader's process, as well as under ours.
"""

from __future__ import annotations

import multiprocessing
import queue as queues
from typing import Any

from .errors import ConversionError

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


def check_saver(queue: Any) -> None:
    """Raise if this process started a saver and none is alive any more."""
    # active_children() also reaps, so a dead saver is missed for one poll at most.
    if _had_child() and not multiprocessing.active_children():
        queue.cancel_join_thread()  # nobody will read what is still buffered; do not wait for it at exit
        raise ConversionError("the saver ended before it had received the whole model; see its message above")


def _had_child() -> bool:
    return multiprocessing.parent_process() is None


def receive(queue: Any) -> Any:
    """The next message; raises if the loader is gone or says that it stopped."""
    parent = multiprocessing.parent_process()
    while True:
        try:
            message = queue.get(timeout=_POLL)
        except queues.Empty:
            if parent is not None and not parent.is_alive():
                raise ConversionError(
                    "the loader ended before it had sent the whole model; nothing was saved"
                ) from None
            continue
        if isinstance(message, str) and message == "exit":
            raise ConversionError("the loader stopped; see its message above. Nothing was saved")
        return message

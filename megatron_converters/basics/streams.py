"""Text streams whose reader may leave, or whose disk may fill, at any time."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TextIO

from .errors import reason_of


def write(stream: TextIO | None, text: str) -> str | None:
    """Write a line; return why it failed, or None if it was written or the reader has closed the pipe."""
    if stream is None:
        return "the stream is closed"
    try:
        stream.write(text + "\n")
        stream.flush()
    except BrokenPipeError:
        _mute(stream)
    except OSError as error:
        _mute(stream)
        return reason_of(error)
    return None


def _mute(stream: TextIO) -> None:
    """Redirect the stream to the null device, so that no later write fails, including Python's flush at exit."""
    with suppress(OSError):  # a stream without a file
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)

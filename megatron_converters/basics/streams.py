"""Text streams that a reader or a full disk may close at any time."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TextIO

from .errors import reason_of


def write(stream: TextIO | None, text: str) -> str | None:
    """Write a line; returns why it could not be, None where it is written or the reader has enough."""
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
    """Let nothing else that is written there fail, Python's own flush at the end included."""
    with suppress(OSError):  # a stream without a file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)

"""Flushing of files to the disk, in steps that end soon.

A process that waits in `fsync` cannot be ended, not even by SIGKILL, until the disk has taken all that the system holds of the
file, which may be gigabytes. `sync_file_range` waits for a part of it, so that `fsync` finds little left.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from functools import cache
from typing import Any

_STEP = 32 << 20
#: Flags of Linux's `sync_file_range`: wait for writes under way, begin to write, wait for these.
_BEFORE, _WRITE, _AFTER = 1, 2, 4
#: Errors of file systems that cannot flush a part of a file.
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.ENOTSUP, errno.EOPNOTSUPP}


def flush(fd: int, nbytes: int, go_on: Callable[[], None] = lambda: None) -> None:
    """Flush a file of `nbytes` to the disk; `go_on()` is called between steps, and may raise.

    Raises `OSError` if the disk is full or fails.
    """
    for start in range(0, nbytes, _STEP):
        go_on()
        _sync_range(fd, start + _STEP, _STEP, _WRITE)  # so that the disk does not rest between the steps
        _sync_range(fd, start, _STEP, _BEFORE | _WRITE | _AFTER)
    go_on()
    os.fsync(fd)


@cache
def _system_call() -> Any:
    """The C library's `sync_file_range`; None where there is none."""
    try:
        call = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (AttributeError, OSError, TypeError):  # not Linux
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


def _sync_range(fd: int, start: int, nbytes: int, flags: int) -> None:
    """Flush a part of a file, where the system can. An error must be raised here: a later `fsync` does not report it again."""
    call = _system_call()
    if call is not None and call(fd, start, nbytes, flags) != 0 and ctypes.get_errno() not in _UNSUPPORTED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

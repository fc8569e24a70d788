"""Opening of input files, with messages for the faults that users meet most."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO, TypeGuard

from ..basics.errors import ConversionError, reason_of
from .tensor import forget_mapping

#: First bytes of a Git LFS pointer (git-lfs docs/spec.md), which a clone without `git lfs` leaves in place of the weights.
_LFS_POINTER = b"version https://git-lfs"


def open_source(path: str) -> BinaryIO:
    """Open a file for reading; `ConversionError` if it cannot be opened, is empty or is a Git LFS pointer."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would block forever
            raise ConversionError(f"{path} is not a file; copy or download it again")
        file = open(path, "rb")  # noqa: SIM115 - handed to the caller, who closes it
    except OSError as error:
        raise ConversionError(f"cannot open {path}: {reason_of(error)}") from error
    fault = _fault(file.read(len(_LFS_POINTER)))
    if fault:
        file.close()
        raise ConversionError(f"{path} {fault}")
    file.seek(0)
    forget_mapping(path)
    return file


def is_name(value: object) -> TypeGuard[str]:
    """Whether a value can name a tensor or a file: no system opens a path with a NUL, and a line break would split a message."""
    return isinstance(value, str) and value.isprintable()


def file_size(file: BinaryIO) -> int:
    """Bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def _fault(start: bytes) -> str | None:
    if not start:
        return "is empty; copy or download it again"
    if start == _LFS_POINTER:
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
    return None

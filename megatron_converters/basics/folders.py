"""Names of folders as users give them."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import ConversionError, UsageError


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """Path of a folder that is there; raises `ConversionError` for any other."""
    folder = new_folder(path)
    try:
        exists = folder.is_dir()
    except OSError as error:
        raise ConversionError(f"cannot look at {path}: {error.strerror}") from error
    if not exists:
        raise ConversionError(f"{path} is no folder; give one that exists")
    return folder


def new_folder(path: str | os.PathLike[str]) -> Path:
    """Path of a folder that need not be there; raises `UsageError` for an empty name, which would mean the current folder."""
    if not os.fspath(path):
        raise UsageError("the name of a folder is empty; is a variable of the command line unset?")
    return Path(path)

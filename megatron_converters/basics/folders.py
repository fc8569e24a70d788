"""Names of folders as users give them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from .errors import ConversionError, MissingPath, UsageError


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """Path of a folder that is there; raises `UsageError` for a file, `MissingPath` where nothing is."""
    folder = new_folder(path)
    if _asked(path, folder.is_dir):
        return folder
    if _asked(path, folder.exists):
        raise UsageError(f"{path} is a file, but a folder is needed here; the one that it lies in is {folder.parent}")
    raise MissingPath(f"{path} is no folder; give one that exists")


def existing_path(path: str | os.PathLike[str]) -> Path:
    """Path of a folder or file that is there; raises `MissingPath` for any other."""
    found = new_folder(path)
    if not _asked(path, found.exists):
        raise MissingPath(f"{path} does not exist; give a folder or file that does")
    return found


def _asked(path: str | os.PathLike[str], question: Callable[[], bool]) -> bool:
    """Answer of the file system to a question about a path."""
    try:
        return question()
    except OSError as error:
        raise ConversionError(f"cannot look at {path}: {error.strerror}") from error


def new_folder(path: str | os.PathLike[str]) -> Path:
    """Path of a folder that need not be there; raises `UsageError` for an empty name, which would mean the current folder."""
    if not os.fspath(path):
        raise UsageError("the name of a folder is empty; is a variable of the command line unset?")
    return Path(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

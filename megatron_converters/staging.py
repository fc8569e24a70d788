"""Write under another name, show when complete: a killed or failed run never looks like a finished one."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from .errors import ConversionError


class Staging:
    """A hidden folder beside the final place, locked, so that two runs never write into one."""

    def __init__(self, save_dir: Path, name: str) -> None:
        """An empty folder; what a killed run left in it is removed. Raises if a living run holds it."""
        self.path = save_dir / f".{name}.incomplete"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise ConversionError(
                f"cannot make {self.path}: {error.strerror}; choose a folder that can be written"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ConversionError(
                f"another conversion is writing to {self.path}; wait for it or save elsewhere"
            ) from None
        for entry in self.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def discard(self) -> None:
        """Remove the folder; nothing if it is gone."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    def move_to(self, final: Path) -> None:
        """Show the folder under its final name, in one step; an older one there is removed first."""
        if final.exists():
            shutil.rmtree(final)
        os.replace(self.path, final)
        sync_folder(final.parent)
        self._unlock()

    def move_into(self, final: Path, last: Sequence[str]) -> None:
        """Move the entries into an existing folder, those named `last` at the end, and remove this one."""
        for name in sorted(os.listdir(self.path), key=lambda name: (name in last, name)):
            if (final / name).is_dir():
                shutil.rmtree(final / name)
            os.replace(self.path / name, final / name)
        self.path.rmdir()
        sync_folder(final)
        self._unlock()

    def _unlock(self) -> None:
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


def opened(staging: Staging | None) -> Staging:
    """The staging of a target that was prepared."""
    if staging is None:
        raise RuntimeError("prepare comes before commit")
    return staging


def check_space(folder: Path, needed: int) -> None:
    """Raise if the file system of `folder` (or its nearest parent that exists) has fewer than `needed` bytes free."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    status = os.statvfs(existing)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise ConversionError(
            f"{folder} needs {needed / 1e9:.2f} GB, but its file system has {free / 1e9:.2f} GB free; make room or save elsewhere"
        )


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    temporary = path.with_name(path.name + ".incomplete")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

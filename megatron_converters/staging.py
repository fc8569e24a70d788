"""Write under another name, show when complete: a killed or failed run never looks like a finished one, and can go on.

SAVE_DIR/.NAME.incomplete/files/     what will be shown, under its final names
SAVE_DIR/.NAME.incomplete/state/     what the run is, and which files are finished (`journal.py`)
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .errors import ConversionError

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


class Staging:
    """A hidden folder beside the final place; locked by the process that leads, so that two runs never write into one."""

    def __init__(self, save_dir: Path, name: str) -> None:
        """Only says where; `open` makes it."""
        self.path = save_dir / f".{name}.incomplete"
        self.files = self.path / "files"
        self.state = self.path / "state"
        self._lock = -1

    def open(self) -> None:
        """Make the folder if there is none, and lock it. Raises if a living run holds it."""
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
            self._unlock()
            raise ConversionError(
                f"another conversion is writing to {self.path}; wait for it or save elsewhere"
            ) from None
        except OSError as error:
            # Some network file systems have no locks. The journal's mark of the run still keeps two from mixing.
            if error.errno not in _NO_LOCKS:
                raise
        if not self.path.exists():  # a run that held the lock until now has ended and taken the folder away
            self._unlock()
            self.open()

    @property
    def held(self) -> bool:
        """Whether this process has opened the folder and not left it."""
        return self._lock >= 0

    def empty(self) -> None:
        """Remove what an earlier run left, and make the two folders."""
        self._forget()
        for entry in self.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self.files.mkdir()
        self.state.mkdir()

    def keep_only(self, finished: Sequence[str]) -> None:
        """Remove all files but those of these paths: what is not finished is written anew."""
        kept = {self.files / path for path in finished}
        for path in [path for path in self.files.rglob("*") if path.is_file() and path not in kept]:
            path.unlink()

    def leave(self) -> None:
        """Let another run have the folder, and go on from it."""
        self._unlock()

    def discard(self) -> None:
        """Remove the folder; nothing if it is gone."""
        with suppress(OSError):  # what cannot be renamed cannot be removed either
            self._forget()
        shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    def move_to(self, final: Path) -> None:
        """Show the files as a folder of their own, in one step; what was there before is removed afterwards.

        Nothing if an interrupted run has shown them already.
        """
        if not self.files.exists():
            return
        old = self.path / "replaced"
        if final.exists():
            os.replace(final, old)
        os.replace(self.files, final)
        sync_folder(final.parent)

    def move_into(self, final: Path, last: Sequence[str]) -> None:
        """Move the files into an existing folder, those named `last` at the end, in their order."""
        order = {name: number for number, name in enumerate(last, 1)}
        for name in sorted(os.listdir(self.files), key=lambda name: (order.get(name, 0), name)):
            if (final / name).is_dir():
                shutil.rmtree(final / name)
            os.replace(self.files / name, final / name)
        sync_folder(final)

    def _forget(self) -> None:
        """Take the state away in one step: a kill while the rest is removed must not leave one that is half true."""
        with suppress(FileNotFoundError):
            os.replace(self.state, self.path / f"forgotten-{secrets.token_hex(4)}")

    def _unlock(self) -> None:
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


def check_space(folder: Path, needed: int) -> None:
    """Raise if the file system of `folder` (or its nearest parent that exists) has fewer than `needed` bytes free."""
    free = free_space(folder)
    if needed > free:
        raise ConversionError(
            f"{folder} needs {needed / 1e9:.2f} GB, but its file system has {free / 1e9:.2f} GB free; make room or save elsewhere"
        )


def free_space(folder: Path) -> int:
    """Bytes free for this user on the file system of `folder` or its nearest parent that exists."""
    status = os.statvfs(nearest(folder))
    return status.f_bavail * status.f_frsize


def nearest(folder: Path) -> Path:
    """The folder, or the nearest parent that exists."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return existing


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step. Paths that are no text are written as they are."""
    temporary = path.with_name(path.name + ".incomplete")
    try:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

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
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ..basics.errors import ConversionError, reason_of
from ..basics.quantities import size

#: Seconds before each try to lock: one who only looks whether the folder is in use holds it for an instant.
_WAITS = (0.0, 0.2, 0.5)
_NO_LOCKS = {errno.ENOSYS, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


def unfinished_in(folder: Path) -> str | None:
    """What to say of a folder in which an interrupted run has left its files; None if none has."""
    left = sorted(path.name for path in folder.glob(".*.incomplete") if path.is_dir())
    if not left:
        return None
    return f"holds an unfinished conversion ({', '.join(left)}); run the same convert command again to finish it"


class Staging:
    """A hidden folder beside the final place, which the process that leads locks: two runs never write into one place."""

    def __init__(self, save_dir: Path, name: str) -> None:
        """Only says where; `open` makes it."""
        self._save_dir = save_dir
        self.path = save_dir / f".{name}.incomplete"
        self.files = self.path / "files"
        self.state = self.path / "state"
        self._lock = -1

    def open(self) -> None:
        """Lock the final place, and make the hidden folder there if there is none. Raises if a living run holds the place."""
        try:
            self._save_dir.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._save_dir, os.O_RDONLY)
            free = any(_lock(self._lock, fcntl.LOCK_EX, wait) for wait in _WAITS)
            if free:
                self.path.mkdir(exist_ok=True)
        except OSError as error:
            self._unlock()
            raise ConversionError(f"cannot make {self.path}: {reason_of(error)}") from error
        if not free:
            self._unlock()
            raise ConversionError(self._taken())

    def in_use(self) -> str | None:
        """Who is writing to the place, if a living run on this machine is."""
        try:
            fd = os.open(self._save_dir, os.O_RDONLY)
        except OSError:
            return None
        try:
            return None if _lock(fd, fcntl.LOCK_SH) else self._taken()
        finally:
            os.close(fd)

    def _taken(self) -> str:
        return f"another conversion is writing to {self._save_dir}; wait for it or save elsewhere"

    @property
    def held(self) -> bool:
        """Whether this process has opened the folder and not left it."""
        return self._lock >= 0

    def empty(self) -> None:
        """Remove what an earlier run left, and make the two folders."""
        self._forget()
        for entry in self.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
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
        if os.path.lexists(final):
            os.replace(final, old)
        os.replace(self.files, final)
        sync_folder(final.parent)

    def put(self, final: Path, text: str) -> None:
        """Replace a small file in one step, by way of this folder: beside `final` another run's would have the same name."""
        write_text(self.path / final.name, text)
        os.replace(self.path / final.name, final)
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


def _lock(fd: int, kind: int, wait: float = 0.0) -> bool:
    """Try to lock an open folder, after `wait` seconds; whether no living run holds it."""
    time.sleep(wait)
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # Some network file systems have no locks, or none for a folder. The journal's mark of the run still keeps two from mixing.
        if error.errno not in _NO_LOCKS:
            raise
    return True


def check_place(folder: Path) -> None:
    """Raise unless `folder` is one that this user can write to, or can be made."""
    existing = _nearest(folder, os.path.lexists)
    if not existing.is_dir():
        fault = "is a link to nothing" if existing.is_symlink() else "is no folder"
        raise ConversionError(f"{existing} {fault}, so nothing can be saved as {folder}; save elsewhere")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConversionError(f"{existing} cannot be written by this user; save elsewhere")


def check_space(folder: Path, needed: int) -> None:
    """Raise if the file system of `folder` (or its nearest parent that exists) has fewer than `needed` bytes free."""
    free = free_space(folder)
    if needed > free:
        raise ConversionError(
            f"{folder} needs {size(needed)}, but its file system has {size(free)} free; make room or save elsewhere"
        )


def free_space(folder: Path) -> int:
    """Bytes free for this user on the file system of `folder` or its nearest parent that exists."""
    status = os.statvfs(nearest(folder))
    return status.f_bavail * status.f_frsize


def nearest(folder: Path) -> Path:
    """The folder, or the nearest parent that exists."""
    return _nearest(folder, os.path.exists)


def _nearest(folder: Path, there: Callable[[Path], bool]) -> Path:
    existing = folder.absolute()
    while not there(existing):
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
    except OSError as error:  # a disk that is full names no file
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)

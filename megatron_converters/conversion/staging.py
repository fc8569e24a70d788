"""Hidden folder that is renamed when it is complete: a failed run never looks like a finished one, and can be resumed.

SAVE_DIR/.NAME.incomplete/files/     the output, under its final names
SAVE_DIR/.NAME.incomplete/state/     description of the run, and which files are finished (`journal.py`)
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ..basics.errors import ConversionError, reason_of
from ..basics.quantities import size

#: Seconds before each attempt to lock: a process that only checks whether the folder is in use locks it for an instant.
_LOCK_DELAYS = (0.0, 0.2, 0.5)
#: Errors of network file systems that have no locks, or none for folders.
_LOCKS_UNSUPPORTED = {errno.ENOSYS, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


def unfinished_in(folder: Path) -> str | None:
    """Message part, to follow the folder's name, if it holds an interrupted run's files; else None."""
    left = sorted(path.name for path in folder.glob(".*.incomplete") if path.is_dir())
    if not left:
        return None
    return f"holds an unfinished conversion ({', '.join(left)}); run the same convert command again to finish it"


class Staging:
    """Hidden folder in `save_dir`. The first process locks `save_dir`, so that two runs never write to one place."""

    def __init__(self, save_dir: Path, name: str) -> None:
        """Set the paths; `open` creates the folder."""
        self._save_dir = save_dir
        self.path = save_dir / f".{name}.incomplete"
        self.files = self.path / "files"
        self.state = self.path / "state"
        self._lock_fd = -1

    def open(self) -> None:
        """Lock `save_dir`, and create the hidden folder if there is none. Raises if a running conversion holds the lock."""
        try:
            self._save_dir.mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(self._save_dir, os.O_RDONLY)
            free = any(_try_lock(self._lock_fd, fcntl.LOCK_EX, wait) for wait in _LOCK_DELAYS)
            if free:
                self.path.mkdir(exist_ok=True)
        except OSError as error:
            self._unlock()
            raise ConversionError(f"cannot create {self.path}: {reason_of(error)}") from error
        if not free:
            self._unlock()
            raise ConversionError(self._in_use_message())

    def in_use(self) -> str | None:
        """Message that another conversion on this machine is writing to `save_dir`; None if none is."""
        try:
            fd = os.open(self._save_dir, os.O_RDONLY)
        except OSError:
            return None
        try:
            return None if _try_lock(fd, fcntl.LOCK_SH) else self._in_use_message()
        finally:
            os.close(fd)

    def _in_use_message(self) -> str:
        return f"another conversion is writing to {self._save_dir}; wait for it or save elsewhere"

    @property
    def held(self) -> bool:
        """Whether this process has opened the folder and not left it yet."""
        return self._lock_fd >= 0

    def empty(self) -> None:
        """Remove what an earlier run left, and create the two subfolders."""
        self._set_state_aside()
        for entry in self.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        self.files.mkdir()
        self.state.mkdir()

    def keep_only(self, finished: Sequence[str]) -> None:
        """Remove all files except the finished ones: unfinished files are written again from the start."""
        kept = {self.files / path for path in finished}
        for path in [path for path in self.files.rglob("*") if path.is_file() and path not in kept]:
            path.unlink()

    def leave(self) -> None:
        """Release the lock, so that another run can resume from the folder."""
        self._unlock()

    def discard(self) -> None:
        """Remove the folder, if it still exists."""
        with suppress(OSError):  # the state that cannot be renamed cannot be removed either
            self._set_state_aside()
        shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    def move_to(self, final: Path) -> None:
        """Rename the folder of files to `final` in one step; what was there before is removed afterwards.

        Does nothing if an interrupted run has done it already.
        """
        if not self.files.exists():
            return
        old = self.path / "replaced"
        if os.path.lexists(final):
            os.replace(final, old)
        os.replace(self.files, final)
        sync_folder(final.parent)

    def put(self, final: Path, text: str) -> None:
        """Replace a small file in one step; its temporary file is in this folder, where no other run's has the same name."""
        write_text(self.path / final.name, text)
        os.replace(self.path / final.name, final)
        sync_folder(final.parent)

    def move_into(self, final: Path, last: Sequence[str]) -> None:
        """Move the files into an existing folder, those in `last` at the end and in that order."""
        order = {name: number for number, name in enumerate(last, 1)}
        for name in sorted(os.listdir(self.files), key=lambda name: (order.get(name, 0), name)):
            if (final / name).is_dir():
                shutil.rmtree(final / name)
            os.replace(self.files / name, final / name)
        sync_folder(final)

    def _set_state_aside(self) -> None:
        """Rename the state in one step, so that a kill while the rest is removed leaves no partly valid state."""
        with suppress(FileNotFoundError):
            os.replace(self.state, self.path / f"forgotten-{os.urandom(4).hex()}")

    def _unlock(self) -> None:
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)


def _try_lock(fd: int, kind: int, wait: float = 0.0) -> bool:
    """Try to lock an open folder after `wait` seconds; returns whether no running conversion holds it."""
    time.sleep(wait)
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # Without locks, the session mark in the journal still keeps two runs from mixing.
        if error.errno not in _LOCKS_UNSUPPORTED:
            raise
    return True


def check_place(folder: Path) -> None:
    """Raise unless this user can write to `folder`, or create it."""
    existing = _nearest(folder, os.path.lexists)
    if not existing.is_dir():
        fault = "is a broken link" if existing.is_symlink() else "is no folder"
        raise ConversionError(f"{existing} {fault}, so nothing can be saved as {folder}; save elsewhere")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConversionError(f"this user cannot write to {existing}; save elsewhere")


def check_space(folder: Path, needed: int) -> None:
    """Raise if the file system of `folder`, or of its nearest existing parent, has fewer than `needed` bytes free."""
    free = free_space(folder)
    if needed > free:
        raise ConversionError(
            f"{folder} needs {size(needed)}, but its file system has {size(free)} free; free some space or save elsewhere"
        )


def free_space(folder: Path) -> int:
    """Bytes free for this user on the file system of `folder`, or of its nearest existing parent."""
    status = os.statvfs(nearest(folder))
    return status.f_bavail * status.f_frsize


def nearest(folder: Path) -> Path:
    """The folder itself, or its nearest existing parent."""
    return _nearest(folder, os.path.exists)


def _nearest(folder: Path, exists: Callable[[Path], bool]) -> Path:
    existing = folder.absolute()
    while not exists(existing):
        existing = existing.parent
    return existing


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that renames in it survive a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step. Paths in the text that are not valid UTF-8 keep their bytes."""
    temporary = path.with_name(path.name + ".incomplete")
    try:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # the error of a full disk has no file name
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)

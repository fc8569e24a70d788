"""A file whose layout is known before its first byte: created at full size, filled in place, completed at the end."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from ..errors import ConversionError, raise_all

Pieces = Iterable[tuple[int, bytes]]


@dataclass(frozen=True)
class Layout:
    """What a file will hold, decided without touching the disk.

    `regions` gives each tensor's (offset, bytes); `finish` takes each tensor's CRC-32 (zeros unless `checksums`) and
    gives the rest of the file as (offset, bytes). It is written last, so that a file left by a killed run never reads
    as a complete one.
    """

    nbytes: int
    regions: Mapping[str, tuple[int, int]]
    finish: Callable[[Mapping[str, int]], Pieces]
    checksums: bool

    def create(self, path: str | os.PathLike[str]) -> OutputFile:
        """The file at its full size, to be filled; replaces an existing one."""
        return OutputFile(path, self)


@dataclass
class _Region:
    offset: int
    nbytes: int
    filled: int = 0
    crc: int = 0


class OutputFile:
    """A file being filled: `write` every tensor, then `close`; or `discard` it."""

    def __init__(self, path: str | os.PathLike[str], layout: Layout) -> None:
        self.path = os.fspath(path)
        self.nbytes = layout.nbytes
        self._layout = layout
        self._regions = {name: _Region(offset, nbytes) for name, (offset, nbytes) in layout.regions.items()}
        self._fd = -1
        try:
            with self._disk_errors("the file"):
                self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
                os.ftruncate(self._fd, self.nbytes)
        except ConversionError:
            if self._fd >= 0:
                self.discard()
            raise

    def write(self, name: str, start: int, data: memoryview | npt.NDArray[Any]) -> None:
        """Write C-contiguous `data` at byte `start` of the tensor `name`.

        Calls for one name come in ascending order without gaps, from one thread at a time; different names may be
        written by different threads. Raises `ConversionError` for a breach of this and for a full or failing disk.
        """
        region = self._regions.get(name)
        if region is None:
            raise ConversionError(f"{self.path} was laid out without a tensor called {name}")
        if data.nbytes == 0:
            return
        stop = start + data.nbytes
        if start != region.filled or stop > region.nbytes:
            raise ConversionError(
                f"{self.path}: bytes {start} to {stop} of {name} ({region.nbytes} bytes) do not follow on the "
                f"{region.filled} bytes written before"
            )
        view = (data if isinstance(data, memoryview) else data.data).cast("B")
        with self._disk_errors(name):
            self._put(view, region.offset + start)
        if self._layout.checksums:
            region.crc = zlib.crc32(view, region.crc)
        region.filled = stop

    def close(self) -> None:
        """Complete the file, flush it to the disk and close it; closing it again does nothing.

        Raises `ConversionError` naming each tensor that was not written completely; the file is then still open.
        """
        if self._fd < 0:
            return
        raise_all(
            f"{self.path} is incomplete:",
            (
                f"{name}: {region.filled} of {region.nbytes} bytes written"
                for name, region in self._regions.items()
                if region.filled != region.nbytes
            ),
        )
        with self._disk_errors("its directory"):
            for offset, data in self._layout.finish({name: region.crc for name, region in self._regions.items()}):
                self._put(memoryview(data), offset)
            os.fsync(self._fd)
            fd, self._fd = self._fd, -1
            os.close(fd)

    def discard(self) -> None:
        """Close and delete the file; one that is gone already is no error."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        with suppress(FileNotFoundError):
            os.unlink(self.path)

    def _put(self, view: memoryview, offset: int) -> None:
        """`os.pwrite` in full: one call may write less than asked (2 GiB at most on Linux)."""
        done = os.pwrite(self._fd, view, offset)
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], offset + done)

    @contextmanager
    def _disk_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = f"; {self.nbytes} bytes are needed there, free some or choose another disk" if full else ""
            raise ConversionError(f"cannot write {what} to {self.path}: {error.strerror}{remedy}") from error

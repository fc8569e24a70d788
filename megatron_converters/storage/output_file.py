"""Output files whose layout is known in advance: created at full size, filled in place, completed at the end."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from ..basics.errors import ConversionError, DiskError, raise_all, reason_of
from .checksum import combined, crc32, digest
from .flushing import flush

#: (offset in the file, content) of each write.
Writes = Iterable[tuple[int, bytes]]
_BYTE = np.dtype(np.uint8)
#: Writeback to disk starts after this many bytes: it then overlaps with copying, and the flush at the end is short.
_WRITEBACK_BYTES = 64 << 20
#: A call of the system, after which a thread waits for the interpreter, takes as long as copying about so much.
_JOINED_BYTES = 128 << 10


@dataclass(frozen=True)
class FileLayout:
    """Layout of a file, decided without touching the disk.

    `regions` gives the (offset, bytes) of each tensor; `finish` takes the CRC-32 of each tensor and gives the rest of the
    file as (offset, content), which is written last, so that a file left by a killed run never reads as a complete one.
    `trailer` gives, by name and CRC-32, the bytes between a tensor and the next one, where they follow from these, as in `finish`.
    They are written with the tensor, since a page that the disk has taken already would have to be read and written again.
    `structure` is a digest of all that decides that rest, except the checksums: names, shapes, dtypes, arguments.
    `parts` gives the parts of tensors whose parts are filled independently, which follow each other: their number if they are
    equally large, else the bytes of each.
    `shapes` gives the shape of each tensor as stored in the file.
    """

    nbytes: int
    regions: Mapping[str, tuple[int, int]]
    finish: Callable[[Mapping[str, int]], Writes]
    structure: str
    parts: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    trailer: Callable[[str, int], bytes] = lambda name, crc: b""

    def create(self, path: str | os.PathLike[str]) -> OutputFile:
        """Create the file at its full size, to be filled; replaces an existing one."""
        return OutputFile(path, self)


def fixed(content: bytes) -> FileLayout:
    """Layout of a file of this content, without tensors."""
    return FileLayout(len(content), {}, lambda _: [(0, content)], digest([content]))


@dataclass(slots=True)
class _Part:
    """Part of a tensor; `offset` counts bytes from the start of the file, `start` from that of the tensor."""

    offset: int
    start: int
    nbytes: int
    filled: int = 0
    crc: int = 0


_START = attrgetter("start")


class OutputFile:
    """A file being filled: `write` every tensor, then `close`; or `discard` it."""

    def __init__(self, path: str | os.PathLike[str], layout: FileLayout) -> None:
        self.path = os.fspath(path)
        self.nbytes = layout.nbytes
        self._layout = layout
        self._tensors = {name: _parts(*region, layout.parts.get(name, 1)) for name, region in layout.regions.items()}
        self._open_parts = sum(part.nbytes > 0 for parts in self._tensors.values() for part in parts)
        #: Ends of the tensors that have their trailers.
        self._trailed: set[int] = set()
        self._state_lock = threading.Lock()
        # Without it the system makes the writers of one file spin while they wait; blocked threads leave the CPU to others.
        self._write_lock = threading.Lock()
        self._claimed = False
        self._none_pending = (self.nbytes, 0, 0)
        self._pending = self._none_pending  # first offset, end and bytes written since the last writeback
        self._fd = -1
        #: Digest of the bytes outside the tensors, in file order, once the file is complete. Unlike a layout's `structure`, it can
        #: be computed from the file, since a zip's directory repeats its tensors' checksums.
        self.outside = ""
        try:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.ftruncate(self._fd, self.nbytes)
        except OSError as error:
            if self._fd >= 0:
                self.discard()
            raise self._disk_error("the file", error) from error

    def write(self, name: str, start: int, data: memoryview | npt.NDArray[Any]) -> None:
        """Write C-contiguous `data` at byte `start` of the tensor `name`.

        Calls for one part of a tensor must come in ascending order without gaps, from one thread at a time; other threads
        may write other parts and tensors. Raises `ConversionError` if they do not, and for a full or failing disk.
        """
        parts = self._tensors.get(name)
        if parts is None:
            raise ConversionError(f"{self.path} was laid out without a tensor called {name}")
        nbytes = data.nbytes
        if nbytes == 0:
            return
        part = parts[0] if len(parts) == 1 else parts[max(bisect_right(parts, start, key=_START) - 1, 0)]
        filled, stop = part.filled, start + nbytes
        if start != part.start + filled or stop > part.start + part.nbytes:
            raise ConversionError(
                f"{self.path}: bytes {start} to {stop} of {name} do not follow the "
                f"{part.start + filled} bytes written before, or exceed its {part.start + part.nbytes}"
            )
        # Viewed as bytes: numpy exports no buffer of unaligned elements, which embedded archives contain.
        view = data.cast("B") if isinstance(data, memoryview) else data.reshape(-1).view(_BYTE).data
        offset = part.offset + filled
        part.crc = crc32(view, part.crc)
        part.filled = filled + nbytes
        complete = part.filled == part.nbytes
        # The parts of a tensor may be completed at the same time.
        trailer = self._layout.trailer(name, part.crc) if complete and len(parts) == 1 else b""
        try:
            with self._write_lock:
                for content, place in _writes(view, trailer, offset):
                    self._pwrite(content, place)
                self._add_pending(offset, nbytes)
        except OSError as error:
            raise self._disk_error(name, error) from error
        if complete:
            with self._state_lock:
                self._open_parts -= 1
                if trailer:
                    self._trailed.add(offset + nbytes)

    def writeback(self) -> Callable[[], None] | None:
        """Return what begins to write to the disk the bytes that wait for it, once they are many; it may wait for the disk."""
        if self._pending[2] < _WRITEBACK_BYTES or not hasattr(os, "posix_fadvise"):
            return None
        with self._write_lock:
            (first, end, _), self._pending = self._pending, self._none_pending
        return lambda: self._write_back(first, end)

    def _write_back(self, first: int, end: int) -> None:
        """Begin to write dirty pages, as Linux does here; those that are being written stay in memory."""
        try:
            if self._fd >= 0 and first < end:
                os.posix_fadvise(self._fd, first, end - first, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise self._disk_error("its tensors", error) from error

    @property
    def closed(self) -> bool:
        """Whether the file is complete or discarded."""
        return self._fd < 0

    def claim(self) -> bool:
        """Whether the caller must close the file: true once all tensors are complete, for the first caller only."""
        if self._open_parts:
            return False
        with self._state_lock:
            first = not self._claimed
            self._claimed = True
        return first

    def checksums(self) -> dict[str, int]:
        """CRC-32 of each tensor's bytes written so far."""
        return {name: combined([(part.crc, part.filled) for part in parts]) for name, parts in self._tensors.items()}

    def close(self, go_on: Callable[[], None] = lambda: None) -> None:
        """Complete the file, flush it to the disk and close it; closing it again does nothing.

        A flush takes long, so `go_on()` is called from time to time, and may raise.
        Raises `ConversionError` naming each tensor that was not written completely; the file is then still open.
        """
        if self._fd < 0:
            return
        raise_all(
            f"{self.path} is incomplete:",
            (
                f"{name}: {sum(part.filled for part in parts)} of {sum(part.nbytes for part in parts)} bytes written"
                for name, parts in self._tensors.items()
                if any(part.filled != part.nbytes for part in parts)
            ),
        )
        try:
            rest = sorted(self._layout.finish(self.checksums()))
            for offset, data in rest:
                if offset not in self._trailed:
                    self._pwrite(memoryview(data), offset)
            self.outside = digest(data for _, data in rest)
            flush(self._fd, self.nbytes, go_on)
            fd, self._fd = self._fd, -1
            os.close(fd)
        except OSError as error:
            raise self._disk_error("its directory", error) from error

    def discard(self) -> None:
        """Close and delete the file; it may be gone already."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        with suppress(FileNotFoundError):
            os.unlink(self.path)

    def _pwrite(self, view: memoryview, offset: int) -> None:
        """`os.pwrite` in full: one call may write less than asked (2 GiB at most on Linux)."""
        done = os.pwrite(self._fd, view, offset)
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], offset + done)

    def _add_pending(self, offset: int, nbytes: int) -> None:
        first, end, count = self._pending
        stop = offset + nbytes
        self._pending = offset if offset < first else first, stop if stop > end else end, count + nbytes

    def _disk_error(self, what: str, error: OSError) -> DiskError:
        return DiskError(f"cannot write {what} to {self.path}: {reason_of(error)}")


def _writes(view: memoryview, trailer: bytes, offset: int) -> list[tuple[memoryview, int]]:
    """Writes of a tensor's last bytes and its trailer: one where copying costs less than another call."""
    if not trailer:
        return [(view, offset)]
    if len(view) <= _JOINED_BYTES:
        return [(memoryview(b"".join((view, trailer))), offset)]
    return [(view, offset), (memoryview(trailer), offset + len(view))]


def _parts(offset: int, nbytes: int, parts: int | tuple[int, ...]) -> list[_Part]:
    sizes = (nbytes // parts,) * parts if isinstance(parts, int) else parts
    if sum(sizes) != nbytes:
        raise ConversionError(f"{nbytes} bytes cannot be filled as {len(sizes)} parts of {sum(sizes)} bytes together")
    starts = accumulate(sizes, initial=0)
    return [_Part(offset + start, start, size) for start, size in zip(starts, sizes, strict=False)]

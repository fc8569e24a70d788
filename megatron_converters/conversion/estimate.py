"""Estimate of a conversion's time: a sample of the source is copied to the disk and flushed, for less than half a second.

Without the flush, the system's memory would be measured, which is many times faster than the disk.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..model.slots import refs
from ..storage.tensor import release_mappings
from .composing import as_matrix
from .copying import default_lanes
from .dry_run import Forecast
from .endpoint import Source
from .gathering import CHUNK_BYTES
from .staging import nearest

#: Bytes of the first step, factor from one to the next, and the seconds in which another step must be expected to end.
_FIRST_BYTES, _FACTOR, _SECONDS = 4 << 20, 2, 0.4
#: Bytes of the smallest step that counts: flushing a few bytes takes as long as flushing many.
_LEAST_BYTES = 8 << 20
#: Bytes of the largest step, and how many times what all steps write must be free.
_MOST_BYTES, _FREE_FACTOR = 128 << 20, 8
#: Seconds for Python and its imports (measured by scripts/bench).
_START_SECONDS = 0.4
#: Factors between a short sample and a long run: at worst the source comes from the same disk, and the disk slows down once its
#: cache is full; a cast, or another computation, takes time, too.
_SLOWER, _COMPUTING = 3.0, 2.0


class _Step(NamedTuple):
    """Sample that was copied and flushed: its bytes, and the seconds of both."""

    nbytes: int
    copying: float
    flushing: float


def measure(result: Forecast, source: Source, save_dir: Path, workers: int = 1) -> None:
    """Set rates and seconds of a forecast, by a short copy of the source into an unnamed file, which leaves nothing behind."""
    if result.free < _FREE_FACTOR * _MOST_BYTES:  # what little is free is left alone
        return
    try:
        steps = _steps(source, nearest(save_dir))
    finally:
        release_mappings()
    counted = [step for step in steps if step.nbytes >= _LEAST_BYTES][-3:] or steps[-1:]
    if counted:
        rates = [step.nbytes / (step.copying + step.flushing) for step in counted]
        result.rate_least, result.rate_most = min(rates), max(rates)
        result.seconds_least, result.seconds_most = _seconds(result, counted, workers)


def _seconds(result: Forecast, steps: list[_Step], workers: int) -> tuple[float, float]:
    """Least and most seconds. Lanes and workers copy at the same time, and while the disk is written; the disk is one."""
    copying = [step.copying / step.nbytes for step in steps]
    flushing = [step.flushing / step.nbytes for step in steps]
    least = max(min(copying) / (default_lanes() * workers), min(flushing))
    most = (max(copying) + max(flushing)) * _SLOWER * (_COMPUTING if result.casts or result.computed else 1.0)
    start = _START_SECONDS if result.left else 0.0
    return start + result.left * least, start + result.left * most


def _steps(source: Source, folder: Path) -> list[_Step]:
    """Copies of the source's first tensors to `folder`, each larger than the one before; none where that is not possible."""
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_WRONLY)
    except (AttributeError, OSError):  # not every system and file system has unnamed files
        return []
    steps: list[_Step] = []
    begun, wanted, at = time.monotonic(), _FIRST_BYTES, 0
    chunks = _chunks(source)
    try:
        while wanted <= _MOST_BYTES and _time_for_another(steps, begun):
            start = time.monotonic()
            done = _write(fd, at, chunks, wanted)
            copied = time.monotonic()
            os.fsync(fd)
            if done:
                steps.append(_Step(done, copied - start, max(time.monotonic() - copied, 1e-6)))
            if done < wanted:  # the source has no more
                break
            wanted, at = wanted * _FACTOR, at + done
    except OSError:  # a full disk, which the forecast shows in bytes
        return []
    finally:
        os.close(fd)
    return steps


def _time_for_another(steps: list[_Step], begun: float) -> bool:
    last = steps[-1].copying + steps[-1].flushing if steps else 0.0
    return time.monotonic() - begun + _FACTOR * last <= _SECONDS


def _write(fd: int, at: int, chunks: Iterator[npt.NDArray[np.generic]], wanted: int) -> int:
    """Write chunks until there are as many bytes as wanted, or no more; returns the bytes written."""
    done = 0
    while done < wanted:
        chunk = next(chunks, None)
        if chunk is None:
            break
        done += os.pwrite(fd, chunk.tobytes(), at + done)
    return done


def _chunks(source: Source) -> Iterator[npt.NDArray[np.generic]]:
    """Elements of the source's tensors, about a megabyte at a time."""
    for ref in refs(source.spec):
        for piece in source.read(ref).pieces:
            count, cols = as_matrix(piece.data.shape)
            rows = max(1, CHUNK_BYTES // max(cols * piece.data.dtype.itemsize, 1))
            for start in range(0, count, rows):
                yield piece.elements(slice(start, min(start + rows, count)), slice(0, cols))

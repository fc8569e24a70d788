"""Tensors on disk, and the mapped files that hold them."""

from __future__ import annotations

import math
import mmap
import os
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..basics.dtypes import DType
from ..basics.errors import ConversionError, reason_of
from ..basics.pickle_proof import Sealed


@dataclass(frozen=True)
class StoredTensor(Sealed):
    """Tensor inside a file: `offset` in bytes from the file's start, `strides` in elements.

    Readers guarantee that the file is long enough for it, so that mapping it cannot fault.
    """

    path: str
    offset: int
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def columns(self, start: int, stop: int) -> StoredTensor:
        """View of a range of a matrix's columns."""
        offset = self.offset + start * self.strides[1] * self.dtype.itemsize
        return StoredTensor(self.path, offset, self.dtype, (self.shape[0], stop - start), self.strides)

    def item(self, number: int) -> StoredTensor:
        """View of one of the tensors that this one stacks along its first axis."""
        offset = self.offset + number * self.strides[0] * self.dtype.itemsize
        return StoredTensor(self.path, offset, self.dtype, self.shape[1:], self.strides[1:])

    def transposed(self) -> StoredTensor:
        """View of the transposed matrix."""
        return StoredTensor(self.path, self.offset, self.dtype, self.shape[::-1], self.strides[::-1])

    def reshaped(self, shape: tuple[int, ...], dtype: DType | None = None) -> StoredTensor:
        """View of the same bytes in another shape and dtype; raises `ConversionError` if they do not lie in row-major order."""
        if self.strides != contiguous_strides(self.shape):
            raise ConversionError(
                f"{self.path} holds a quantised tensor of shape {list(self.shape)} with strides; save it again"
            )
        return StoredTensor(self.path, self.offset, dtype or self.dtype, shape, contiguous_strides(shape))

    def array(self) -> npt.NDArray[Any]:
        """Read-only view of the mapped file, in the dtype's carrier type. No bytes are read until it is used.

        Raises `ConversionError` if the file has become shorter since it was opened.
        """
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype.carrier)
        strides = _byte_strides(self.strides, self.dtype.itemsize)
        try:
            return np.ndarray(self.shape, self.dtype.carrier, mapped(self.path), self.offset, strides)
        except (TypeError, ValueError) as error:  # it ends beyond the mapping, or the file is empty
            raise ConversionError(f"{self.path} has become shorter since it was opened") from error


@dataclass(frozen=True, eq=False)
class MemoryTensor:
    """Tensor in memory, as an array of the carrier type that keeps the memory alive."""

    dtype: DType
    shape: tuple[int, ...]
    values: npt.NDArray[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.values.nbytes

    def array(self) -> npt.NDArray[Any]:
        """Elements, in the carrier type."""
        return self.values


def zeros(dtype: DType, shape: tuple[int, ...]) -> MemoryTensor:
    """Tensor of zeros in memory."""
    return MemoryTensor(dtype, shape, np.zeros(shape, dtype.carrier))


def writable_view(data: StoredTensor) -> npt.NDArray[Any]:
    """Array in the dtype's carrier type on a private mapping, since torch expects writable memory; writes never reach the file."""
    if 0 in data.shape:
        return np.empty(data.shape, data.dtype.carrier)
    size = data.dtype.itemsize
    start = (
        data.offset - data.offset % mmap.ALLOCATIONGRANULARITY
    )  # map only its own pages, since writable pages count as memory
    elements = 1 + sum((count - 1) * step for count, step in zip(data.shape, data.strides, strict=True))
    with open(data.path, "rb") as file:
        private = mmap.mmap(file.fileno(), data.offset + elements * size - start, access=mmap.ACCESS_COPY, offset=start)
    strides = tuple(step * size for step in data.strides)
    return np.ndarray(data.shape, data.dtype.carrier, private, data.offset - start, strides)


def as_torch(data: StoredTensor) -> Any:
    """Torch tensor that is mapped from the file (imports torch)."""
    import torch

    return torch.from_numpy(writable_view(data).view(f"i{data.dtype.itemsize}")).view(data.dtype.torch)


@lru_cache(maxsize=1024)
def _byte_strides(strides: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(step * itemsize for step in strides)


@lru_cache(maxsize=1024)
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides, in elements, of a tensor of `shape`."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


#: By path: the file's identity (device, inode, bytes, modification time in ns), its mapping, and when it was last looked at.
_MAPPINGS: dict[str, tuple[tuple[int, ...], mmap.mmap, float]] = {}
#: Seconds for which a file counts as unchanged. To look takes as long as to copy some kilobytes, which small tensors have.
_TRUSTED_SECONDS = 0.05


def forget_mapping(path: str) -> None:
    """Look at a file again before its mapping is used, since it is opened anew."""
    if path in _MAPPINGS:
        _MAPPINGS[path] = *_MAPPINGS[path][:2], -math.inf


def release_mappings() -> None:
    """Forget all mapped files; each is unmapped once no array uses it. A conversion still running maps its files anew."""
    _MAPPINGS.clear()


def mapped(path: str) -> mmap.mmap:
    """Read-only mapping of a file, made once per process and again if the file was replaced or changed before it was opened.

    What changes later is noticed within a moment.
    """
    now = time.monotonic()
    known = _MAPPINGS.get(path)
    if known is not None and now - known[2] < _TRUSTED_SECONDS:
        return known[1]
    try:
        if known is None or known[0] != _identity(os.stat(path)):
            with open(path, "rb", buffering=0) as file:
                identity = _identity(os.fstat(file.fileno()))
                known = identity, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), now
        _MAPPINGS[path] = *known[:2], now
        return known[1]
    except OSError as error:
        raise ConversionError(f"cannot open {path}: {reason_of(error)}") from error


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

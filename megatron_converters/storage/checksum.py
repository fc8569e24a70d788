"""CRC-32 of data that arrives in parts: the checksum of zip files and of a conversion's manifest.

isal computes it as fast as memory is read (50 GB/s); zlib, which is always there, at 3 to 4 GB/s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache

try:
    from isal.isal_zlib import crc32
except ImportError:  # isal is optional, only faster
    from zlib import crc32

__all__ = ["blocks", "combined", "crc32", "digest", "file_crc32"]

#: zip's polynomial, bits reversed (APPNOTE 4.4.7).
_POLYNOMIAL = 0xEDB88320

_Matrix = tuple[int, ...]


def combined(parts: Sequence[tuple[int, int]]) -> int:
    """CRC-32 of concatenated parts, from the (CRC-32, bytes) of each."""
    total = 0
    for crc, nbytes in parts:
        total = _append_zeros(total, nbytes) ^ crc
    return total


def digest(blocks: Iterable[bytes]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the concatenated blocks."""
    total = hashlib.sha256()
    for block in blocks:
        total.update(block)
    return total.hexdigest()[:16]


def blocks(path: str, offset: int, nbytes: int, chunk: int = 1 << 20) -> Iterator[bytes]:
    """Byte range of a file, `chunk` bytes at a time. Raises `EOFError` if the file ends early."""
    left = nbytes
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while left:
            data = file.read(min(chunk, left))
            if not data:
                raise EOFError(f"{path} ends {left} bytes early")
            yield data
            left -= len(data)


def file_crc32(path: str, offset: int, nbytes: int, progress: Callable[[int], None] = lambda _: None) -> int:
    """CRC-32 of a byte range of a file. `progress` is called with the size of each block read."""
    value = 0
    for data in blocks(path, offset, nbytes):
        value = crc32(data, value)
        progress(len(data))
    return value


def _append_zeros(crc: int, nbytes: int) -> int:
    """CRC of the same data followed by `nbytes` zero bytes: one linear map for each binary digit of `nbytes`."""
    digit = 0
    while nbytes and crc:
        if nbytes & 1:
            crc = _multiplied(_zero_bytes(digit), crc)
        nbytes >>= 1
        digit += 1
    return crc


def _multiplied(matrix: _Matrix, vector: int) -> int:
    total, row = 0, 0
    while vector:
        if vector & 1:
            total ^= matrix[row]
        vector >>= 1
        row += 1
    return total


def _squared(matrix: _Matrix) -> _Matrix:
    return tuple(_multiplied(matrix, row) for row in matrix)


@cache  # which threads may fill at the same time, unlike a list that grows
def _zero_bytes(digit: int) -> _Matrix:
    """Matrix that appends 2 ** digit zero bytes to a CRC."""
    if digit:
        return _squared(_zero_bytes(digit - 1))
    one_bit: _Matrix = (_POLYNOMIAL, *(1 << bit for bit in range(31)))
    return _squared(_squared(_squared(one_bit)))

"""Weights of one byte each, with a scale for a block of them, a row, or all: FP8 and INT8.

Blocks are as DeepSeek-V3 publishes them (inference/kernel.py, `weight_dequant_kernel`): a matrix of float8_e4m3fn, and one scale
for each block of it, mostly 128×128. The last block of a row or column may be short.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..basics.casting import E4M3FN, all_finite, rounded
from ..basics.dtypes import DType
from .decoding import STEP, Array, Quantised, Rows, numbers_of, scales_of, steps

#: Number that each code stands for, by element type.
VALUES = {"float8_e4m3fn": E4M3FN, "int8": np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)}
#: Height and width of a block; 0 for the whole matrix's.
Block = tuple[int, int]
_CODES = 256
#: Rows and elements of a block from which on it pays to compute all products of its scale and a code.
_TALL, _LARGE = 16, 4 * _CODES


def block_counts(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Number of blocks along each axis of a matrix of `shape`, or of each of a stack; the last one may be short."""
    *stack, rows, cols = shape
    sizes = zip((rows, cols), block, strict=True)
    return (*stack, *(-(-size // side) if side else 1 for size, side in sizes))


def block_words(block: Block) -> str:
    """Words for what shares a scale."""
    height, width = block
    if height and width:
        return f"in groups of {width}" if height == 1 else f"in blocks of {height}×{width}"
    return "with a scale for each row" if height == 1 else "with one scale"


@dataclass(frozen=True)
class ScaledBlocks(Quantised):
    """Matrix of codes of one byte with a scale for each block: value = bfloat16(float32(code) * float32(scale))."""

    block: Block

    @property
    def computed(self) -> str:
        """Words for what is done to the stored tensors."""
        return f"decoded from {self.weight.dtype} {block_words(self.block)}"

    def _decoded(self, rows: Rows, cols: slice, dtype: DType, room: Array | None) -> Array | None:
        height, width = (side or size for side, size in zip(self.block, self.shape, strict=True))
        codes = self.weight.array()[rows, cols]
        result = np.empty(codes.shape, dtype.carrier) if room is None else room
        blocks = slice(cols.start // width, -(-cols.stop // width))
        if isinstance(rows, slice) and height >= _TALL and height * width >= _LARGE:
            return result if self._look_up(rows, cols, blocks, dtype, codes, result) else None
        numbers, columns = numbers_of(rows, self.shape[0]) // height, np.arange(cols.start, cols.stop) // width
        scales = self.scale.array()[:, blocks].take(numbers, 0)
        values = VALUES[self.weight.dtype.name]
        for part in steps(*codes.shape):
            factors = scales_of(scales[part], self.scale.dtype)
            factors = factors if factors.shape[1] == 1 else factors.take(columns - blocks.start, 1)
            result[part] = rounded(values.take(codes[part]) * factors, dtype)
        return result if all_finite(result, dtype) else None

    def _look_up(self, rows: slice, cols: slice, blocks: slice, dtype: DType, codes: Array, result: Array) -> bool:
        """Write elements, looked up: in one block a code has one value. Returns whether all are numbers."""
        height, width = (side or size for side, size in zip(self.block, self.shape, strict=True))
        places, in_range = _KEPT.places(cols, width), True
        lowest = places.view(np.uint8)[:, :: places.itemsize]  # which the code of an element is
        for row in range(rows.start // height, -(-rows.stop // height)):
            start, stop = max(rows.start, row * height) - rows.start, min(rows.stop, (row + 1) * height) - rows.start
            table, finite = _KEPT.table(self, row, blocks, dtype)
            in_range &= finite
            for part in steps(stop - start, cols.stop - cols.start):
                count, found = part.stop - part.start, slice(start + part.start, start + part.stop)
                lowest[:count] = codes[found]
                np.take(table, places[:count], out=result[found], mode="clip")  # "raise" would copy `out`
        if not in_range:  # for some codes, which need not be there
            return all_finite(result, dtype)
        return not (self.weight.dtype.name == "float8_e4m3fn" and _has_nan(codes))

    def table(self, row: int, blocks: slice, dtype: DType) -> tuple[Array, bool]:
        """What each code is in each of these blocks of a row of blocks, and whether all are numbers but for codes that are none."""
        scales = scales_of(self.scale.array()[row, blocks], self.scale.dtype)
        values = VALUES[self.weight.dtype.name]
        products = rounded(scales[:, None] * values, dtype)
        return products.reshape(-1), all_finite(products[:, ~np.isnan(values)], dtype)

    def _no_numbers(self, rows: Rows, cols: slice) -> bool:
        return bool(np.isnan(VALUES[self.weight.dtype.name][self.weight.array()[rows, cols]]).any())


class _Kept(threading.local):
    """What a thread keeps for the next chunk: places of columns in a table, and the table of a row of blocks."""

    def __init__(self) -> None:
        self._columns, self._places = (0, 0, 0), np.empty((0, 0), np.int64)
        self._owner: tuple[Any, ...] = ()
        self._table: tuple[Array, bool] = np.empty(0), True

    def places(self, cols: slice, width: int) -> npt.NDArray[np.int64]:
        """Places of the code 0 in blocks of this width, for the rows of a step; the lowest byte of each may be overwritten."""
        if self._columns != (cols.start, cols.stop, width):
            numbers = np.arange(cols.start, cols.stop)
            self._places = np.empty((max(1, STEP // numbers.size), numbers.size), np.int64)
            self._places[...] = (numbers // width - cols.start // width) * _CODES
            self._columns = cols.start, cols.stop, width
        return self._places

    def table(self, matrix: ScaledBlocks, row: int, blocks: slice, dtype: DType) -> tuple[Array, bool]:
        """Table of a row of blocks."""
        owner = matrix, row, blocks.start, blocks.stop, dtype
        if not self._owner or self._owner[0] is not matrix or self._owner[1:] != owner[1:]:
            self._owner, self._table = owner, matrix.table(row, blocks, dtype)
        return self._table


_KEPT = _Kept()


def _has_nan(codes: Array) -> bool:
    """Whether any code of float8_e4m3fn stands for no number: those of all bits set, with either sign."""
    return int(codes.view(np.int8).max(initial=0)) == 0x7F or int(codes.max(initial=0)) == 0xFF

"""Weights of one byte each, with a scale for a block of them, a row, or all: FP8 and INT8.

Blocks are as DeepSeek-V3 publishes them (inference/kernel.py, `weight_dequant_kernel`): a matrix of float8_e4m3fn, and one scale
for each block of it, mostly 128×128. The last block of a row or column may be short.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..basics.casting import E4M3FN, rounded
from ..basics.dtypes import DType
from .decoding import STEP, Array, Quantised, Rows, numbers_of, scales_of, steps

#: Number that each code stands for, by element type.
VALUES = {"float8_e4m3fn": E4M3FN, "int8": np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)}
#: Height and width of a block; 0 for the whole matrix's.
Block = tuple[int, int]
_CODES = 256


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

    def _decoded(self, rows: Rows, cols: slice, dtype: DType, room: Array | None) -> Array:
        height, width = (side or size for side, size in zip(self.block, self.shape, strict=True))
        codes = self.weight.array()[rows, cols]
        block_rows = numbers_of(rows, self.shape[0]) // height
        top, left = int(block_rows.min(initial=self.shape[0])), cols.start // width
        blocks = self.scale.array()[top : int(block_rows.max(initial=top)) + 1, left : -(-cols.stop // width)]
        factors = scales_of(blocks, self.scale.dtype)
        block_rows, block_cols = block_rows - top, np.arange(cols.start, cols.stop) // width - left
        values = VALUES[self.weight.dtype.name]
        if factors.size * _CODES >= codes.size:
            return rounded(values[codes] * factors.take(block_rows, 0).take(block_cols, 1), dtype)
        result = np.empty(codes.shape, dtype.carrier) if room is None else room
        _look_up(codes, rounded(factors[:, :, None] * values, dtype), block_rows, block_cols, result)
        return result

    def _no_numbers(self, rows: Rows, cols: slice) -> bool:
        return bool(np.isnan(VALUES[self.weight.dtype.name][self.weight.array()[rows, cols]]).any())


class _Places(threading.local):
    """Memory of a thread for places in a table: to get it from the system each time costs as much as the arithmetic."""

    def __init__(self) -> None:
        self._memory = np.empty(2 * STEP, np.int64)

    def of(self, rows: int, cols: int) -> npt.NDArray[np.int64]:
        """Matrix of these sizes, uninitialised; the same memory at each call."""
        if rows * cols > self._memory.size:
            self._memory = np.empty(rows * cols, np.int64)
        return self._memory[: rows * cols].reshape(rows, cols)


_PLACES = _Places()


def _look_up(
    codes: Array, products: Array, rows: npt.NDArray[np.int64], cols: npt.NDArray[np.int64], result: Array
) -> None:
    """Write `products[rows, cols, codes]`, for codes of a matrix and the blocks of its rows and columns."""
    table, row_places = products.reshape(-1), rows * (products.shape[1] * _CODES)
    for part in steps(*codes.shape):
        count, width = codes[part].shape
        if part.start == 0:  # all steps share the places, which differ in their lowest bytes: these are the codes
            places = _PLACES.of(count, width)
            places[...] = cols * _CODES
            lowest = places.view(np.uint8)[:, :: places.itemsize]
        lowest[:count] = codes[part]
        first, others = row_places[part.start], row_places[part]
        if (others == first).all():
            np.take(table[first:], places[:count], out=result[part], mode="clip")  # "raise" would copy `out`
        else:
            np.take(table, places[:count] + others[:, None], out=result[part], mode="clip")

"""Weights of one byte each, with a scale for a block of them, a row, or all: FP8 and INT8.

Blocks are as DeepSeek-V3 publishes them (inference/kernel.py, `weight_dequant_kernel`): a matrix of float8_e4m3fn, and one scale
for each block of it, mostly 128×128. The last block of a row or column may be short.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..basics.casting import E4M3FN, rounded
from ..basics.dtypes import DType
from .decoding import Array, Quantised, Rows, numbers_of, scales_of, steps

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

    def _decoded(self, rows: Rows, cols: slice, dtype: DType) -> Array:
        height, width = (side or size for side, size in zip(self.block, self.shape, strict=True))
        codes = self.weight.array()[rows, cols]
        numbers, columns = numbers_of(rows, self.shape[0]), np.arange(cols.start, cols.stop)
        found, block_rows = np.unique(numbers // height, return_inverse=True)
        first = cols.start // width
        factors = scales_of(self.scale.array()[found, first : -(-cols.stop // width)], self.scale.dtype)
        values = VALUES[self.weight.dtype.name]
        if factors.size * _CODES < codes.size:
            return _looked_up(codes, values, factors, block_rows, columns // width - first, dtype)
        return rounded(values[codes] * factors[block_rows[:, None], columns // width - first], dtype)

    def _no_numbers(self, rows: Rows, cols: slice) -> bool:
        return bool(np.isnan(VALUES[self.weight.dtype.name][self.weight.array()[rows, cols]]).any())


def _looked_up(
    codes: Array, values: Array, factors: Array, rows: npt.NDArray[np.int64], cols: npt.NDArray[np.int64], dtype: DType
) -> Array:
    """Products of codes by `factors[rows, cols]`, looked up among the 256 products that each factor has."""
    products = rounded((factors[:, :, None] * values).reshape(-1), dtype)
    row_places, col_places = rows * (factors.shape[1] * _CODES), cols * _CODES
    result = np.empty(codes.shape, dtype.carrier)
    places = np.empty(0, np.int64)
    for part in steps(*codes.shape):
        if places.shape != codes[part].shape:
            places = np.empty(
                codes[part].shape, np.int64
            )  # one for all steps, since to get memory takes as long as to fill it
        places[...] = codes[part]
        places += col_places
        if row_places[part].any():
            places += row_places[part, None]
        np.take(products, places, out=result[part], mode="clip")  # no place is outside; "raise" would copy `out`
    return result

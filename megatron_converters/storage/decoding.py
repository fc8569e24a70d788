"""Tensors that are decoded or computed where they lie: only the rows and columns that are asked for.

FP8 with block scales, as DeepSeek-V3 publishes it (inference/kernel.py, `weight_dequant_kernel`): a float8_e4m3fn matrix, and one
scale for each block of it, mostly 128×128. The last block of a row or column may be short.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..basics.casting import E4M3FN, all_finite, floats, not_finite, powers_of_two, rounded
from ..basics.dtypes import BY_NAME, DType
from ..basics.errors import ConversionError
from ..basics.pickle_proof import Sealed
from .tensor import StoredTensor

Array = npt.NDArray[Any]
#: Rows of a tensor to read: a range, or their numbers.
Rows = slice | npt.NDArray[np.int64]

CODES = "float8_e4m3fn"
#: Element types of scales: floats, or exponents of 2 as ue8m0 has them, which some files call uint8.
SCALES = ("float32", "bfloat16", "float8_e8m0fnu", "uint8")
_BFLOAT16 = BY_NAME["bfloat16"]
#: Elements decoded at a time, so that what is needed on the way stays in a core's cache.
_STEP = 1 << 16
#: Length by which shorter rows are divided (torch.nn.functional.normalize).
_SHORTEST = 1e-12


def block_counts(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Number of blocks along each axis of a matrix of `shape`; the last one may be short."""
    return tuple(-(-size // side) for size, side in zip(shape, block, strict=True))


@dataclass(frozen=True)
class Constant(Sealed):
    """Tensor that no file holds, since all of its elements are `value`, which its dtype has exactly."""

    dtype: DType
    shape: tuple[int, ...]
    value: float

    #: No file, and no tensor of one.
    path = ""
    stored: ClassVar[Mapping[str, StoredTensor]] = {}
    exact = True

    @property
    def computed(self) -> str:
        """What is done, in words."""
        return f"{self.value:g} in every element"

    def read(self, rows: Rows, cols: slice) -> Array:
        """Elements of these rows and columns."""
        count, width = self.shape[0], math.prod(self.shape[1:])
        chosen = len(range(count)[rows]) if isinstance(rows, slice) else rows.size
        return rounded(np.full((chosen, len(range(width)[cols])), self.value, np.float32), self.dtype)


@dataclass(frozen=True)
class _OfMatrix(Sealed):
    """What is computed of the stored matrix `weight`, which is called `name`, and rounded."""

    name: str
    weight: StoredTensor

    exact = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return self.weight.shape

    @property
    def path(self) -> str:
        """File of the matrix."""
        return self.weight.path


@dataclass(frozen=True)
class ScaledBlocks(_OfMatrix):
    """Matrix of FP8 codes with a scale for each block of `block` elements: value = bfloat16(float32(code) * float32(scale)).

    `name` and `scale_name` are the names of the two stored tensors. Shapes and dtypes are checked by who makes one.
    """

    scale_name: str
    scale: StoredTensor
    block: tuple[int, int]

    @property
    def dtype(self) -> DType:
        """Dtype of the decoded elements."""
        return _BFLOAT16

    @cached_property
    def stored(self) -> Mapping[str, StoredTensor]:
        """Stored tensors that it is made of, by name."""
        return {self.name: self.weight, self.scale_name: self.scale}

    @property
    def computed(self) -> str:
        """Words for what is done to the stored tensors."""
        return f"decoded from {self.weight.dtype} in blocks of {self.block[0]}×{self.block[1]}"

    def read(self, rows: Rows, cols: slice) -> Array:
        """Decode these rows and columns, as an array of the carrier type of bfloat16.

        Raises `ConversionError` for a code or a scale that is no number, and where a product exceeds bfloat16.
        """
        height, width = self.block
        codes = self.weight.array()[rows, cols]
        numbers = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        first = cols.start // width
        found, block_rows = np.unique(numbers // height, return_inverse=True)
        factors = self._factors(found, slice(first, -(-cols.stop // width)))
        block_cols = np.arange(cols.start, cols.stop) // width - first
        decode = _looked_up if factors.size * E4M3FN.size < codes.size else _multiplied
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            result = decode(codes, factors, block_rows, block_cols)
        if not all_finite(result, _BFLOAT16):
            raise ConversionError(self._fault(codes[not_finite(result, _BFLOAT16)], factors))
        return result

    def _factors(self, rows: npt.NDArray[np.int64], cols: slice) -> npt.NDArray[np.float32]:
        """Scales of blocks as numbers; the exponent that stands for NaN becomes infinite."""
        scales = self.scale.array()[rows, cols]
        if self.scale.dtype.itemsize > 1:
            singles: npt.NDArray[np.float32] = floats(scales, self.scale.dtype)
            return singles
        return powers_of_two(scales)

    def _fault(self, codes: Array, factors: npt.NDArray[np.float32]) -> str:
        """Message about elements that are no numbers, by their codes and the scales around them."""
        where = os.path.basename(self.path)
        if (codes & 0x7F == 0x7F).any():
            return (
                f"{where}: {self.name} holds codes that stand for no number (NaN); the file is damaged, copy it again"
            )
        if not np.isfinite(factors).all():
            return (
                f"{where}: {self.name} has scales in {self.scale_name} that are infinite or NaN; copy the files again"
            )
        return (
            f"{where}: {self.name} times its scales holds values beyond the range of {_BFLOAT16}; copy the files again"
        )


def _looked_up(codes: Array, factors: npt.NDArray[np.float32], rows: Array, cols: Array) -> Array:
    """Products by `factors[rows, cols]`, looked up, since in one block a code has one value: 256 products a block are enough."""
    products = rounded((factors[:, :, None] * E4M3FN).reshape(-1), _BFLOAT16)
    row_places, col_places = rows * (factors.shape[1] * E4M3FN.size), cols * E4M3FN.size
    result = np.empty(codes.shape, _BFLOAT16.carrier)
    step = max(1, _STEP // codes.shape[1])
    for start in range(0, codes.shape[0], step):
        part = slice(start, start + step)
        places = row_places[part, None] + col_places
        places += codes[part]
        np.take(products, places, out=result[part], mode="clip")  # no place is outside; "raise" would copy `out`
    return result


def _multiplied(codes: Array, factors: npt.NDArray[np.float32], rows: Array, cols: Array) -> Array:
    """Products by `factors[rows, cols]`, for few elements or small blocks."""
    return rounded(E4M3FN[codes] * factors[rows[:, None], cols], _BFLOAT16)


@dataclass(frozen=True)
class UnitRows(_OfMatrix):
    """Rows of a stored matrix, each divided by its Euclidean length, as `torch.nn.functional.normalize` does (Baichuan2's head)."""

    @property
    def dtype(self) -> DType:
        """Dtype of the elements, which is that of the stored ones."""
        return self.weight.dtype

    @cached_property
    def stored(self) -> Mapping[str, StoredTensor]:
        """Stored tensor, by name."""
        return {self.name: self.weight}

    @property
    def computed(self) -> str:
        """Words for what is done to the stored tensor."""
        return "each row divided by its length"

    def read(self, rows: Rows, cols: slice) -> Array:
        """Compute these rows and columns, as an array of the dtype's carrier type; lengths are those of whole rows."""
        whole = floats(self.weight.array()[rows], self.dtype)
        lengths = np.sqrt(np.square(whole, dtype=np.float64).sum(axis=1, keepdims=True))
        lengths[np.abs(lengths - 1) <= np.finfo(whole.dtype).eps] = 1  # what was divided before stays as it is
        return rounded(whole[:, cols] / np.maximum(lengths, _SHORTEST).astype(whole.dtype), self.dtype)

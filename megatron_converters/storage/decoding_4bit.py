"""Weights of 4 bits each, two in a byte, the lower half first: integers with a scale for a group, and MXFP4.

Sources: compressed-tensors 0.20 (compressors/pack_quantized), the MX specification of the Open Compute Project (1.0, table 5 and
section 5.4), and transformers 5.23 (integrations/mxfp4.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from ..basics.casting import all_finite, floats, powers_of_two, rounded
from ..basics.dtypes import BY_NAME, DType
from ..basics.errors import ConversionError
from .decoding import PLACES, Array, Quantised, Rows, scales_of, steps
from .tensor import StoredTensor

#: Columns to an MXFP4 scale.
MX_GROUP = 32
_CODES = 16
#: Numbers that codes of integers stand for, which are stored with 8 added, and those of FP4 (E2M1): sign, exponent, one bit.
_INTEGERS = np.arange(_CODES, dtype=np.float32) - 8
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@dataclass(frozen=True)
class PackedIntegers(Quantised):
    """Matrix of integers from -8 to 7, eight to an int32, with a scale for each `group` columns of a row.

    `size` is the shape of the matrix, which the stored tensor `shape_name` says, too; it is looked at when elements are read.
    """

    shape_name: str
    stored_shape: StoredTensor
    size: tuple[int, ...]
    group: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is decoded."""
        return self.size

    @cached_property
    def stored(self) -> Mapping[str, StoredTensor]:
        """Stored tensors that it is made of, by name."""
        return {**super().stored, self.shape_name: self.stored_shape}

    @property
    def computed(self) -> str:
        """Words for what is done to the stored tensors."""
        return f"decoded from 4-bit integers {'in groups of ' + str(self.group) if self.group else 'with a scale for each row'}"

    def _decoded(self, rows: Rows, cols: slice, dtype: DType, room: Array | None) -> Array | None:
        if self._stated != self.size:
            raise ConversionError(
                f"{self.name} holds {list(self.size)} elements, but {self.shape_name} says {list(self._stated)}; copy the files "
                "again"
            )
        first, last = (
            cols.start // 2 * 2,
            -(-cols.stop // 2) * 2,
        )  # whole bytes, and whole groups where there are several
        group, groups = last - first, slice(0, 1)
        if self.group:
            group, groups = self.group, slice(first // self.group, -(-last // self.group))
            first, last = groups.start * group, groups.stop * group
        packed = self._bytes.array()[rows, first // 2 : last // 2]
        scales = self.scale.array()[rows, groups]
        result = np.empty((packed.shape[0], last - first), dtype.carrier)
        for part in steps(*result.shape):
            self._decode(_unpacked(packed[part]), scales[part], group, dtype, result[part])
        elements = result[:, cols.start - first : cols.stop - first]
        return elements if all_finite(elements, dtype) else None

    def _decode(self, codes: Array, scales: Array, group: int, dtype: DType, result: Array) -> None:
        """Write what codes with a scale for each `group` columns are; of a short last group the rest of `result` is arbitrary."""
        if scales.itemsize == 2:  # each of the 65,536 scales has its products in a table, at its place and the code
            places = PLACES.of(*result.shape)
            places.reshape(*scales.shape, group)[...] = scales.astype(np.int64)[:, :, None] * _CODES
            places.view(np.uint8)[:, :: places.itemsize][:, : codes.shape[1]] += codes
            np.take(_products(self.scale.dtype, dtype), places, out=result, mode="clip")
        else:
            factors = scales_of(scales, self.scale.dtype).repeat(group, 1)[:, : codes.shape[1]]
            result[:, : codes.shape[1]] = rounded(_INTEGERS.take(codes) * factors, dtype)

    @property
    def _bytes(self) -> StoredTensor:
        """Codes as bytes, two to each."""
        return self.weight.reshaped((self.size[0], self.weight.shape[1] * 4), BY_NAME["uint8"])

    @cached_property
    def _stated(self) -> tuple[int, ...]:
        return numbers_in(self.stored_shape)


@dataclass(frozen=True)
class MicroScaled(Quantised):
    """Matrix of FP4 numbers with an exponent for each 32 columns of a row; products are exact in bfloat16.

    The codes have the shape [rows, groups, 16], the exponents [rows, groups].
    """

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether nothing is rounded."""
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is decoded."""
        *before, groups, _ = self.weight.shape
        return *before, groups * MX_GROUP

    @property
    def computed(self) -> str:
        """Words for what is done to the stored tensors."""
        return "decoded from MXFP4"

    def _decoded(self, rows: Rows, cols: slice, dtype: DType, room: Array | None) -> Array | None:
        groups = slice(cols.start // MX_GROUP, -(-cols.stop // MX_GROUP))
        codes, exponents = self.weight.array()[rows, groups], self.scale.array()[rows, groups]
        count, width, size = codes.shape
        pairs = np.empty((count, width, size), f"u{2 * dtype.itemsize}")
        for part in steps(count, width * MX_GROUP):
            places = PLACES.of(len(codes[part]), width * size).reshape(-1, width, size)
            places[...] = exponents[part].astype(np.int64)[:, :, None] << 8
            places += codes[part]
            np.take(_pairs(dtype), places, out=pairs[part], mode="clip")
        whole = pairs.reshape(count, width * size).view(dtype.carrier)
        elements = whole[:, cols.start - groups.start * MX_GROUP : cols.stop - groups.start * MX_GROUP]
        return elements if all_finite(elements, dtype) else None


def numbers_in(tensor: StoredTensor) -> tuple[int, ...]:
    """Content of a short tensor of integers."""
    return tuple(tensor.array().view(f"i{tensor.dtype.itemsize}").reshape(-1).tolist())


def _unpacked(packed: Array) -> Array:
    """Codes of these bytes."""
    codes = np.empty((*packed.shape, 2), np.uint8)
    np.bitwise_and(packed, 0xF, out=codes[..., 0])
    np.right_shift(packed, 4, out=codes[..., 1])
    return codes.reshape(packed.shape[0], -1)


@cache
def _products(scale: DType, dtype: DType) -> Array:
    """Product of each scale of a 16-bit type and each integer, at `scale * 16 + code`."""
    scales = floats(np.arange(1 << 16, dtype=np.uint16), scale)
    return rounded((scales[:, None] * _INTEGERS).reshape(-1), dtype)


@cache
def _pairs(dtype: DType) -> Array:
    """Elements that a byte stands for, as one number of twice the width, at `exponent * 256 + byte`."""
    products = rounded(powers_of_two(np.arange(256, dtype=np.uint8))[:, None] * _E2M1, dtype)
    codes = _unpacked(np.arange(256, dtype=np.uint8)[:, None])
    return np.ascontiguousarray(products[:, codes]).reshape(-1).view(f"u{2 * dtype.itemsize}")

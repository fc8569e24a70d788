"""Tensors that are decoded or computed where they lie: only the rows and columns that are asked for.

Classes for codes of 8 and of 4 bits are in `decoding_8bit` and `decoding_4bit`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from ..basics.casting import floats, powers_of_two, rounded
from ..basics.dtypes import BY_NAME, DType
from ..basics.errors import ConversionError
from ..basics.pickle_proof import Sealed
from .tensor import StoredTensor

Array = npt.NDArray[Any]
#: Rows of a tensor to read: a range, or their numbers.
Rows = slice | npt.NDArray[np.int64]

_BFLOAT16 = BY_NAME["bfloat16"]
#: Elements decoded at a time, so that what is needed on the way stays in a core's cache.
STEP = 1 << 16
#: Length by which shorter rows are divided (torch.nn.functional.normalize).
_SHORTEST = 1e-12


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

    def read(self, rows: Rows, cols: slice, dtype: DType | None = None, out: Array | None = None) -> Array:
        """Elements of these rows and columns, in the tensor's dtype or another."""
        width = math.prod(self.shape[1:])
        shape = numbers_of(rows, self.shape[0]).size, len(range(width)[cols])
        return given(rounded(np.full(shape, self.value, np.float32), dtype or self.dtype), out)


@dataclass(frozen=True)
class _OfMatrix(Sealed):
    """What is computed of the stored matrix `weight`, which is called `name`, and rounded."""

    name: str
    weight: StoredTensor

    exact = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is computed, which is that of the matrix."""
        return self.weight.shape

    @property
    def path(self) -> str:
        """File of the matrix."""
        return self.weight.path


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

    def read(self, rows: Rows, cols: slice, dtype: DType | None = None, out: Array | None = None) -> Array:
        """Compute these rows and columns, in the matrix's dtype or another; lengths are those of whole rows."""
        whole = floats(self.weight.array()[rows], self.dtype)
        lengths = np.sqrt(np.square(whole, dtype=np.float64).sum(axis=1, keepdims=True))
        lengths[np.abs(lengths - 1) <= np.finfo(whole.dtype).eps] = 1  # what was divided before stays as it is
        divided = whole[:, cols] / np.maximum(lengths, _SHORTEST).astype(whole.dtype)
        return given(rounded(divided, dtype or self.dtype), out)


@dataclass(frozen=True)
class Quantised(_OfMatrix):
    """Matrix of codes, each of which stands for a number times a scale: a product in float32, rounded once.

    `name` and `scale_name` are the names of the two stored tensors. Shapes and dtypes are checked by who makes one. A stack of
    matrices has a further axis before theirs, and can be taken apart but not read.
    """

    scale_name: str
    scale: StoredTensor

    @property
    def dtype(self) -> DType:
        """Dtype of the decoded elements, unless another is asked for: bfloat16, or float16 where scales are float16."""
        return self.scale.dtype if self.scale.dtype.name == "float16" else _BFLOAT16

    @cached_property
    def stored(self) -> Mapping[str, StoredTensor]:
        """Stored tensors that it is made of, by name."""
        return {self.name: self.weight, self.scale_name: self.scale}

    @property
    def computed(self) -> str:
        """Words for what is done to the stored tensors."""
        raise NotImplementedError

    def item(self: _Stack, number: int) -> _Stack:
        """One matrix of a stack."""
        return dataclasses.replace(self, weight=self.weight.item(number), scale=self.scale.item(number))

    def transposed(self) -> Transposed:
        """The transposed matrix; of a stack, each."""
        return Transposed(self)

    def read(self, rows: Rows, cols: slice, dtype: DType | None = None, out: Array | None = None) -> Array:
        """Decode these rows and columns, as an array of the carrier type of the matrix's dtype or of another.

        Raises `ConversionError` for a code or a scale that is no number, and where a product exceeds the dtype.
        """
        target = dtype or self.dtype
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            result = self._decoded(rows, cols, target, out if out is not None and out.flags.c_contiguous else None)
        if result is None:
            raise ConversionError(f"{os.path.basename(self.path)}: {self.name} {self._fault(rows, cols, target)}")
        return given(result, out)

    def _decoded(self, rows: Rows, cols: slice, dtype: DType, room: Array | None) -> Array | None:
        """Elements of these rows and columns, in contiguous memory that may be used for them or in other; None for no numbers."""
        raise NotImplementedError

    def _no_numbers(self, rows: Rows, cols: slice) -> bool:
        """Whether any of the codes stands for no number."""
        return False

    def _fault(self, rows: Rows, cols: slice, dtype: DType) -> str:
        """Words for why some elements of these rows and columns are no numbers."""
        if self._no_numbers(rows, cols):
            return "holds codes that stand for no number (NaN); the file is damaged, copy it again"
        if not np.isfinite(scales_of(self.scale.array(), self.scale.dtype)).all():
            return f"has scales in {self.scale_name} that are infinite or NaN; copy the files again"
        remedy = "copy the files again" if dtype == self.dtype else f"convert to {self.dtype}"
        return f"times its scales holds values beyond the range of {dtype}; {remedy}"


_Stack = TypeVar("_Stack", bound=Quantised)


@dataclass(frozen=True)
class Transposed(Sealed):
    """Transposed matrix of a quantised one, or a stack of such."""

    matrix: Quantised

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded."""
        return self.matrix.exact

    @property
    def name(self) -> str:
        """Name of the codes."""
        return self.matrix.name

    @property
    def dtype(self) -> DType:
        """Dtype of the decoded elements, unless another is asked for."""
        return self.matrix.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is decoded."""
        *stack, rows, cols = self.matrix.shape
        return *stack, cols, rows

    @property
    def path(self) -> str:
        """File of the codes."""
        return self.matrix.path

    @property
    def stored(self) -> Mapping[str, StoredTensor]:
        """Stored tensors that it is made of, by name."""
        return self.matrix.stored

    @property
    def computed(self) -> str:
        """Words for what is done to the stored tensors."""
        return self.matrix.computed

    def item(self, number: int) -> Transposed:
        """One matrix of a stack."""
        return Transposed(self.matrix.item(number))

    def transposed(self) -> Quantised:
        """The matrix as it is stored; of a stack, each."""
        return self.matrix

    def read(self, rows: Rows, cols: slice, dtype: DType | None = None, out: Array | None = None) -> Array:
        """Decode these rows and columns, as `Quantised.read` does."""
        numbers = numbers_of(rows, self.shape[0])
        first = int(numbers.min(initial=self.shape[0]))
        inside = slice(first, int(numbers.max(initial=first - 1)) + 1)
        found = self.matrix.read(numbers_of(cols, self.shape[1]), inside, dtype)
        return given(np.ascontiguousarray(found.T[numbers - first]), out)


def given(result: Array, out: Array | None) -> Array:
    """Result, which is also written into `out` unless it is that, or there is none."""
    if out is not None and result is not out:
        out[...] = result
    return result


class _Places(threading.local):
    """Memory of a thread for places in tables: to get it from the system each time takes as long as the arithmetic."""

    def __init__(self) -> None:
        self._memory = np.empty(STEP, np.int64)

    def of(self, rows: int, cols: int) -> npt.NDArray[np.int64]:
        """Matrix of these sizes, uninitialised; the same memory at each call."""
        if rows * cols > self._memory.size:
            self._memory = np.empty(rows * cols, np.int64)
        return self._memory[: rows * cols].reshape(rows, cols)


PLACES = _Places()


def numbers_of(rows: Rows, count: int) -> npt.NDArray[np.int64]:
    """Numbers of the chosen rows of `count`."""
    return np.arange(count)[rows] if isinstance(rows, slice) else rows


def scales_of(array: Array, dtype: DType) -> npt.NDArray[np.float32]:
    """Scales as numbers: floats, or the exponents of 2 of one byte, among which that for NaN becomes infinite."""
    singles: npt.NDArray[np.float32] = floats(array, dtype) if dtype.itemsize > 1 else powers_of_two(array)
    return singles


def steps(rows: int, cols: int) -> Iterator[slice]:
    """Ranges of rows of about `STEP` elements."""
    size = max(1, STEP // max(cols, 1))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))

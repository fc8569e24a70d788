"""Change of elements on their way from a source to a target: decoded, computed and cast, each rounded once."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..basics.casting import cast, floats, rounded, stays_finite
from ..basics.dtypes import BY_NAME, DType
from ..basics.errors import ConversionError
from ..model.values import Affine, composed
from .composing import Piece

Array = npt.NDArray[Any]

_SINGLE = 4  # bytes of the widest type to which a reader decodes


class Computation(NamedTuple):
    """Change of the elements of a piece: `value` of them, in the dtype `target`. Arrays are of the dtypes' carrier types."""

    piece: Piece
    target: DType
    value: Affine | None

    @classmethod
    def of(cls, piece: Piece, target: DType, value: Affine | None) -> Computation:
        """Computation from the elements of a piece to `value` of the slot's."""
        return cls(piece, target, composed(piece.value, value))

    @property
    def read(self) -> DType:
        """Dtype in which elements come from the piece: the target's where they are decoded and nothing else is computed."""
        if self.value is not None or self.piece.reader is None:
            return self.piece.data.dtype
        return BY_NAME["float32"] if self.target.itemsize > _SINGLE else self.target

    @property
    def copies(self) -> bool:
        """Whether the elements as the piece gives them are the result, bit for bit."""
        return self.value is None and self.read == self.target

    @property
    def is_cast(self) -> bool:
        """Whether elements come from the piece in another dtype than the target's."""
        return self.read is not self.target

    def apply(self, part: Array, result: Array) -> None:
        """Write the result for a part of the piece; raises `ConversionError` if finite elements exceed the range of the target."""
        source = self.read
        if self.copies:
            result[...] = part
        elif self.value is None:
            if not cast(part, source, result, self.target):
                raise ConversionError(self._overflow())
        else:
            result[...] = self._computed(part, self.value)
            if not stays_finite(part, source, result, self.target):
                raise ConversionError(self._overflow())

    def count_lost(self, part: Array, result: Array) -> int:
        """Number of elements that the inverse does not give back bit for bit from the result."""
        if self.value is None:
            return 0
        source = self.piece.data.dtype
        values = self.value.inverse().apply(self._floats(result, self.target))
        return int(np.count_nonzero(rounded(values, source) != part))

    def described(self) -> list[str]:
        """Words for what is decoded and computed; empty where elements are only copied or cast."""
        reader, steps = self.piece.reader, []
        if reader is not None:
            exact = reader.exact and self.read.name in (reader.dtype.name, "float32")
            steps.append(reader.computed if exact else f"{reader.computed}, rounded to {self.read}")
        if self.value is not None:
            steps.append(f"{self.value.described()} in {self._precision}, rounded once")
        return steps

    @property
    def _precision(self) -> str:
        """Dtype of the arithmetic."""
        return "float64" if "float64" in (self.piece.data.dtype.name, self.target.name) else "float32"

    def _computed(self, part: Array, value: Affine) -> Array:
        return rounded(value.apply(self._floats(part, self.piece.data.dtype)), self.target)

    def _floats(self, array: Array, dtype: DType) -> Array:
        return floats(array, dtype).astype(self._precision, copy=False)

    def _overflow(self) -> str:
        computed = f", {self.value.described()}," if self.value is not None else ""
        return (
            f"{self.piece.name}{computed} holds values beyond the range of {self.target}; keep its dtype "
            f"({self.piece.data.dtype}) or convert to bfloat16"
        )

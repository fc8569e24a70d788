"""Measured differences between the elements of two tensors of one shape, counted chunk by chunk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..basics.casting import values
from ..basics.dtypes import DType
from ..basics.json_values import finite
from ..model.layouts import RowMap


@dataclass(frozen=True)
class Place:
    """Stored element: `where` is its file and tensor, then its row and column there, its first byte in the file, its value.

    Where a tensor stacks the matrices of several experts, row and column count within the expert's matrix.
    """

    side: str
    where: str
    row: int
    col: int
    byte: int | None
    value: float

    def __str__(self) -> str:
        byte = "" if self.byte is None else f" (byte {self.byte} of the file)"
        return f"{self.side}: {self.where} [{self.row}, {self.col}] is {self.value:.9g}{byte}"


@dataclass(frozen=True)
class Measure:
    """Number and size of differences; `largest` is infinite where only one of two values is a number.

    `first` is row and column in the slot of the first element that differs, and `places` is where each side stores it. `norm` is
    the 2-norm of the first tensor and `distance` that of the difference; both are None unless requested.
    """

    elements: int
    differing: int
    largest: float
    first: tuple[int, int] | None = None
    places: tuple[Place, ...] = ()
    norm: float | None = None
    distance: float | None = None

    @property
    def relative(self) -> float:
        """Norm of the difference over that of the tensor, if requested; infinite where either is not a finite number."""
        if not self.distance or self.norm is None:
            return 0.0
        comparable = self.norm and math.isfinite(self.norm) and math.isfinite(self.distance)
        return self.distance / self.norm if comparable else math.inf

    def __str__(self) -> str:
        row, col = self.first or (0, 0)
        if not self.largest:
            extent = "only in bits (signs of zeros, or kinds of NaN)"
        elif math.isinf(self.largest):
            extent = "some because only one side is a finite number"
        else:
            extent = f"by {self.largest:.6g} at most"
        return f"{self.differing} of {self.elements} elements differ, {extent}; the first is row {row}, column {col}"

    def to_json(self) -> dict[str, Any]:
        """JSON values; infinities and NaN, which JSON lacks, as strings."""
        plain = dataclasses.asdict(self)
        if self.norm is not None:
            plain["relative"] = self.relative
        result: dict[str, Any] = finite(plain)
        return result


class Tally:
    """Running sums of a `Measure`: elements differ in bits, or by more than `tolerance` if that is above 0.

    With `any_nan` two NaNs are equal whatever their bits.
    """

    def __init__(self, tolerance: float, norms: bool, *, any_nan: bool = False) -> None:
        self.first: tuple[int, int] | None = None
        self._tolerance, self._norms, self._any_nan = tolerance, norms, any_nan
        self._elements = self._differing = 0
        self._largest = self._norm = self._distance = 0.0

    @property
    def differing(self) -> int:
        """Number of elements that differ so far."""
        return self._differing

    def add(self, rows: RowMap, col: int, left: npt.NDArray[Any], right: npt.NDArray[Any], dtype: DType) -> int:
        """Count two chunks of the same `rows` of a slot, in the carrier type of `dtype`; row -1 is padding, which is not counted.

        `col` is the slot's column of the chunks' first column. Returns the number of elements compared on each side.
        """
        kept = rows >= 0
        if not kept.all():
            rows, left, right = rows[kept], left[kept], right[kept]
        self._elements += left.size
        differs = left != right
        unequal = bool(differs.any())
        if unequal or self._norms:
            self._measure(rows, col, values(left, dtype), values(right, dtype) if unequal else None, differs)
        return left.size

    def measure(self, places: Iterable[Place]) -> Measure:
        """Measure of all chunks so far; `places` are those of the first difference."""
        norms = (math.sqrt(self._norm), math.sqrt(self._distance)) if self._norms else (None, None)
        return Measure(self._elements, self._differing, self._largest, self.first, tuple(places), *norms)

    def _measure(
        self,
        rows: RowMap,
        col: int,
        left: npt.NDArray[np.float64],
        right: npt.NDArray[np.float64] | None,
        differs: npt.NDArray[np.bool_],
    ) -> None:
        if self._norms:
            self._norm += _squares(left)
        if right is None:
            return
        gap = _gap(left, right)
        self._largest = max(self._largest, float(gap.max()))
        if self._norms:
            self._distance += _squares(gap)
        if self._tolerance:
            differs = gap > self._tolerance
        elif self._any_nan:
            differs = differs & ~(np.isnan(left) & np.isnan(right))
        count = int(np.count_nonzero(differs))
        if count and self.first is None:
            row, column = divmod(int(differs.argmax()), differs.shape[1])
            self.first = int(rows[row]), col + column
        self._differing += count


def _gap(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Absolute difference |left - right|: 0 for equal infinities and for two NaNs, infinite where only one is a number."""
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.abs(left - right)
    undefined = np.isnan(gap)
    if undefined.any():
        same = (left == right) | (np.isnan(left) & np.isnan(right))
        gap[undefined] = np.where(same[undefined], 0.0, np.inf)
    return gap


def _squares(array: npt.NDArray[np.float64]) -> float:
    """Sum of squares; computed without BLAS, whose own threads would compete with ours."""
    with np.errstate(over="ignore"):
        return float(np.einsum("ij,ij->", array, array))

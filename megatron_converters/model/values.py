"""Values computed between a stored tensor and its slot: multipliers of muP models, norms stored around 0 instead of 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from ..basics.errors import ConversionError

#: Floating-point values in which arithmetic is done: float32, or float64 where a tensor has that.
Floats = npt.NDArray[Any]


@dataclass(frozen=True)
class Affine:
    """Affine function x * scale + shift of every element of a tensor.

    The numbers are kept as fractions, so that a function followed by its inverse is exactly the identity. Rounding makes no
    other composition lossless: in bfloat16, x * 12 / 12 restores some 86 % of values.
    """

    scale: Fraction | float = 1.0
    shift: Fraction | float = 0.0

    def __post_init__(self) -> None:
        """Turn both numbers into fractions; raises `ConversionError` for a scale of 0, and for numbers that are not finite."""
        if not (math.isfinite(self.scale) and math.isfinite(self.shift)) or self.scale == 0:
            raise ConversionError(
                f"a tensor cannot be multiplied by {self.scale} and shifted by {self.shift}; the first must not be 0, and both "
                "must be finite numbers"
            )
        object.__setattr__(self, "scale", Fraction(self.scale))
        object.__setattr__(self, "shift", Fraction(self.shift))

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return self.scale == 1 and self.shift == 0

    def then(self, other: Affine) -> Affine:
        """Composition: this function first, then `other`."""
        scale, shift = Fraction(self.scale), Fraction(self.shift)
        return Affine(scale * other.scale, shift * other.scale + other.shift)

    def inverse(self) -> Affine:
        """Inverse function."""
        scale = Fraction(self.scale)
        return Affine(1 / scale, -self.shift / scale)

    def apply(self, values: Floats) -> Floats:
        """Function values, in the precision of `values` (float32 or float64); what is too large for it becomes infinite."""
        with np.errstate(over="ignore", invalid="ignore"):
            if self.scale != 1:
                # Divided where that rounds once and a multiplication by the reciprocal would round twice.
                divisor = self._divisor(values.dtype)
                values = values * float(self.scale) if divisor is None else values / divisor
            return values if self.shift == 0 else values + float(self.shift)

    def described(self) -> str:
        """Text such as "× 12", "÷ 12", "- 1" or "× 2 + 1"."""
        if self.is_identity:
            return "unchanged"
        divisor = self._divisor(np.dtype(np.float32))
        factor = f"× {float(self.scale):.9g}" if divisor is None else f"÷ {divisor:.9g}"
        term = f"{'-' if self.shift < 0 else '+'} {abs(float(self.shift)):.9g}"
        return " ".join([*([factor] if self.scale != 1 else []), *([term] if self.shift != 0 else [])])

    def _divisor(self, precision: np.dtype[Any]) -> float | None:
        """Divisor that is exact where the scale is not, in this precision; None if there is none."""
        scale = Fraction(self.scale)
        if _is_exact(scale, precision) or not _is_exact(1 / scale, precision):
            return None
        return float(1 / scale)


def composed(first: Affine | None, second: Affine | None) -> Affine | None:
    """Composition of two functions, of which None is the identity; None if they cancel out."""
    both = first or second if first is None or second is None else first.then(second)
    return None if both is None or both.is_identity else both


def inverse(value: Affine | None) -> Affine | None:
    """Inverse of a function, of which None is the identity."""
    return None if value is None else value.inverse()


def _is_exact(number: Fraction, precision: np.dtype[Any]) -> bool:
    with np.errstate(over="ignore", under="ignore"):
        rounded = float(precision.type(float(number)))
    return math.isfinite(rounded) and Fraction(rounded) == number

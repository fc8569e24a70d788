"""Values of carrier arrays (see `dtypes`): widened, rounded and cast with numpy alone, bit for bit as torch does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .dtypes import BY_NAME, DType

Array = npt.NDArray[Any]

#: Elements cast at a time: what is needed on the way stays in a core's cache, and each step takes much longer than for two threads
#: to pass the interpreter's lock to each other.
_BLOCK = 1 << 17
#: Types that numpy also has, by name.
_NUMPY = {
    name: np.dtype(name) for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8")
}
#: Bits of the exponent, all of which are set in infinities and NaN, by name.
_EXPONENTS = {"float64": 0x7FF << 52, "float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}
_BFLOAT16_NAN = 0x7FC0
_FRACTION_BITS = 23  # of a float32
_SMALLEST_POWER = 1 << 22  # bits of 2**-127, which has no bit of a float32's exponent set


class _Scratch(threading.local):
    """Memory of a thread for a block's intermediate results: to get it from the system each time costs more than the arithmetic."""

    def __init__(self) -> None:
        self._parts = [np.empty(_BLOCK * size, np.uint8) for size in (8, 4, 1)]

    def like(self, block: Array, dtype: npt.DTypeLike, part: int = 0) -> Array:
        """Array of a block's shape, uninitialised; the same memory at each call for this part."""
        dtype = np.dtype(dtype)
        return self._parts[part][: block.size * dtype.itemsize].view(dtype).reshape(block.shape)


_SCRATCH = _Scratch()


def cast(source: Array, source_dtype: DType, target: Array, target_dtype: DType) -> bool:
    """Write the values of `source` into `target`, each rounded once to nearest even.

    Both are carrier arrays of two dimensions, of one shape and any strides, of floating types. Returns whether every finite value
    stayed finite. NaN stays NaN, not always with the same bits.
    """
    way = _WAYS.get((source_dtype.name, target_dtype.name))
    fits = True
    for at in _blocks(source.shape):
        fits &= _cast_block(source[at], source_dtype, target[at], target_dtype, way)
    return fits


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Parts of a matrix of at most `_BLOCK` elements."""
    rows, cols = shape
    width = max(1, min(cols, _BLOCK))
    height = _BLOCK // width
    for row in range(0, rows, height):
        for col in range(0, cols, width):
            yield slice(row, row + height), slice(col, col + width)


class _Way(NamedTuple):
    """Fast arithmetic from the bits of one type to those of another: `compute(source, target)`, for a block.

    It is right where all magnitudes, as bits, are below `end`, from which on numbers become infinite; for all where that is None.
    """

    compute: Callable[[Array, Array], None]
    end: int | None


def _cast_block(source: Array, source_dtype: DType, target: Array, target_dtype: DType, way: _Way | None) -> bool:
    if way is not None and (way.end is None or below(source, way.end)):
        way.compute(source, target)
        return True
    target[...] = rounded(floats(source, source_dtype), target_dtype)
    return stays_finite(source, source_dtype, target, target_dtype)


def below(bits: Array, end: int) -> bool:
    """Whether all magnitudes of a carrier array are below `end`: of the positive numbers, and of the others, the largest is."""
    sign = 1 << (8 * bits.itemsize - 1)
    return int(bits.view(f"i{bits.itemsize}").max(initial=0)) < end and int(bits.max(initial=0)) < (sign | end)


def _bfloat16_to_float32(source: Array, target: Array) -> None:
    """A bfloat16 is the upper half of a float32."""
    np.copyto(target, source)
    target <<= 16


def _float32_to_bfloat16(source: Array, target: Array) -> None:
    """Half of the last place is added, less one where the last place is even, and the lower half dropped."""
    bits = np.right_shift(source, 16, out=_SCRATCH.like(source, np.uint32))
    bits &= 1
    bits += source
    bits += 0x7FFF
    bits >>= 16
    np.copyto(target, bits, casting="unsafe")


def _float32_to_float16(source: Array, target: Array) -> None:
    """The same with a bias of the exponent of 15 instead of 127; numpy casts the few numbers below the normal ones."""
    bits = np.right_shift(source, 13, out=_SCRATCH.like(source, np.uint32))
    bits &= 1
    bits += source
    bits += 0x0FFF - (112 << 23) & 0xFFFFFFFF
    bits <<= 3  # exponent and fraction to their place below the sign
    bits |= np.bitwise_and(source, 0x80000000, out=_SCRATCH.like(source, np.uint32, 1))
    bits >>= 16
    np.copyto(target, bits, casting="unsafe")
    sizes = np.bitwise_and(source, 0x7FFFFFFF, out=_SCRATCH.like(source, np.uint32, 1))
    small = np.flatnonzero(np.less(sizes, 113 << 23, out=_SCRATCH.like(source, np.bool_, 2)))
    if small.size:
        where = np.unravel_index(small, source.shape)
        target[where] = rounded(floats(source[where], BY_NAME["float32"]), BY_NAME["float16"])


def _from_table(source_name: str, target_name: str) -> Callable[[Array, Array], None]:
    """Arithmetic from a 16-bit type: each of its 65,536 values is computed once. numpy's own casts take longer than a look-up."""

    @cache
    def table() -> Array:
        return rounded(floats(np.arange(1 << 16, dtype=np.uint16), BY_NAME[source_name]), BY_NAME[target_name])

    def compute(source: Array, target: Array) -> None:
        results = table()  # before the scratch memory is used, which making the table uses, too
        places = _SCRATCH.like(source, np.intp)
        np.copyto(places, source)
        np.take(results, places, out=target, mode="clip")  # no place is outside; "raise" would copy `out`

    return compute


#: By types. Magnitudes, as bits: the first that rounds to infinity.
_WAYS = {
    ("bfloat16", "float32"): _Way(_bfloat16_to_float32, None),
    ("float16", "float32"): _Way(_from_table("float16", "float32"), None),
    ("float16", "bfloat16"): _Way(_from_table("float16", "bfloat16"), None),
    ("bfloat16", "float16"): _Way(_from_table("bfloat16", "float16"), 0x4780),
    ("float32", "bfloat16"): _Way(_float32_to_bfloat16, 0x7F7F8000),
    ("float32", "float16"): _Way(_float32_to_float16, 0x477FF000),
}


def floats(array: Array, dtype: DType) -> Array:
    """Values of a carrier array of a floating type, exact: as float64 for float64, else as float32."""
    if dtype.name in ("float64", "float32"):
        return array.view(_NUMPY[dtype.name])
    if dtype.name == "float16":
        return array.view(np.float16).astype(np.float32)
    single = np.empty(array.shape, np.uint32)
    _bfloat16_to_float32(array, single)
    return single.view(np.float32)


def rounded(values: Array, dtype: DType) -> Array:
    """Carrier array of a floating type with these float32 or float64 values, rounded once to nearest even."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if dtype.name != "bfloat16":
            return np.ascontiguousarray(values, _NUMPY[dtype.name]).view(dtype.carrier)
        single = _to_odd(values) if values.dtype == np.float64 else np.ascontiguousarray(values, np.float32)
    result = np.empty(single.shape, dtype.carrier)
    bits = single.view(np.uint32)
    for start in range(0, bits.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        _float32_to_bfloat16(bits.reshape(-1)[part], result.reshape(-1)[part])
    if not below(bits, _EXPONENTS["float32"] + 1):  # the sum could carry the bits of a NaN into those of a number
        result[np.isnan(single)] = _BFLOAT16_NAN
    return result


def _to_odd(values: Array) -> npt.NDArray[np.float32]:
    """Values of float64 as float32, with an odd last place where that is inexact: rounded again, they are as if rounded once."""
    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    wide = single.astype(np.float64)
    bits -= np.abs(wide) > np.abs(values)  # towards zero
    bits |= (wide != values) & ~np.isnan(values)
    return single


def stays_finite(source: Array, source_dtype: DType, target: Array, target_dtype: DType) -> bool:
    """Whether what was computed of each finite element of `source` is finite, too; carrier arrays of one shape."""
    return all_finite(target, target_dtype) or not (
        (not_finite(target, target_dtype) & ~not_finite(source, source_dtype)).any()
    )


def all_finite(array: Array, dtype: DType) -> bool:
    """Whether a carrier array of a floating type holds no infinities and no NaN."""
    return below(array, _EXPONENTS[dtype.name])


def not_finite(array: Array, dtype: DType) -> npt.NDArray[np.bool_]:
    """Which elements of a carrier array of a floating type are infinite or NaN."""
    exponent = array.dtype.type(_EXPONENTS[dtype.name])
    found: npt.NDArray[np.bool_] = (array & exponent) == exponent
    return found


def values(array: Array, dtype: DType) -> npt.NDArray[np.float64]:
    """Values of a carrier array of any type as float64: exact except for integers beyond 2**53."""
    decode = _DECODED.get(dtype.name)
    found = decode(array) if decode else floats(array, dtype) if dtype.floating else array.view(_NUMPY[dtype.name])
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return found.astype(np.float64)


def powers_of_two(exponents: Array) -> npt.NDArray[np.float32]:
    """Values of float8_e8m0fnu: 2**(byte - 127), a float32 without fraction; the byte that stands for NaN becomes infinite."""
    powers = exponents.astype(np.uint32) << _FRACTION_BITS
    powers[exponents == 0] = _SMALLEST_POWER
    return powers.view(np.float32)


def _e4m3fn() -> npt.NDArray[np.float32]:
    """Value of each of the 256 codes: sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities, all ones are NaN."""
    codes = np.arange(256)
    exponents, mantissas = (codes >> 3) & 0xF, codes & 0x7
    sizes = np.where(
        exponents == 0, np.ldexp(mantissas / 8, -6), np.ldexp(1 + mantissas / 8, exponents.astype(np.int32) - 7)
    )
    sizes[codes & 0x7F == 0x7F] = np.nan
    return np.where(codes & 0x80, -sizes, sizes).astype(np.float32)


#: Value of each code of float8_e4m3fn.
E4M3FN = _e4m3fn()


def _e8m0(array: Array) -> Array:
    powers = powers_of_two(array)
    powers[array == 0xFF] = np.nan
    return powers


def _e5m2(array: Array) -> Array:
    """A float8_e5m2 is the upper half of a float16."""
    return floats(array.astype(np.uint16) << 8, BY_NAME["float16"])


#: Values of types that numpy does not have, or not as bits, by name.
_DECODED: dict[str, Callable[[Array], Array]] = {
    "float8_e4m3fn": lambda codes: E4M3FN[codes],
    "float8_e5m2": _e5m2,
    "float8_e8m0fnu": _e8m0,
    "bool": lambda flags: flags != 0,
}

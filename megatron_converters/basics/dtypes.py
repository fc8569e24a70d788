"""Element types, without importing torch.

numpy has no bfloat16, so numpy arrays carry a tensor's bytes as unsigned integers of the same width. torch is imported
only to convert values (`cast`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ConversionError
from .handover import receives_own_types
from .packages import need
from .pickle_proof import Sealed


@dataclass(frozen=True, eq=False, repr=False)
class DType(Sealed):
    """Element type: torch's name, bytes per element, safetensors' code, and torch's typed-storage class.

    Each type is one object per process. `storage` is None for types that `torch.save` writes through `UntypedStorage`
    with `_rebuild_tensor_v3`.
    """

    name: str
    itemsize: int
    safetensors: str
    storage: str | None

    @property
    def floating(self) -> bool:
        """Whether weights can have this type; 8-bit floats need scales, which slots do not have."""
        return self.name in ("float64", "float32", "float16", "bfloat16")

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"torch.{self.name}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.name,)

    def __copy__(self) -> DType:
        return self

    def __deepcopy__(self, _: Any) -> DType:
        return self

    @cached_property
    def carrier(self) -> np.dtype[Any]:
        """numpy type that carries the bytes: unsigned, same width."""
        return np.dtype(f"u{self.itemsize}")

    @property
    def torch(self) -> Any:
        """The torch dtype (imports torch)."""
        import torch

        return getattr(torch, self.name)


_ALL = (
    DType("float64", 8, "F64", "DoubleStorage"),
    DType("float32", 4, "F32", "FloatStorage"),
    DType("float16", 2, "F16", "HalfStorage"),
    DType("bfloat16", 2, "BF16", "BFloat16Storage"),
    DType("int64", 8, "I64", "LongStorage"),
    DType("int32", 4, "I32", "IntStorage"),
    DType("int16", 2, "I16", "ShortStorage"),
    DType("int8", 1, "I8", "CharStorage"),
    DType("uint8", 1, "U8", "ByteStorage"),
    DType("bool", 1, "BOOL", "BoolStorage"),
    DType("float8_e4m3fn", 1, "F8_E4M3", None),
    DType("float8_e5m2", 1, "F8_E5M2", None),
    DType("float8_e8m0fnu", 1, "F8_E8M0", None),
)
BY_NAME = {dtype.name: dtype for dtype in _ALL}
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in _ALL}
BY_STORAGE = {dtype.storage: dtype for dtype in _ALL if dtype.storage}
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16", "float": "float32"}


def dtype_named(name: Any) -> DType:
    """Type called `name`: torch's name with or without `torch.`, or a short form such as bf16; else `ConversionError`."""
    plain = (
        name.removeprefix("torch.") if isinstance(name, str) else ""
    )  # a hand-written configuration may hold anything
    try:
        return BY_NAME[_SHORT.get(plain, plain)]
    except KeyError:
        raise ConversionError(f"unknown dtype {name!r}; known: {', '.join(BY_NAME)}") from None


def _unpickled(name: str) -> Any:
    """Type that the receiving process gets: ours, or torch's dtype in a process of stock Megatron-LM."""
    return BY_NAME[name] if receives_own_types() else BY_NAME[name].torch


#: Types that numpy also has, by name.
_NUMPY = {
    name: np.dtype(name) for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8")
}
#: Bits of the exponent, all of which are set in infinities and NaN, by name.
_EXPONENTS = {"float64": 0x7FF << 52, "float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}
_BFLOAT16_NAN = 0x7FC0


def values(array: npt.NDArray[Any], dtype: DType) -> npt.NDArray[np.float64]:
    """Values of a carrier array as float64: exact except for integers beyond 2**53. Only 8-bit floats and bool import torch."""
    if dtype.name in _NUMPY:
        return array.view(_NUMPY[dtype.name]).astype(np.float64)
    single = np.empty(array.shape, np.uint32)
    if dtype.name == "bfloat16":  # the upper half of a float32
        np.left_shift(array, 16, out=single, dtype=np.uint32)
    else:
        cast(array, dtype, single, BY_NAME["float32"])
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return single.view(np.float32).astype(np.float64)


def floats(array: npt.NDArray[Any], dtype: DType) -> npt.NDArray[Any]:
    """Values of a carrier array of a floating type, exact and without torch: as float64 for float64, else as float32."""
    if dtype.name in ("float64", "float32"):
        return array.view(_NUMPY[dtype.name])
    if dtype.name == "float16":
        return array.view(np.float16).astype(np.float32)
    single = np.empty(array.shape, np.uint32)
    np.left_shift(array, 16, out=single, dtype=np.uint32)  # bfloat16 is the upper half of a float32
    return single.view(np.float32)


def rounded(values: npt.NDArray[Any], dtype: DType) -> npt.NDArray[Any]:
    """Carrier array of a floating type with these float32 or float64 values, rounded once to nearest even, without torch."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if dtype.name != "bfloat16":
            return np.ascontiguousarray(values, _NUMPY[dtype.name]).view(dtype.carrier)
        single = _to_odd(values) if values.dtype == np.float64 else np.ascontiguousarray(values, np.float32)
    bits = single.view(np.uint32)
    upper = (bits >> 16) & 1  # half of the last place, less one where the last place is even
    upper += 0x7FFF
    upper += bits
    upper >>= 16
    result = upper.astype(np.uint16)
    missing = np.isnan(single)
    if missing.any():  # the sum above could carry the bits of a NaN into those of a number
        result[missing] = _BFLOAT16_NAN
    return result


def _to_odd(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Values of float64 as float32, with an odd last place where that is inexact: rounded again, they are as if rounded once."""
    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    wide = single.astype(np.float64)
    bits -= np.abs(wide) > np.abs(values)  # towards zero
    bits |= (wide != values) & ~np.isnan(values)
    return single


def not_finite(array: npt.NDArray[Any], dtype: DType) -> npt.NDArray[np.bool_]:
    """Which elements of a carrier array of a floating type are infinite or NaN."""
    exponent = array.dtype.type(_EXPONENTS[dtype.name])
    found: npt.NDArray[np.bool_] = (array & exponent) == exponent
    return found


def cast(source: npt.NDArray[Any], source_dtype: DType, target: npt.NDArray[Any], target_dtype: DType) -> bool:
    """Write the values of `source` (carrier array, any strides) into `target`, rounding to nearest even as torch does.

    Returns whether every finite value stayed finite. Raises `ConversionError` where torch is not installed.
    """
    need("torch", "torch", f"casting {source_dtype} to {target_dtype}")
    import torch

    def view(array: npt.NDArray[Any], dtype: DType) -> Any:
        signed = array.view(f"i{dtype.itemsize}")  # torch has no uint16/uint32 arithmetic, but views of int16 are free
        return torch.from_numpy(signed).view(dtype.torch)

    # Copied because torch warns about read-only arrays, such as mapped files; chunks are small.
    values, result = view(np.array(source, order="C"), source_dtype), view(target, target_dtype)
    result.copy_(values)
    if source_dtype.itemsize == 1:  # torch has no isfinite for 8-bit floats; float32 represents them all
        values = values.float()
    return bool((torch.isfinite(result) | ~torch.isfinite(values)).all())

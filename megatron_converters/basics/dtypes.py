"""Element types, without importing torch.

numpy has no bfloat16, so numpy arrays carry a tensor's bytes as unsigned integers of the same width; `casting` computes with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .errors import ConversionError
from .handover import receives_own_types
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

"""Casts between floating types, bit for bit as torch's: every 16-bit value, and float32 values with all edges."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from megatron_converters.basics.casting import cast, rounded, values
from megatron_converters.basics.dtypes import BY_NAME

Array = npt.NDArray[Any]
PAIRS = list(itertools.permutations(("bfloat16", "float16", "float32"), 2))
ALL_16_BITS = np.arange(1 << 16, dtype=np.uint16)


def all_float32() -> Array:
    """2**24 bit patterns of float32, drawn, and the edges of float32, bfloat16 and float16 with their neighbours, in both signs."""
    drawn = np.random.default_rng(1).integers(0, 1 << 32, 1 << 24, dtype=np.uint32)
    middle = np.random.default_rng(2).standard_normal(1 << 20).astype(np.float32).view(np.uint32)  # as weights are
    every_half = np.arange(1 << 15, dtype=np.uint32)
    wide = (
        torch.arange(1 << 15, dtype=torch.int16).view(torch.float16).float().view(torch.int32).numpy().view(np.uint32)
    )
    steps = [
        every_half << 16,
        (every_half << 16) + 0x8000,
        wide,
        wide + 0x1000,
    ]  # values of bfloat16 and float16, and ties
    near = np.concatenate([step + np.uint32(shift) for step in steps for shift in (0, 1, (1 << 32) - 1)])
    return np.concatenate([drawn, middle, near, near | np.uint32(1 << 31)])


def bits_of(name: str) -> Array:
    return all_float32() if name == "float32" else ALL_16_BITS


def torch_cast(bits: Array, source: str, target: str) -> torch.Tensor:
    signed = torch.from_numpy(bits.view(f"i{bits.itemsize}"))
    return signed.view(getattr(torch, source)).to(getattr(torch, target))


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_casts_are_torch_s(source: str, target: str) -> None:
    bits = bits_of(source)
    expected = torch_cast(bits, source, target)
    found = np.empty((1, bits.size), BY_NAME[target].carrier)
    fits = cast(bits[None], BY_NAME[source], found, BY_NAME[target])
    result = torch.from_numpy(found[0].view(f"i{found.itemsize}")).view(expected.dtype)
    missing = expected.isnan()
    assert torch.equal(result.isnan(), missing)
    as_bits = expected.view(torch.int16 if found.itemsize == 2 else torch.int32)
    assert torch.equal(result.view(as_bits.dtype)[~missing], as_bits[~missing])
    assert fits == (BY_NAME[target].itemsize > BY_NAME[source].itemsize or (source, target) == ("float16", "bfloat16"))


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_cast_says_whether_finite_values_stay_finite(source: str, target: str) -> None:
    """One value beyond the range among many that fit, infinities and NaN; the largest that fits is no such value."""
    wide = {"float16": 65519.996, "bfloat16": 3.3961774e38}.get(target, 1.0)
    if source == "float16" or target == "float32":
        wide = 65504.0
    elif source == "bfloat16":
        wide = 65280.0
    inner = torch.tensor([[1.0, 0.0, float("inf"), float("nan"), wide, -wide]]).to(getattr(torch, source))
    beyond = torch.tensor([[1.0, 3.4e38 if target == "bfloat16" else 65536.0]]).to(getattr(torch, source))

    def fits(tensor: torch.Tensor) -> bool:
        bits = tensor.view(torch.int32 if source == "float32" else torch.int16).numpy()
        carrier = bits.view(BY_NAME[source].carrier)
        return cast(carrier, BY_NAME[source], np.empty(bits.shape, BY_NAME[target].carrier), BY_NAME[target])

    assert fits(inner)
    narrows = (source, target) in [("float32", "float16"), ("bfloat16", "float16"), ("float32", "bfloat16")]
    assert fits(beyond) != narrows and fits(-beyond) != narrows


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_strides_and_blocks_do_not_matter(source: str, target: str) -> None:
    """Matrices larger than a block in either direction, parts of larger ones, read and written every other element."""
    rng = np.random.default_rng(3)
    for shape in ((3, 70_001), (70_001, 3), (1000, 130)):
        drawn = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32) * 1e-3).to(getattr(torch, source))
        bits = drawn.view(torch.int32 if source == "float32" else torch.int16).numpy().view(BY_NAME[source].carrier)
        expected = torch_cast(bits, source, target).view(torch.int32 if target == "float32" else torch.int16)
        spread = np.zeros((shape[0] * 2, shape[1] * 2), bits.dtype)
        spread[::2, 1::2] = bits
        result = np.zeros((shape[1] + 1, shape[0]), BY_NAME[target].carrier)
        assert cast(spread[::2, 1::2], BY_NAME[source], result.T[:, 1:], BY_NAME[target])
        assert np.array_equal(result.T[:, 1:], expected.numpy().view(result.dtype))
        assert not result[0].any()


@pytest.mark.parametrize("target", ["bfloat16", "float16", "float32"])
def test_float64_is_rounded_once(target: str) -> None:
    """A value just above the middle of two: rounded to float32 first, it would be a tie."""
    last = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23}[target]
    source = np.array([[1 + last / 2, 1 + last / 2 + 2.0**-50, 1 + 3 * last / 2, -1 - last / 2 - 2.0**-50]])
    expected = torch.tensor([1.0, 1 + last, 1 + 2 * last, -1 - last], dtype=torch.float64).to(getattr(torch, target))
    found = np.empty(source.shape, BY_NAME[target].carrier)
    assert cast(source.view(np.uint64), BY_NAME["float64"], found, BY_NAME[target])
    assert torch.equal(torch.from_numpy(found[0].view(f"i{found.itemsize}")).view(expected.dtype), expected)


def test_float32_becomes_float64_and_back() -> None:
    bits = all_float32()[None, :: 1 << 8]
    wide = np.empty(bits.shape, np.uint64)
    assert cast(bits, BY_NAME["float32"], wide, BY_NAME["float64"])
    numbers = ~np.isnan(bits.view(np.float32))
    assert np.array_equal(wide.view(np.float64)[numbers], bits.view(np.float32)[numbers].astype(np.float64))
    back = rounded(wide.view(np.float64), BY_NAME["float32"])
    assert np.array_equal(back[numbers], bits[numbers])


@pytest.mark.parametrize(
    "name", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "bool", "int8", "uint8", "float16", "bfloat16"]
)
def test_values_are_torch_s(name: str) -> None:
    dtype = BY_NAME[name]
    bits = ALL_16_BITS if dtype.itemsize == 2 else np.arange(2 if name == "bool" else 256, dtype=np.uint8)
    expected = torch.from_numpy(bits.view(f"i{dtype.itemsize}")).view(dtype.torch).double().numpy()
    assert np.array_equal(values(bits, dtype), expected, equal_nan=True)
    assert np.array_equal(np.signbit(values(bits, dtype)), np.signbit(expected))

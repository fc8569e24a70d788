"""MindSpore's files, written by hand: an encoder of protocol buffers that shares nothing with the reader, and expected values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_converters.basics.errors import ConversionError
from megatron_converters.formats.mindspore.files import Tensor, WeightFiles, read_weight_files

#: numpy's types in MindSpore's words.
KINDS = {"float32": "Float32", "float16": "Float16", "int32": "Int32", "int64": "Int64", "uint64": "UInt64"}


def array(*shape: int, seed: int = 0, dtype: str = "float32") -> Any:
    """Seeded random values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def refused(path: Path, *words: str) -> None:
    """The path is refused with a message that holds all words."""
    with pytest.raises(ConversionError) as error:
        read_weight_files(path)
    for word in words:
        assert word in str(error.value)


def varint(value: int) -> bytes:
    """A whole number in groups of seven bits, lowest first; negative numbers as 64 bits."""
    value %= 1 << 64
    groups = []
    while True:
        groups.append(value % 128 | (128 if value >= 128 else 0))
        value //= 128
        if not value:
            return bytes(groups)


def number(field: int, value: int) -> bytes:
    return varint(field * 8) + varint(value)


def content(field: int, value: bytes | str) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return varint(field * 8 + 2) + varint(len(value)) + value


def record(name: str, dims: Sequence[int], kind: str, data: bytes) -> bytes:
    """One Value of a .ckpt file."""
    tensor = b"".join(number(1, size) for size in dims) + content(2, kind) + content(3, data)
    return content(1, content(1, name) + content(2, tensor))


def ckpt(tensors: Mapping[str, Any]) -> bytes:
    """A .ckpt file of numpy arrays."""
    return b"".join(
        record(name, array.shape, KINDS[str(array.dtype)], array.tobytes()) for name, array in tensors.items()
    )


def layout(devices: Sequence[int], tensor_map: Sequence[Any], step: int = 0, size: int = 0, field: int = 0) -> bytes:
    """ParallelLayouts of a parameter; a nested tensor map is one message for each axis."""
    nested = any(isinstance(dims, list) for dims in tensor_map)
    maps = [dims if isinstance(dims, list) else [dims] for dims in tensor_map] if nested else [list(tensor_map)]
    if nested and len(maps) == 1:
        maps.append([])
    return b"".join(
        (
            content(1, b"".join(number(1, size) for size in devices)),
            *(content(2, b"".join(number(1, dim) for dim in dims)) for dims in maps),
            content(3, b""),
            content(4, b""),
            number(5, field),
            number(6, step),
            number(7, size),
        )
    )


def strategy(layouts: Mapping[str, bytes], stage: int = 0) -> bytes:
    """A strategy file of one pipeline stage."""
    operator = content(1, "MatMul-op0") + content(2, number(1, stage) + content(2, number(1, 2) + number(1, 1)))
    items = [content(3, content(1, name) + content(2, encoded)) for name, encoded in layouts.items()]
    return number(1, 1) + content(2, operator) + b"".join(items)


def save(path: Path, tensors: Mapping[str, Any], **metadata: str) -> Path:
    """Write a safetensors file as MindSpore does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()}, path, {"format": "ms", **metadata}
    )
    return path


def ranks(folder: Path, contents: Iterable[Mapping[str, Any]]) -> Path:
    """Folders of ranks with one safetensors file each."""
    for rank, tensors in enumerate(contents):
        save(folder / f"rank_{rank}" / f"net_rank_{rank}-1_10.safetensors", tensors)
    return folder


def metadata(tensors: Mapping[str, tuple[Sequence[int], Sequence[int], Mapping[int, Sequence[str]]]]) -> str:
    """metadata.json of tensors by name: whole shape, cuts of each axis, and the files of each slice."""
    described, stored = {}, {}
    for name, (shape, cuts, files) in tensors.items():
        local = [size // count for size, count in zip(shape, cuts, strict=True)]
        described[name] = {
            "properties": {"dtype": "Float32", "replica_id": 0, "allow_shape_mismatch": False, "allow_to_save": True},
            "global_shape": list(shape),
            "axis_fragmentations": list(cuts),
            "layout": None,
            "chunk": [{"global_offset": [index], "local_shape": local} for index in files],
        }
        for index, names in files.items():
            stored[str((name, (index,)))] = [
                {"file_name": file, "storage_rank": rank, "rank_group": [rank]} for rank, file in enumerate(names)
            ]
    return json.dumps({"state_dict_metadata": described, "storage_data": stored})


def joined(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Elements of a tensor in its carrier type; each must be written once, and the copies must equal the slices."""
    result = np.zeros(tensor.shape, tensor.dtype.carrier)
    count = np.zeros(tensor.shape, np.int64)
    for data, offset in tensor.slices:
        place = tuple(slice(at, at + size) for at, size in zip(offset, data.shape, strict=True))
        result[place] = data.array()
        count[place] += 1
    assert (count == 1).all()
    for data, offset in tensor.copies:
        place = tuple(slice(at, at + size) for at, size in zip(offset, data.shape, strict=True))
        assert np.array_equal(result[place], data.array())
    return result


def arrays(found: WeightFiles) -> dict[str, np.ndarray[Any, Any]]:
    """All tensors as numpy arrays; bfloat16 as float32."""
    result = {}
    for name, tensor in found.tensors.items():
        bits = joined(tensor)
        wide = tensor.dtype.name == "bfloat16"
        result[name] = (bits.astype(np.uint32) << 16).view(np.float32) if wide else bits.view(tensor.dtype.name)
    return result


def same(found: WeightFiles, expected: Mapping[str, Any]) -> None:
    """The tensors are those expected, in name, shape, dtype and value."""
    actual = arrays(found)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert (actual[name].shape, actual[name].dtype) == (array.shape, array.dtype), name
        assert np.array_equal(actual[name], array), name


def with_header(path: Path, header: Mapping[str, Any], data: bytes) -> Path:
    """Write a safetensors file with any header."""
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path

"""The safetensors format: 8 bytes of header length, a JSON header, then the tensors without a gap.

Source: the safetensors library's README ("Format") and `safetensors/src/tensor.rs` (`Metadata::validate`, `prepare`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from ..basics.dtypes import BY_SAFETENSORS, DType
from ..basics.errors import ConversionError, one_line
from .checksum import digest
from .opening import file_size, is_name, open_source
from .output_file import FileLayout, OutputFile
from .tensor import StoredTensor, contiguous_strides

_LENGTH_BYTES = 8
_METADATA = "__metadata__"
#: More bytes or elements than any file has.
_TOO_LARGE = 1 << 63
#: tensor.rs, MAX_HEADER_SIZE: the library reads no larger header.
_MAX_HEADER_BYTES = 100_000_000
#: tensor.rs, `prepare`: the header is padded with spaces so that the data starts at a multiple of this.
_HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file: its tensors in the header's order, and its string metadata."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read(path: str | os.PathLike[str]) -> SafetensorsFile:
    """Read a file's header; its tensors are mapped, not read.

    Raises `ConversionError` if the file is truncated or too long, or if its header contradicts itself or the file.
    """
    path = os.fspath(path)
    header, data_start, size = _header_of(path)
    metadata = _metadata_in(header, path)
    tensors = {name: _stored_tensor(path, data_start, name, entry) for name, entry in header.items()}
    _check_extent(path, tensors, data_start, size)
    return SafetensorsFile(tensors, metadata)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read a file's metadata alone, without looking at what the header says of tensors; raises `ConversionError` as `read`."""
    return _metadata_in(_header_of(os.fspath(path))[0], os.fspath(path))


def layout(tensors: Mapping[str, tuple[DType, tuple[int, ...]]], metadata: Mapping[str, str]) -> FileLayout:
    """Layout of a file of these tensors (name -> dtype, shape); `nbytes` is the file's exact size.

    Wider element types come first, as in the library, so that every tensor is aligned (torch cannot view unaligned ones);
    within one width the mapping's order is kept.
    """
    if _METADATA in tensors:
        raise ConversionError(f"a safetensors file cannot hold a tensor called {_METADATA}")
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    spans: dict[str, tuple[int, int]] = {}
    end = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        nbytes = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": dtype.safetensors, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        spans[name] = (end, nbytes)
        end += nbytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % _HEADER_ALIGNMENT)
    if len(encoded) > _MAX_HEADER_BYTES:
        raise ConversionError(f"{len(tensors)} tensors are too many for one safetensors file; use smaller shards")
    data_start = _LENGTH_BYTES + len(encoded)
    regions = {name: (data_start + start, nbytes) for name, (start, nbytes) in spans.items()}
    start_of_file = len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    return FileLayout(data_start + end, regions, lambda _: [(0, start_of_file)], digest([start_of_file]), shapes=shapes)


def lay_out(
    path: str | os.PathLike[str], tensors: Mapping[str, tuple[DType, tuple[int, ...]]], metadata: Mapping[str, str]
) -> OutputFile:
    """Create the file that `layout` describes, to be filled in place."""
    return layout(tensors, metadata).create(path)


def _header_of(path: str) -> tuple[dict[str, Any], int, int]:
    """Header of a file, where its data starts, and its size."""
    with open_source(path) as file:
        size = file_size(file)
        return *_read_header(path, file, size), size


def _metadata_in(header: dict[str, Any], path: str) -> dict[str, str]:
    """Take the metadata out of a header."""
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ConversionError(f"{path}: {_METADATA} of the header is not a map of strings")
    return metadata


def _read_header(path: str, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    data_start = _LENGTH_BYTES + length
    if size < _LENGTH_BYTES or length > _MAX_HEADER_BYTES:
        raise ConversionError(f"{path} is not a safetensors file")
    if data_start > size:
        raise ConversionError(_truncated(path, data_start - size, "of its header"))
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ConversionError(
            f"{path} is damaged or not a safetensors file: its header is not JSON ({one_line(error)})"
        ) from error
    if not isinstance(header, dict):
        raise ConversionError(f"{path} is damaged or not a safetensors file: its header is not a JSON object")
    return header, data_start


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} occurs twice")
    return result


def _stored_tensor(path: str, data_start: int, name: str, entry: Any) -> StoredTensor:
    if not is_name(name):
        raise ConversionError(f"{path} is damaged: its header names a tensor {one_line(name)}; copy it again")
    try:
        code, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ConversionError(f"{path}: the header's entry for {name} is not dtype, shape, data_offsets") from error
    if not all(type(number) is int and 0 <= number < _TOO_LARGE for number in (*shape, start, stop)):
        shown = one_line(f"{shape}, {start}, {stop}")
        raise ConversionError(f"{path}: {name} has a shape or offset that is not a whole number: {shown}")
    dtype = BY_SAFETENSORS.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise ConversionError(
            f"{path}: {name} has dtype {one_line(code)}, which is not one of {', '.join(BY_SAFETENSORS)}"
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if stop - start != nbytes:
        raise ConversionError(
            f"{path}: {name} is {dtype} {one_line(shape)}, {one_line(nbytes)} bytes, "
            f"but its offsets {start} to {stop} span {stop - start}"
        )
    return StoredTensor(path, data_start + start, dtype, shape, contiguous_strides(shape))


def _check_extent(path: str, tensors: Mapping[str, StoredTensor], data_start: int, size: int) -> None:
    """The tensors must cover the rest of the file, each byte once (tensor.rs, `Metadata::validate`)."""
    in_file = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    bounds = [("the header", data_start), *((name, tensor.offset + tensor.nbytes) for name, tensor in in_file)]
    for (before, end), (name, tensor) in zip(bounds, in_file, strict=False):
        if tensor.offset != end:
            fault = "overlaps" if tensor.offset < end else f"leaves {tensor.offset - end} unused bytes after"
            raise ConversionError(f"{path}: {name} {fault} {before}; the file is damaged, copy it again")
    last, end = bounds[-1]
    if size < end:
        raise ConversionError(_truncated(path, end - size, f"in or before {last}"))
    if size > end:
        raise ConversionError(f"{path} is damaged: {size - end} bytes follow {last}, its last tensor; copy it again")


def _truncated(path: str, missing: int, where: str) -> str:
    return f"{path} is truncated: {missing} bytes are missing {where}; copy it again"

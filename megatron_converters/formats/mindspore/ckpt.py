"""MindSpore's .ckpt files: concatenated protocol buffers whose tensors are mapped where they lie.

Source: mindspore 2.8.0, train/serialization.py (`_exec_save`, `_parse_ckpt_proto`) and train/checkpoint_pb2.py:
`Checkpoint{repeated Value value = 1}`, `Value{string tag = 1; TensorProto tensor = 2; MapTensorProto maptensor = 3}`,
`TensorProto{repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3}`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from ...basics.dtypes import BY_NAME, DType
from ...basics.errors import ConversionError, one_line
from ...storage.opening import file_size, open_source
from ...storage.tensor import StoredTensor, contiguous_strides, mapped
from .protobuf import BYTES, Message
from .tensors import Slice, Tensor

_CRC, _CRC_BYTES = b"crc_num", 17
#: First bytes of an encrypted file (core/utils/crypto.h: GCM, CBC and SM4-CBC), little endian.
_ENCRYPTED = tuple(magic.to_bytes(4, "little") for magic in (0x7F3A5ED8, 0x7F3A5ED9, 0x7F3A5EDA))
#: Type of a Python string that the caller appended.
_TEXT = "str"
_MOST_AXES = 32
_TOO_LARGE = 1 << 63
#: More values than any checkpoint has.
_MOST_RECORDS = 1 << 20


class Record(NamedTuple):
    """Value of a file: a tensor's name, shape, type in MindSpore's words, and the byte range of a part of its content."""

    name: str
    dims: tuple[int, ...]
    kind: str
    start: int
    stop: int


class Stored(NamedTuple):
    """Tensor of a file: its records, which follow each other and hold its bytes in order."""

    path: str
    records: tuple[Record, ...]

    @property
    def is_text(self) -> bool:
        """Whether it is a string of the program that wrote the file."""
        return self.records[0].kind == _TEXT

    def tensor(self) -> Tensor:
        """Mapped tensor; `ConversionError` if its type is none of a weight's or its bytes do not fill its shape."""
        first = self.records[0]
        where = f"{self.path}: {first.name}"
        dtype = BY_NAME.get(first.kind.lower())
        if dtype is None:
            raise ConversionError(f"{where} has the type {one_line(first.kind)}, which no weight has")
        if any((record.dims, record.kind) != (first.dims, first.kind) for record in self.records):
            raise ConversionError(f"{where} is in parts that state different shapes or types; copy the file again")
        nbytes = sum(record.stop - record.start for record in self.records)
        # A scalar is written with the shape [0] by older releases.
        shape = () if first.dims == (0,) and nbytes == dtype.itemsize else first.dims
        wanted = math.prod(shape) * dtype.itemsize
        if nbytes != wanted:
            raise ConversionError(
                f"{where} is {dtype} {one_line(shape)}, {one_line(wanted)} bytes, but {nbytes} are stored; copy the file again"
            )
        return Tensor(shape, dtype, tuple(self._slices(where, shape, dtype)))

    def _slices(self, where: str, shape: tuple[int, ...], dtype: DType) -> Iterator[Slice]:
        """Slices of all records; a record may begin and end within a row, since large tensors are split every 512 MiB."""
        if 0 in shape:
            yield Slice(StoredTensor(self.path, 0, dtype, shape, contiguous_strides(shape)), (0,) * len(shape))
            return
        done = 0
        for record in self.records:
            count, rest = divmod(record.stop - record.start, dtype.itemsize)
            if rest:
                raise ConversionError(f"{where} is split within an element; save it again as safetensors")
            at = record.start
            for offset, box in boxes(shape, done, done + count):
                yield Slice(StoredTensor(self.path, at, dtype, box, contiguous_strides(box)), offset)
                at += math.prod(box) * dtype.itemsize
            done += count


def read(path: str) -> dict[str, Stored]:
    """Read the places of a file's tensors; `ConversionError` if it is encrypted, damaged or names a tensor twice."""
    with open_source(path) as file:
        size, start = file_size(file), file.read(4)
        file.seek(max(size - _CRC_BYTES, 0))
        tail = file.read(len(_CRC))
    if start in _ENCRYPTED:
        raise ConversionError(f"{path} is encrypted; load it in MindSpore with its key and save it without one")
    message = Message(path, mapped(path), 0, size - _CRC_BYTES if tail == _CRC else size)
    found: dict[str, Stored] = {}
    for name, records in groupby(_records(message), lambda record: record.name):
        if name in found:
            raise ConversionError(f"{path}: {name} occurs twice, with others between; copy the file again")
        found[name] = Stored(path, tuple(records))
    if not found:
        raise ConversionError(f"{path} holds no tensors")
    return found


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and shapes of the boxes that make up elements `start` to `stop` of a row-major tensor, in order."""
    if not shape:
        yield from [((), ())] * (stop - start)
        return
    row = math.prod(shape[1:])
    while start < stop:
        index, within = divmod(start, row)
        rows = (stop - start) // row
        if within or not rows:  # part of one row
            end = min(stop, (index + 1) * row)
            for offset, box in boxes(shape[1:], within, end - index * row):
                yield (index, *offset), (1, *box)
        else:
            end = (index + rows) * row
            yield (index, *(0,) * (len(shape) - 1)), (rows, *shape[1:])
        start = end


def _records(message: Message) -> Iterator[Record]:
    for count, field in enumerate(message.fields()):
        if field.number != 1 or count == _MOST_RECORDS:
            raise ConversionError(f"{message.where} is no checkpoint of MindSpore, or is damaged; copy it again")
        yield _record(message.inner(field))


def _record(value: Message) -> Record:
    fields = {field.number: field for field in value.fields() if field.number in (1, 2, 3)}
    if 3 in fields:
        name = value.text(fields[1]) if 1 in fields else "a value"
        raise ConversionError(f"{value.where}: {name} is a MapParameter, a hash table, which is no weight of a model")
    if not {1, 2} <= fields.keys():
        raise ConversionError(
            f"{value.where} is damaged or no checkpoint of MindSpore: a value lacks its name or tensor"
        )
    name, tensor = value.text(fields[1]), value.inner(fields[2])
    parts = {field.number: field for field in tensor.fields() if field.number in (2, 3)}
    dims = tensor.numbers(1)
    if not {2, 3} <= parts.keys() or parts[3].wire != BYTES:
        raise ConversionError(f"{value.where} is damaged: {name} lacks its type or content; copy it again")
    if len(dims) > _MOST_AXES or not all(0 <= size < _TOO_LARGE for size in dims):
        raise ConversionError(
            f"{value.where}: {name} has the shape {one_line(dims)}, which is none; copy the file again"
        )
    return Record(name, dims, tensor.text(parts[2]), parts[3].start, parts[3].stop)

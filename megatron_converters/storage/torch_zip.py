"""The zip files of `torch.save` (torch >= 1.6), read and written without torch.

Source: `torch/serialization.py` (`_save`, `_load`) and `torch/_utils.py` of torch 1.13 to 2.13.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from ..dtypes import BY_NAME, BY_STORAGE, DType
from ..errors import ConversionError
from ..sealed import Sealed
from . import unpickle
from .output import Layout, OutputFile, Pieces
from .pickling import NewTensor, dumps
from .source import file_size, open_source
from .tensor import StoredTensor
from .unpickle import Builder, StandIn
from .zip_layout import ALIGNMENT, Record, ZipLayout

__all__ = ["NewTensor", "StandIn", "lay_out", "layout", "read"]

_PICKLE = "data.pkl"
_BYTE_ORDER = "byteorder"
_SERIALIZATION_ID = ".data/serialization_id"
_LOCAL_SIGNATURE = b"PK\3\4"
_LOCAL_HEADER_BYTES = 30
#: How a file of torch < 1.6 starts: a pickle of `torch.serialization.MAGIC_NUMBER`.
_LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"


def read(path: str | os.PathLike[str]) -> Any:
    """The object in a file of `torch.save`, without reading its tensors.

    Tensors and parameters are `StoredTensor`, torch dtypes `DType`, `torch.Size` tuples, devices strings; Namespaces,
    OrderedDicts and numpy numbers are real; enums and classes of Megatron and Transformer Engine are `StandIn`.
    Raises `ConversionError` for other classes (nothing of the file is run), truncated, damaged or compressed files,
    the format of torch < 1.6, and tensors that do not lie within the file.
    """
    path = os.fspath(path)
    with open_source(path) as file:
        archive = _Archive(path, file)
        return unpickle.load(archive.pickle(), path, _NAMES, _Storages(archive).load)


def layout(path: str | os.PathLike[str], tree: Any) -> Layout:
    """Where everything will lie in a file of `tree` (see `pickling.dumps`); `nbytes` is the file's exact size.

    Nothing is written. `path` gives the archive's inner folder: its name up to the first dot, as in `torch.save`.
    """
    folder = os.path.basename(os.fspath(path)).partition(".")[0] or "archive"
    data, tensors = dumps(tree)
    tensor_of = {f"{folder}/data/{number}": tensor for number, tensor in enumerate(tensors)}
    last = f"{folder}/{_SERIALIZATION_ID}"
    archive = ZipLayout(
        [
            *(
                Record(f"{folder}/{name}", len(content), content)
                for name, content in (
                    (_PICKLE, data),
                    (".format_version", b"1"),
                    (".storage_alignment", b"%d" % ALIGNMENT),
                    (_BYTE_ORDER, b"little"),
                )
            ),
            *(Record(name, tensor.numel * tensor.dtype.itemsize) for name, tensor in tensor_of.items()),
            Record(f"{folder}/version", 2, b"3\n"),
            Record(last, 40),
        ]
    )

    def finish(crcs: Mapping[str, int]) -> Pieces:
        by_record = {name: crcs[tensor.name] for name, tensor in tensor_of.items()}
        identity = _serialization_id(data, by_record.values())
        yield archive.offsets[last], identity
        yield from archive.pieces({**by_record, last: zlib.crc32(identity)})

    regions = {
        tensor.name: (archive.offsets[name], tensor.numel * tensor.dtype.itemsize) for name, tensor in tensor_of.items()
    }
    return Layout(archive.nbytes, regions, finish)


def lay_out(path: str | os.PathLike[str], tree: Any) -> OutputFile:
    """Create the file that `layout` describes, to be filled in place."""
    return layout(path, tree).create(path)


def _serialization_id(data: bytes, crcs: Any) -> bytes:
    """40 digits that tell files of different content apart, which is all that torch asks of them."""
    return b"%020d%020d" % (zlib.crc32(data), zlib.crc32(b"".join(struct.pack("<I", crc) for crc in crcs)))


class _Archive:
    """The directory of a `torch.save` file."""

    def __init__(self, path: str, file: BinaryIO) -> None:
        self.path = path
        self._file = file
        self._size = file_size(file)
        infos = self._directory()
        self._folder = infos[0].filename.partition("/")[0] if infos else ""
        self._infos = {info.filename: info for info in infos}
        if f"{self._folder}/{_PICKLE}" not in self._infos:
            raise ConversionError(f"{path} is a zip file without {_PICKLE}, so torch.save did not write it")
        order = self.content(_BYTE_ORDER) if f"{self._folder}/{_BYTE_ORDER}" in self._infos else b"little"
        if order != b"little":
            raise ConversionError(f"{path} was written on a big-endian machine; save it again on a little-endian one")

    def _directory(self) -> list[zipfile.ZipInfo]:
        try:
            return zipfile.ZipFile(self._file).infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
            self._file.seek(0)
            start = self._file.read(len(_LEGACY_START))
            if start.startswith(_LOCAL_SIGNATURE):
                fault = "is truncated: the directory at its end is missing; copy it again"
            elif start == _LEGACY_START:
                fault = "has the format of torch < 1.6; load it with torch and save it again"
            else:
                fault = "is not a file of torch.save"
            raise ConversionError(f"{self.path} {fault}") from error

    def span(self, name: str) -> tuple[int, int]:
        """Offset of a record's data in the file, and its bytes."""
        info = self._infos.get(f"{self._folder}/{name}")
        if info is None:
            raise ConversionError(f"{self.path} lacks its record {name}; the file is damaged, copy it again")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ConversionError(
                f"{self.path} is compressed or encrypted ({name}), as torch.save never does; save it again with torch"
            )
        if not 0 <= info.header_offset < self._size:
            raise ConversionError(f"{self.path} has no room for its record {name}; the file is damaged, copy it again")
        # The local header repeats the name, and its extra field differs from the directory's (APPNOTE 4.3.7).
        header = os.pread(self._file.fileno(), _LOCAL_HEADER_BYTES, info.header_offset)
        if len(header) < _LOCAL_HEADER_BYTES or not header.startswith(_LOCAL_SIGNATURE):
            raise ConversionError(
                f"{self.path} has no record {name} where it should; the file is damaged, copy it again"
            )
        offset = info.header_offset + _LOCAL_HEADER_BYTES + sum(struct.unpack_from("<2H", header, 26))
        if offset + info.file_size > self._size:
            raise ConversionError(f"{self.path} ends within its record {name}; the file is damaged, copy it again")
        return offset, info.file_size

    def content(self, name: str) -> bytes:
        """A record's bytes."""
        offset, nbytes = self.span(name)
        self._file.seek(offset)
        data = self._file.read(nbytes)
        # torch.serialization.set_crc32_options(False) leaves all checksums zero
        if self._infos[f"{self._folder}/{name}"].CRC not in (0, zlib.crc32(data)):
            raise ConversionError(
                f"{self.path}: {name} does not match its checksum; the file is damaged, copy it again"
            )
        return data

    def pickle(self) -> bytes:
        """The pickle of the object."""
        return self.content(_PICKLE)


@dataclass(frozen=True)
class _Storage(Sealed):
    """The data of one or more tensors: `offset` in the file, the element type that its class names, bytes."""

    path: str
    key: str
    offset: int
    dtype: DType
    nbytes: int


class _Storages:
    """Storages by the persistent ids of a pickle, each looked up once."""

    def __init__(self, archive: _Archive) -> None:
        self._archive = archive
        self._loaded: dict[str, _Storage] = {}

    def load(self, pid: Any) -> _Storage:
        """The storage of `("storage", class, key, location, numel)`; where it lived (cpu, cuda:0) does not matter."""
        if not (type(pid) is tuple and len(pid) == 5 and pid[0] == "storage" and type(pid[2]) is str):
            raise pickle.UnpicklingError("it has a persistent id that torch.save does not write")
        _, dtype, key, _, numel = pid
        if not (isinstance(dtype, DType) and type(numel) is int):
            raise pickle.UnpicklingError(f"storage {key} is of an unknown kind")
        storage = self._loaded.get(key)
        if storage is None:
            offset, nbytes = self._archive.span(f"data/{key}")
            storage = self._loaded[key] = _Storage(self._archive.path, key, offset, dtype, nbytes)
        if storage.dtype is not dtype:
            raise pickle.UnpicklingError(f"storage {key} has two element types")
        if storage.nbytes != numel * dtype.itemsize:
            raise ConversionError(
                f"{storage.path}: storage {key} should hold {numel} elements of {dtype}, but is {storage.nbytes} bytes "
                "long; the file is damaged, copy it again"
            )
        return storage


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> StoredTensor:
    """`torch._utils._rebuild_tensor` and `_rebuild_tensor_v2`."""
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor has no storage")
    return _stored(storage, storage.dtype, offset, size, stride)


def _untyped_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, *_: Any
) -> StoredTensor:
    """`torch._utils._rebuild_tensor_v3`: the dtype is beside the storage."""
    if not (isinstance(storage, _Storage) and isinstance(dtype, DType)):
        raise pickle.UnpicklingError("a tensor has no storage or dtype")
    return _stored(storage, dtype, offset, size, stride)


def _stored(storage: _Storage, dtype: DType, offset: Any, size: Any, stride: Any) -> StoredTensor:
    if not (type(size) is tuple and type(stride) is tuple and len(size) == len(stride)):
        raise pickle.UnpicklingError("a tensor has no shape or strides")
    for number in (offset, *size, *stride):
        if type(number) is not int or number < 0:
            raise pickle.UnpicklingError(f"a tensor has shape {size}, strides {stride} and offset {offset}")
    elements = 0 if 0 in size else offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if elements * dtype.itemsize > storage.nbytes:
        raise ConversionError(
            f"{storage.path}: a tensor of shape {size} and strides {stride} at {offset} exceeds its storage "
            f"{storage.key} of {storage.nbytes} bytes; the file is damaged, copy it again"
        )
    return StoredTensor(storage.path, storage.offset + offset * dtype.itemsize, dtype, size, stride)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _with_attributes(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """`torch._tensor._rebuild_from_type_v2`: a tensor with Python attributes, which are dropped."""
    if not (isinstance(function, Builder) and type(args) is tuple):
        raise pickle.UnpicklingError("a tensor is of an unknown class")
    if getattr(kind, "module", None) not in ("torch", "torch.nn.parameter"):
        raise pickle.UnpicklingError(f"a tensor is of the class {getattr(kind, 'qualname', kind)}")
    return function(*args)


def _device(kind: str, index: int | None = None) -> str:
    return kind if index is None else f"{kind}:{index}"


def _layout_name(name: str) -> str:
    return name


_NAMES: dict[tuple[str, str], Any] = {
    **{("torch", name): dtype for name, dtype in BY_NAME.items()},
    **{("torch", name): dtype for name, dtype in BY_STORAGE.items()},
    ("torch.storage", "UntypedStorage"): BY_NAME["uint8"],  # its number of elements is in bytes
    ("torch", "Size"): Builder(tuple),
    ("torch", "device"): Builder(_device),
    ("torch.serialization", "_get_layout"): Builder(_layout_name),
    ("torch._utils", "_rebuild_tensor"): Builder(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Builder(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Builder(_untyped_tensor),
    ("torch._utils", "_rebuild_parameter"): Builder(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Builder(_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): Builder(_with_attributes),
}

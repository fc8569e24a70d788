"""The zip files of `torch.save` (torch >= 1.6), read and written without torch.

Source: `torch/serialization.py` (`_save`, `_load`) and `torch/_utils.py` of torch 1.13 to 2.13.
"""

from __future__ import annotations

import os
import pickle
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..basics.dtypes import BY_NAME, BY_STORAGE, DType
from ..basics.errors import ConversionError
from ..basics.pickle_proof import Sealed
from . import pickle_reader
from .archive import BYTE_ORDER, PICKLE, Archive
from .checksum import digest
from .opening import file_size, is_name, open_source
from .output_file import FileLayout, OutputFile, Writes
from .pickle_reader import Builder, StandIn
from .pickle_writer import NewTensor, dumps
from .tensor import StoredTensor
from .zip_layout import ALIGNMENT, Record, ZipLayout

__all__ = ["NewTensor", "StandIn", "lay_out", "layout", "read", "read_embedded"]

_SERIALIZATION_ID = ".data/serialization_id"


def read(path: str | os.PathLike[str]) -> Any:
    """Read the object in a file of `torch.save`, without reading its tensors.

    Tensors and parameters become `StoredTensor`, torch dtypes `DType`, `torch.Size` tuples, devices strings; Namespaces,
    OrderedDicts and numpy numbers stay real; enums and classes of Megatron and Transformer Engine become `StandIn`.
    Raises `ConversionError` for other classes (nothing of the file is run), truncated, damaged or compressed files,
    the format of torch < 1.6, and tensors that do not lie within the file.
    """
    path = os.fspath(path)
    with open_source(path) as file:
        return _read(Archive(path, file, 0, file_size(file)))


def read_embedded(path: str, start: int, nbytes: int) -> Any:
    """Read an archive inside a file, `nbytes` bytes from byte `start` on, as `read` does; the file must be long enough."""
    with open_source(path) as file:
        return _read(Archive(path, file, start, nbytes))


def _read(archive: Archive) -> Any:
    return pickle_reader.load(archive.content(PICKLE), archive.where, _NAMES, _Storages(archive).load)


def layout(path: str | os.PathLike[str], tree: Any) -> FileLayout:
    """Layout of a file of `tree` (see `pickle_writer.dumps`); `nbytes` is the file's exact size.

    Nothing is written. `path` gives the name of the archive's inner folder: its file name up to the first dot, as in `torch.save`.
    """
    folder = os.path.basename(os.fspath(path)).partition(".")[0] or "archive"
    data, tensors = dumps(tree)
    tensor_by_record = {f"{folder}/data/{number}": tensor for number, tensor in enumerate(tensors)}
    records = {tensor.name: name for name, tensor in tensor_by_record.items()}
    id_record = f"{folder}/{_SERIALIZATION_ID}"
    archive = ZipLayout(
        [
            *(
                Record(f"{folder}/{name}", len(content), content)
                for name, content in (
                    (PICKLE, data),
                    (".format_version", b"1"),
                    (".storage_alignment", b"%d" % ALIGNMENT),
                    (BYTE_ORDER, b"little"),
                )
            ),
            *(Record(name, tensor.numel * tensor.dtype.itemsize) for name, tensor in tensor_by_record.items()),
            Record(f"{folder}/version", 2, b"3\n"),
            Record(id_record, 40),
        ]
    )

    def finish(crcs: Mapping[str, int]) -> Writes:
        by_record = {name: crcs[tensor.name] for name, tensor in tensor_by_record.items()}
        identity = _serialization_id(data, by_record.values())
        yield archive.offsets[id_record], identity
        yield from archive.writes({**by_record, id_record: zlib.crc32(identity)})

    regions = {
        tensor.name: (archive.offsets[name], tensor.numel * tensor.dtype.itemsize)
        for name, tensor in tensor_by_record.items()
    }
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    return FileLayout(
        archive.nbytes,
        regions,
        finish,
        digest([folder.encode(), data]),
        shapes=shapes,
        trailer=lambda name, crc: archive.after(records[name], crc),
    )


def lay_out(path: str | os.PathLike[str], tree: Any) -> OutputFile:
    """Create the file that `layout` describes, to be filled in place."""
    return layout(path, tree).create(path)


def _serialization_id(data: bytes, crcs: Any) -> bytes:
    """40 digits that differ between files of different content, which is all that torch requires."""
    return b"%020d%020d" % (zlib.crc32(data), zlib.crc32(b"".join(struct.pack("<I", crc) for crc in crcs)))


@dataclass(frozen=True)
class _Storage(Sealed):
    """Data of one or more tensors: offset in the file, element type that its class names, bytes."""

    path: str
    key: str
    offset: int
    dtype: DType
    nbytes: int


class _Storages:
    """Storages of a pickle by persistent id, each looked up once."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._loaded: dict[str, _Storage] = {}

    def load(self, pid: Any) -> _Storage:
        """Storage of the id `("storage", class, key, location, numel)`; its device (cpu, cuda:0) does not matter."""
        if not (type(pid) is tuple and len(pid) == 5 and pid[0] == "storage" and is_name(pid[2])):
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


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, hooks: Any = None, bits: Any = None
) -> StoredTensor:
    """`torch._utils._rebuild_tensor` and `_rebuild_tensor_v2`."""
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor has no storage")
    _refuse_bits(bits)
    return _checked_tensor(storage, storage.dtype, offset, size, stride)


def _untyped_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, bits: Any = None
) -> StoredTensor:
    """`torch._utils._rebuild_tensor_v3`: the dtype is beside the storage."""
    if not (isinstance(storage, _Storage) and isinstance(dtype, DType)):
        raise pickle.UnpicklingError("a tensor has no storage or dtype")
    _refuse_bits(bits)
    return _checked_tensor(storage, dtype, offset, size, stride)


def _refuse_bits(bits: Any) -> None:
    """Raise if torch would read the stored elements differently: negated or conjugated (`get_tensor_metadata`)."""
    if bits:
        raise pickle.UnpicklingError(f"a tensor is stored as a view with {bits}; save it again after .clone()")


def _checked_tensor(storage: _Storage, dtype: DType, offset: Any, size: Any, stride: Any) -> StoredTensor:
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


#: torch's names for dtypes, shapes, devices and memory layouts, and what they stand for.
PLAIN_NAMES: dict[tuple[str, str], Any] = {
    **{("torch", name): dtype for name, dtype in BY_NAME.items()},
    ("torch", "Size"): Builder(tuple),
    ("torch", "device"): Builder(_device),
    ("torch.serialization", "_get_layout"): Builder(_layout_name),
}
_NAMES: dict[tuple[str, str], Any] = {
    **PLAIN_NAMES,
    **{("torch", name): dtype for name, dtype in BY_STORAGE.items()},
    ("torch.storage", "UntypedStorage"): BY_NAME["uint8"],  # its number of elements is in bytes
    ("torch._utils", "_rebuild_tensor"): Builder(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Builder(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Builder(_untyped_tensor),
    ("torch._utils", "_rebuild_parameter"): Builder(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Builder(_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): Builder(_with_attributes),
}

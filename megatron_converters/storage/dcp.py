"""Folders of `torch.distributed.checkpoint` (DCP), read without torch: a pickled index, and files of embedded archives.

`.metadata` names every tensor with its chunks, and for each chunk the file, offset and length of an archive as `torch.save`
writes it. Source: `torch/distributed/checkpoint/metadata.py` and `filesystem.py` of torch 2.1 to 2.13. The classes in the
pickle become stand-ins, including those of other packages (megatron-core adds its plans); their states are checked here.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..basics.dtypes import DType
from ..basics.errors import ConversionError, one_line, raise_all, reason_of
from . import pickle_reader, torch_zip
from .marks import METADATA
from .opening import is_name, open_source
from .pickle_reader import StandIn
from .tensor import StoredTensor

#: More bytes or elements than any file has.
_TOO_LARGE = 1 << 63


@dataclass(frozen=True)
class Item:
    """Archive inside a file: `nbytes` bytes from byte `start` on."""

    path: str
    start: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.path} from byte {self.start} on"


@dataclass(frozen=True)
class Chunk:
    """Box of a tensor: first index and size along each dimension, and where it is stored."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    item: Item


@dataclass(frozen=True)
class ChunkedTensor:
    """Tensor as the index describes it. Chunks may overlap or leave gaps; the code that assembles them must check."""

    dtype: DType
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the chunks in the files."""
        return sum(chunk.item.nbytes for chunk in self.chunks)


@dataclass(frozen=True)
class Index:
    """Contents of a folder by key: tensors, and objects that are not tensors."""

    tensors: Mapping[str, ChunkedTensor]
    objects: Mapping[str, Item]

    @property
    def files(self) -> set[str]:
        """Paths of the files that hold them."""
        chunks = (chunk.item for tensor in self.tensors.values() for chunk in tensor.chunks)
        return {item.path for item in itertools.chain(chunks, self.objects.values())}


def read_index(folder: Path) -> Index:
    """Read a folder's index and check it against the sizes of its files; no tensor is read.

    Raises `ConversionError` for an index that is damaged or contradicts itself, and for missing or truncated files.
    """
    where = str(folder / METADATA)
    with open_source(where) as file:
        data = file.read()
    reader = _Reader(folder, where, pickle_reader.load(data, where, torch_zip.PLAIN_NAMES, _no_storages))
    _check_files(folder, reader)
    return reader.index


def stored(chunk: Chunk, dtype: DType, read: Callable[[str, int, int], Any] = torch_zip.read_embedded) -> StoredTensor:
    """Data of a chunk in its file; raises `ConversionError` if its shape or dtype is not the index's.

    `read` reads an archive inside a file; `EmbeddedTensors` has one for many of the same structure.
    """
    found = read(chunk.item.path, chunk.item.start, chunk.item.nbytes)
    if not isinstance(found, StoredTensor) or found.shape != chunk.sizes or found.dtype != dtype:
        held = f"{found.dtype} {list(found.shape)}" if isinstance(found, StoredTensor) else type(found).__name__
        raise ConversionError(
            f"{chunk.item} should hold {dtype} {list(chunk.sizes)} but holds {held}; the checkpoint is damaged, copy it again"
        )
    return found


def _no_storages(_: Any) -> Any:
    raise ValueError("it has a persistent id, which no index has")


class _Reader:
    """Checks the stand-ins of an index and turns them into an `Index`."""

    def __init__(self, folder: Path, where: str, metadata: Any) -> None:
        self._folder = folder
        self._where = where
        entries, places = self._fields(metadata, "state_dict_metadata", "storage_data")
        if not isinstance(entries, dict) or not isinstance(places, dict):
            raise self._damaged("it does not say what is stored where")
        self._items = dict(self._read_places(places))
        tensors, objects = {}, {}
        for key, entry in entries.items():
            self._check_name(key)
            if getattr(entry, "qualname", None) == "BytesStorageMetadata":
                objects[key] = self._item(key, None)
            else:
                tensors[key] = self._tensor(key, entry)
        self.index = Index(tensors, objects)

    @property
    def items(self) -> Iterator[Item]:
        """Every listed archive."""
        return iter(self._items.values())

    def _read_places(self, places: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, Any], Item]]:
        paths: dict[str, str] = {}
        for index, info in places.items():
            key, offset = self._fields(index, "fqn", "offset", optional=True)
            self._check_name(key)
            offset = offset if offset is None else self._numbers(offset, key)
            path, start, nbytes = self._fields(info, "relative_path", "offset", "length")
            if self._fields(info, "transform_descriptors", optional=True) != [None]:
                raise ConversionError(
                    f"{self._where}: {key} is stored compressed or otherwise transformed; save the checkpoint again untransformed"
                )
            if not is_name(path) or os.path.basename(path) != path or path in ("", ".", ".."):
                raise self._damaged(f"{key} is placed in {one_line(path)}, which is not a file in the folder")
            if path not in paths:  # a few files hold all items
                paths[path] = str(self._folder / path)
            start, nbytes = self._numbers((start, nbytes), key)
            yield (key, offset), Item(paths[path], start, nbytes)

    def _tensor(self, key: str, entry: Any) -> ChunkedTensor:
        properties, size, chunks = self._fields(entry, "properties", "size", "chunks")
        state = getattr(properties, "state", None)
        dtype = state[0] if type(state) is tuple and state else None
        if not isinstance(dtype, DType) or type(chunks) is not list:
            raise self._damaged(f"{key} has no dtype or no chunks")
        shape = self._numbers(size, key)
        return ChunkedTensor(dtype, shape, tuple(self._chunk(key, shape, chunk) for chunk in chunks))

    def _chunk(self, key: str, shape: tuple[int, ...], chunk: Any) -> Chunk:
        offsets, sizes = (self._numbers(value, key) for value in self._fields(chunk, "offsets", "sizes"))
        inside = len(offsets) == len(sizes) == len(shape) and all(
            offset + size <= whole for offset, size, whole in zip(offsets, sizes, shape, strict=True)
        )
        if not inside:
            raise self._damaged(f"{key} of shape {list(shape)} has a chunk {list(sizes)} at {list(offsets)}")
        return Chunk(offsets, sizes, self._item(key, offsets))

    def _item(self, key: str, offset: tuple[int, ...] | None) -> Item:
        item = self._items.get((key, offset))
        if item is None:
            at = "" if offset is None else f" at {list(offset)}"
            raise self._damaged(f"it does not say where {key}{at} is stored")
        return item

    def _fields(self, value: Any, *names: str, optional: bool = False) -> list[Any]:
        """Attributes of a stand-in; absent ones are None if they are `optional`."""
        state = value.state if isinstance(value, StandIn) else None
        if isinstance(state, dict):
            try:
                return [state[name] for name in names]
            except KeyError:
                if optional:
                    return [state.get(name) for name in names]
        kind = getattr(value, "qualname", type(value).__name__)
        raise self._damaged(f"a {kind} has no {' or no '.join(names)}")

    def _check_name(self, key: Any) -> None:
        if not is_name(key):
            raise self._damaged(f"it lists {one_line(key)} as a name")

    def _numbers(self, values: Any, key: Any) -> tuple[int, ...]:
        if type(values) is tuple:
            for value in values:
                if type(value) is not int or not 0 <= value < _TOO_LARGE:
                    break
            else:
                return values
        raise self._damaged(f"{key} has a {type(values).__name__} where it should have whole numbers")

    def _damaged(self, fault: str) -> ConversionError:
        return ConversionError(f"{self._where} is damaged or not the index of a distributed checkpoint: {fault}")


def _check_files(folder: Path, reader: _Reader) -> None:
    ends: dict[str, int] = {}
    for item in reader.items:
        ends[item.path] = max(ends.get(item.path, 0), item.start + item.nbytes)
    problems = []
    for path, end in sorted(ends.items()):
        try:
            size = os.stat(path).st_size
        except FileNotFoundError:
            problems.append(f"{os.path.basename(path)} is missing")
            continue
        except OSError as error:
            problems.append(f"{one_line(os.path.basename(path))} cannot be read: {reason_of(error)}")
            continue
        if size < end:
            problems.append(f"{os.path.basename(path)} is truncated: {end - size} bytes are missing")
    raise_all(f"{folder} is incomplete; copy it again:", problems)

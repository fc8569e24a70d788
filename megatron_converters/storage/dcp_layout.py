"""Folders of `torch.distributed.checkpoint` (DCP), laid out before their contents are known.

A file is one embedded archive after the other, each as `torch.save` would write it, at a multiple of 64 bytes so that tensors
lie as aligned as in a file of their own. The index is the pickle of torch's own classes by name, written without torch: with the
attributes that every torch since 2.3 reads, whereas an installed torch would add those of its own version.
Source: `torch/distributed/checkpoint/metadata.py`, `filesystem.py` and `planner_helpers.py` of torch 2.3 to 2.13.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..dtypes import DType
from . import torch_zip
from .output import Layout, Pieces, fixed
from .pickling import Call, Instance, NewTensor, dumps
from .zip_layout import ALIGNMENT

#: The inner folder of an archive that `torch.save` writes into an open file.
_ARCHIVE = "archive"
_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"


@dataclass(frozen=True)
class NewChunk:
    """A box of the tensor `key`, of shape `shape` as a whole, to be filled under `name`."""

    key: str
    shape: tuple[int, ...]
    dtype: DType
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def name(self) -> str:
        """What it is called in its file."""
        return f"{self.key} [{','.join(map(str, self.offsets))}]"


@dataclass(frozen=True)
class NewObject:
    """An object without content under `key`: how megatron-core stores the extra state of a module that has none."""

    key: str


@dataclass(frozen=True)
class Placed:
    """An item of a file: `nbytes` from byte `start` on."""

    item: NewChunk | NewObject
    file: str
    start: int
    nbytes: int


def lay_out(file: str, items: Sequence[NewChunk | NewObject]) -> tuple[Layout, list[Placed]]:
    """Where everything will lie in a file of these items, in this order."""
    placed, parts, regions = [], [], {}
    end = 0
    for item in items:
        start = end + -end % ALIGNMENT
        archive = _of_tensor(item.dtype, item.sizes) if isinstance(item, NewChunk) else _of_nothing()
        placed.append(Placed(item, file, start, archive.nbytes))
        parts.append((start, archive, item.name if isinstance(item, NewChunk) else None))
        if isinstance(item, NewChunk):
            offset, nbytes = archive.regions[_ARCHIVE]
            regions[item.name] = (start + offset, nbytes)
        end = start + archive.nbytes

    def finish(crcs: Mapping[str, int]) -> Pieces:
        end = 0
        for start, archive, name in parts:
            yield end, bytes(start - end)
            for offset, data in archive.finish({} if name is None else {_ARCHIVE: crcs[name]}):
                yield start + offset, data
            end = start + archive.nbytes

    return Layout(end, regions, finish), placed


@lru_cache(maxsize=1024)
def _of_tensor(dtype: DType, sizes: tuple[int, ...]) -> Layout:
    return torch_zip.layout(_ARCHIVE, NewTensor(_ARCHIVE, dtype, sizes))


@lru_cache(maxsize=1)
def _of_nothing() -> Layout:
    return torch_zip.layout(_ARCHIVE, [None])


def index(placed: Iterable[Placed]) -> Layout:
    """The file `.metadata` for all items of all files."""
    entries: dict[str, Instance] = {}
    chunks: dict[str, list[Instance]] = {}
    places: dict[Instance, Instance] = {}
    for entry in placed:
        item = entry.item
        if isinstance(item, NewObject):
            entries[item.key] = Instance(_METADATA, "BytesStorageMetadata", {})
            key: dict[str, Any] = {"fqn": item.key, "index": None}
        else:
            boxes = chunks.setdefault(item.key, [])
            entries.setdefault(item.key, _tensor_entry(item, boxes))
            key = {"fqn": item.key, "index": len(boxes), "offset": _size(item.offsets)}
            box = {"offsets": _size(item.offsets), "sizes": _size(item.sizes)}
            boxes.append(Instance(_METADATA, "ChunkStorageMetadata", box))
        place = {"relative_path": entry.file, "offset": entry.start, "length": entry.nbytes}
        places[Instance(_METADATA, "MetadataIndex", key)] = Instance(_FILESYSTEM, "_StorageInfo", place)
    content = {"state_dict_metadata": entries, "planner_data": None, "storage_data": places}
    return fixed(dumps(Instance(_METADATA, "Metadata", content))[0])


def _tensor_entry(item: NewChunk, boxes: list[Instance]) -> Instance:
    strided = Call("torch.serialization", "_get_layout", ("torch.strided",))
    contiguous = Call(_METADATA, "_MEM_FORMAT_ENCODING", (0,))
    # dtype, layout, requires_grad, memory format, pinned (`TensorProperties.__getstate__`)
    properties = Instance(_METADATA, "TensorProperties", (item.dtype, strided, False, contiguous, False))
    return Instance(
        _METADATA, "TensorStorageMetadata", {"properties": properties, "size": _size(item.shape), "chunks": boxes}
    )


def _size(numbers: tuple[int, ...]) -> Call:
    return Call("torch", "Size", (numbers,))

"""Folders of `torch.distributed.checkpoint` (DCP), laid out before their contents are known.

A file is one embedded archive after the other, each as `torch.save` would write it, at a multiple of 64 bytes so that tensors
lie as aligned as in a file of their own. The index is the pickle of torch's own classes by name, written without torch: with the
attributes that every torch since 2.3 reads, whereas an installed torch would add those of its own version.
Source: `torch/distributed/checkpoint/metadata.py`, `filesystem.py` and `planner_helpers.py` of torch 2.3 to 2.13.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from ..basics.dtypes import DType
from . import torch_zip
from .checksum import digest
from .output_file import Layout, Pieces, fixed
from .pickle_writer import Call, Instance, NewTensor, Pairs, dumps
from .zip_layout import ALIGNMENT

#: The inner folder of an archive that `torch.save` writes into an open file.
_ARCHIVE = "archive"
_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"


class NewChunk(NamedTuple):
    """A box of the tensor `key`, of shape `shape` as a whole, to be filled under `name`."""

    key: str
    shape: tuple[int, ...]
    dtype: DType
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def name(self) -> str:
        """What it is called in its file."""
        return chunk_name(self.key, self.offsets)


def chunk_name(key: str, offsets: Iterable[int]) -> str:
    """What the chunk of a tensor that begins there is called."""
    return f"{key} [{','.join(map(str, offsets))}]"


class NewObject(NamedTuple):
    """An object without content under `key`: how megatron-core stores the extra state of a module that has none."""

    key: str


class Placed(NamedTuple):
    """An item of a file: `nbytes` from byte `start` on."""

    item: NewChunk | NewObject
    file: str
    start: int
    nbytes: int


def lay_out(file: str, items: Sequence[NewChunk | NewObject]) -> tuple[Layout, list[Placed]]:
    """Where everything will lie in a file of these items, in this order."""
    placed, parts = [], []
    regions: dict[str, tuple[int, int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    end = 0
    for item in items:
        start = end + -end % ALIGNMENT
        name, archive = None, _of_nothing()
        if isinstance(item, NewChunk):
            name, archive = item.name, _of_tensor(item.dtype, item.sizes)
            offset, nbytes = archive.regions[_ARCHIVE]
            regions[name], shapes[name] = (start + offset, nbytes), item.sizes
        placed.append(Placed(item, file, start, archive.nbytes))
        parts.append((start, archive, name))
        end = start + archive.nbytes

    def finish(crcs: Mapping[str, int]) -> Pieces:
        end = 0
        for start, archive, name in parts:
            yield end, bytes(start - end)
            for offset, data in archive.finish({} if name is None else {_ARCHIVE: crcs[name]}):
                yield start + offset, data
            end = start + archive.nbytes

    structure = digest(archive.structure.encode() for _, archive, _ in parts)
    return Layout(end, regions, finish, structure, shapes=shapes), placed


@lru_cache(maxsize=1024)
def _of_tensor(dtype: DType, sizes: tuple[int, ...]) -> Layout:
    return torch_zip.layout(_ARCHIVE, NewTensor(_ARCHIVE, dtype, sizes))


@lru_cache(maxsize=1)
def _of_nothing() -> Layout:
    return torch_zip.layout(_ARCHIVE, [None])


def index(placed: Sequence[Placed]) -> Layout:
    """The file `.metadata` for all items of all files."""
    chunks: dict[str, list[NewChunk]] = {}
    for item, *_ in placed:
        found = chunks.setdefault(item.key, [])
        if isinstance(item, NewChunk):
            found.append(item)
    content = {
        "state_dict_metadata": Pairs((key, _entry(found)) for key, found in chunks.items()),
        "planner_data": None,
        "storage_data": Pairs(_places(placed)),
    }
    return fixed(dumps(Instance(_METADATA, "Metadata", content))[0])


def _places(placed: Iterable[Placed]) -> Iterator[tuple[Instance, Instance]]:
    """Where each item lies."""
    numbers: Counter[str] = Counter()
    for item, file, start, nbytes in placed:
        key: dict[str, Any] = {"fqn": item.key, "index": None}
        if isinstance(item, NewChunk):
            key = {"fqn": item.key, "index": numbers[item.key], "offset": _size(item.offsets)}
            numbers[item.key] += 1
        place = {"relative_path": file, "offset": start, "length": nbytes}
        yield Instance(_METADATA, "MetadataIndex", key), Instance(_FILESYSTEM, "_StorageInfo", place)


def _entry(chunks: Sequence[NewChunk]) -> Instance:
    """What the index says of a tensor in these chunks, or of an object, which has none."""
    if not chunks:
        return Instance(_METADATA, "BytesStorageMetadata", {})
    strided = Call("torch.serialization", "_get_layout", ("torch.strided",))
    contiguous = Call(_METADATA, "_MEM_FORMAT_ENCODING", (0,))
    # dtype, layout, requires_grad, memory format, pinned (`TensorProperties.__getstate__`)
    properties = Instance(_METADATA, "TensorProperties", (chunks[0].dtype, strided, False, contiguous, False))
    boxes = [
        Instance(_METADATA, "ChunkStorageMetadata", {"offsets": _size(chunk.offsets), "sizes": _size(chunk.sizes)})
        for chunk in chunks
    ]
    state = {"properties": properties, "size": _size(chunks[0].shape), "chunks": boxes}
    return Instance(_METADATA, "TensorStorageMetadata", state)


def _size(numbers: tuple[int, ...]) -> Call:
    return Call("torch", "Size", (numbers,))

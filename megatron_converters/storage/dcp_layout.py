"""Folders of `torch.distributed.checkpoint` (DCP), laid out before their contents are known.

A file is a sequence of embedded archives, each as `torch.save` would write it, at a multiple of 64 bytes so that tensors are
as aligned as in a file of their own. The index is a pickle that names torch's own classes, written without torch: it has the
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
from .output_file import FileLayout, Writes, fixed
from .pickle_writer import Call, Instance, NewTensor, Pairs, dumps
from .zip_layout import ALIGNMENT

#: Inner folder of an archive that `torch.save` writes into an open file.
_ARCHIVE = "archive"
_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"


class NewChunk(NamedTuple):
    """Box of the tensor `key`, to be filled under `name`; `shape` is the whole tensor's."""

    key: str
    shape: tuple[int, ...]
    dtype: DType
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name under which the chunk is filled in its file."""
        return chunk_name(self.key, self.offsets)


def chunk_name(key: str, offsets: Iterable[int]) -> str:
    """Name of the chunk of the tensor `key` that begins at `offsets`."""
    return f"{key} [{','.join(map(str, offsets))}]"


class NewObject(NamedTuple):
    """Empty object under `key`, as megatron-core stores the extra state of a module that has none."""

    key: str


class Placed(NamedTuple):
    """Item at its place in a file: `nbytes` bytes from byte `start` on."""

    item: NewChunk | NewObject
    file: str
    start: int
    nbytes: int


def lay_out(file: str, items: Sequence[NewChunk | NewObject]) -> tuple[FileLayout, list[Placed]]:
    """Layout of a file of these items in this order, and the place of each."""
    placed: list[Placed] = []
    archives: list[_Archive] = []
    regions: dict[str, tuple[int, int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    numbers: dict[str, int] = {}
    end = 0
    for item in items:
        start = end + -end % ALIGNMENT
        archive = _archive(item.dtype, item.sizes) if isinstance(item, NewChunk) else _archive()
        if isinstance(item, NewChunk):
            name = item.name
            regions[name], shapes[name] = (start + len(archive.head), archive.tensor_nbytes), item.sizes
            numbers[name] = len(placed)
        end = start + archive.layout.nbytes
        placed.append(Placed(item, file, start, archive.layout.nbytes))
        archives.append(archive)

    def until_tensor(number: int, end: int) -> Iterator[bytes]:
        """Bytes from `end` up to the next tensor of the archives from this number on."""
        for index in range(number, len(placed)):
            start = placed[index].start
            yield bytes(start - end)
            yield archives[index].head
            if archives[index].layout.regions:
                return
            end = start + placed[index].nbytes

    def trailer(name: str, crc: int) -> bytes:
        number = numbers[name]
        end = placed[number].start + placed[number].nbytes
        return b"".join((archives[number].tail(crc), *until_tensor(number + 1, end)))

    def finish(crcs: Mapping[str, int]) -> Writes:
        yield 0, b"".join(until_tensor(0, 0))
        for name, (offset, nbytes) in regions.items():
            yield offset + nbytes, trailer(name, crcs[name])

    structure = digest(archive.layout.structure.encode() for archive in archives)
    return FileLayout(end, regions, finish, structure, shapes=shapes, trailer=trailer), placed


class _Archive(NamedTuple):
    """Embedded archive of a tensor, or of an empty object: `head` are the bytes before the tensor, or all."""

    layout: FileLayout
    head: bytes

    @property
    def tensor_nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.layout.regions[_ARCHIVE][1]

    def tail(self, crc: int) -> bytes:
        """Bytes after the tensor, which has this CRC-32."""
        _, *rest = sorted(self.layout.finish({_ARCHIVE: crc}))
        return b"".join(data for _, data in rest)


@lru_cache(maxsize=1024)
def _archive(dtype: DType | None = None, sizes: tuple[int, ...] = ()) -> _Archive:
    """Archive of a tensor; without a dtype that of an empty object."""
    layout = torch_zip.layout(_ARCHIVE, [None] if dtype is None else NewTensor(_ARCHIVE, dtype, sizes))
    rest = sorted(layout.finish({_ARCHIVE: 0}))
    if dtype is None:
        return _Archive(layout, b"".join(data for _, data in rest))
    return _Archive(layout, rest[0][1])


def index(placed: Sequence[Placed]) -> FileLayout:
    """Layout of the file `.metadata`, which lists all items of all files."""
    chunks: dict[str, list[NewChunk]] = {}
    for item, *_ in placed:
        found = chunks.setdefault(item.key, [])
        if isinstance(item, NewChunk):
            found.append(item)
    content = {
        "state_dict_metadata": Pairs((key, _entry(found)) for key, found in chunks.items()),
        "planner_data": None,
        "storage_data": Pairs(_storage_data(placed)),
    }
    return fixed(dumps(Instance(_METADATA, "Metadata", content))[0])


def _storage_data(placed: Iterable[Placed]) -> Iterator[tuple[Instance, Instance]]:
    """Index entries (`MetadataIndex`, `_StorageInfo`) that say where each item is stored."""
    numbers: Counter[str] = Counter()
    for item, file, start, nbytes in placed:
        key: dict[str, Any] = {"fqn": item.key, "index": None}
        if isinstance(item, NewChunk):
            key = {"fqn": item.key, "index": numbers[item.key], "offset": _torch_size(item.offsets)}
            numbers[item.key] += 1
        place = {"relative_path": file, "offset": start, "length": nbytes}
        yield Instance(_METADATA, "MetadataIndex", key), Instance(_FILESYSTEM, "_StorageInfo", place)


def _entry(chunks: Sequence[NewChunk]) -> Instance:
    """Index entry of a tensor with these chunks, or of an object, which has none."""
    if not chunks:
        return Instance(_METADATA, "BytesStorageMetadata", {})
    strided = Call("torch.serialization", "_get_layout", ("torch.strided",))
    contiguous = Call(_METADATA, "_MEM_FORMAT_ENCODING", (0,))
    # dtype, layout, requires_grad, memory format, pinned (`TensorProperties.__getstate__`)
    properties = Instance(_METADATA, "TensorProperties", (chunks[0].dtype, strided, False, contiguous, False))
    boxes = [
        Instance(
            _METADATA,
            "ChunkStorageMetadata",
            {"offsets": _torch_size(chunk.offsets), "sizes": _torch_size(chunk.sizes)},
        )
        for chunk in chunks
    ]
    state = {"properties": properties, "size": _torch_size(chunks[0].shape), "chunks": boxes}
    return Instance(_METADATA, "TensorStorageMetadata", state)


def _torch_size(numbers: tuple[int, ...]) -> Call:
    return Call("torch", "Size", (numbers,))

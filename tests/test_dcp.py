"""Folders of torch.distributed.checkpoint, read without torch, against torch itself."""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_converters.basics.dtypes import BY_NAME
from megatron_converters.basics.errors import ConversionError
from megatron_converters.conversion.composing import Piece, StoredName
from megatron_converters.conversion.copying import Executor
from megatron_converters.conversion.gathering import CHUNK_BYTES
from megatron_converters.conversion.outline import Fill
from megatron_converters.storage import dcp, safetensors
from megatron_converters.storage.tensor import StoredTensor

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read_whole(folder: Path, key: str) -> bytes:
    """The bytes of a tensor of one chunk."""
    tensor = dcp.read_index(folder).tensors[key]
    (chunk,) = tensor.chunks
    return np.ascontiguousarray(dcp.stored(chunk, tensor.dtype).array()).tobytes()


def save(folder: Path, state: dict[str, Any]) -> Path:
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    torch_dcp.save(state, storage_writer=FileSystemWriter(folder), planner=planner, no_dist=True)
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tensor and an object."""
    return save(tmp_path / "saved", {"w": torch.arange(12.0).view(3, 4), "x": [None]})


def edit(folder: Path, change: Callable[[Metadata], object]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_reads_what_torch_writes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Any] = {}
    for name, dtype in BY_NAME.items():
        raw = torch.randint(0, 256, (5 * 3 * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        state[name] = (raw % 2).bool() if name == "bool" else raw.view(dtype.torch)
        state[name] = state[name].view(5, 3)
    state |= {
        "transposed": torch.rand(4, 6).t(),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "o": {"a": 1},
    }
    folder = save(tmp_path, state)
    index = dcp.read_index(folder)
    assert list(index.objects) == ["o"] and index.tensors.keys() == state.keys() - {"o"}
    starts = [tensor.chunks[0].item.start % 8 for tensor in index.tensors.values()]
    assert any(starts), "some items should lie at odd addresses"
    for name, tensor in index.tensors.items():
        assert (tensor.dtype.torch, tensor.shape) == (state[name].dtype, tuple(state[name].shape))
        assert read_whole(folder, name) == bits(state[name]), name
        assert tensor.nbytes > state[name].nbytes


def test_torch_is_not_imported(saved: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from megatron_converters.storage import dcp;"
        "i = dcp.read_index(Path(sys.argv[1])); [dcp.stored(c, t.dtype) for t in i.tensors.values() for c in t.chunks];"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(saved)], check=True, cwd=Path(__file__).parents[1])


def chunk(*offsets: int, sizes: tuple[int, ...] = (2, 2)) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def write_chunks(folder: Path, whole: torch.Tensor, chunks: list[ChunkStorageMetadata], gap: int) -> None:
    """A tensor in chunks, `gap` bytes apart, in a file with an index by torch's classes."""
    folder.mkdir()
    places = {}
    with (folder / "__0_0.distcp").open("wb") as file:
        for number, box in enumerate(chunks):
            file.write(b"\0" * gap)
            start = file.tell()
            slices = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
            torch.save(whole[slices].clone(), file)
            places[MetadataIndex("w", box.offsets, number)] = _StorageInfo("__0_0.distcp", start, file.tell() - start)
    entry = TensorStorageMetadata(TensorProperties(dtype=whole.dtype), whole.size(), chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({"w": entry}, storage_data=places)))


@pytest.mark.parametrize("gap", [0, 1, 7])
def test_reads_chunks_at_any_address(tmp_path: Path, gap: int) -> None:
    whole = torch.rand(4, 6, dtype=torch.bfloat16)
    chunks = [chunk(row, col) for row in (0, 2) for col in (0, 2, 4)]
    write_chunks(tmp_path / "c", whole, chunks, gap)
    tensor = dcp.read_index(tmp_path / "c").tensors["w"]
    assert len(tensor.chunks) == 6
    for part in tensor.chunks:
        (row, col), (rows, cols) = part.offsets, part.sizes
        values = np.ascontiguousarray(dcp.stored(part, tensor.dtype).array()).tobytes()
        assert values == bits(whole[row : row + rows, col : col + cols])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_odd_addresses_are_copied_and_cast(tmp_path: Path, dtype: str) -> None:
    """More than one chunk of the copy, so that both kinds of views are written."""
    rows = CHUNK_BYTES // 256
    whole = torch.rand(rows, 256, dtype=torch.bfloat16)
    write_chunks(tmp_path / "c", whole, [chunk(0, 0, sizes=(rows, 256))], 1)
    tensor = dcp.read_index(tmp_path / "c").tensors["w"]
    data = dcp.stored(tensor.chunks[0], tensor.dtype)
    assert data.offset % 2 == 1
    target = BY_NAME[dtype]
    file = safetensors.lay_out(tmp_path / "a.safetensors", {"w": (target, (rows, 256))}, {})
    executor = Executor()
    numbers = np.arange(rows)
    fill = Fill("a.safetensors", "w", target, (rows, 256), numbers, 0)
    executor.fill(file, fill, executor.plan(fill, [Piece(data, numbers, 0, StoredName("here", "w"))]))
    executor.finish()
    file.close()
    found = safetensors.read(tmp_path / "a.safetensors").tensors["w"].array().tobytes()
    assert found == bits(whole.to(target.torch))


def test_what_the_index_does_not_need_may_be_anything_of_torch_distributed(saved: Path) -> None:
    from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

    def add_plans(metadata: Metadata) -> None:
        item = WriteItem(MetadataIndex("w"), WriteItemType.TENSOR)
        metadata.all_local_plans = [SavePlan([item])]  # type: ignore[attr-defined]
        metadata.version = "9.9"

    edit(saved, add_plans)
    assert list(dcp.read_index(saved).tensors) == ["w"]


def stale(metadata: Metadata) -> None:
    metadata.storage_data = {MetadataIndex("w", (1, 0)): next(iter(metadata.storage_data.values()))}


def places(metadata: Metadata) -> list[_StorageInfo]:
    return list(metadata.storage_data.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (stale, r"it does not say where w at \[0, 0\] is stored"),
        (lambda m: m.storage_data.clear(), "it does not say where"),
        (lambda m: setattr(m, "storage_data", None), "does not say what is stored where"),
        (lambda m: delattr(m, "state_dict_metadata"), "a Metadata has no state_dict_metadata"),
        (lambda m: m.state_dict_metadata.update(w=3), "a int has no properties"),
        (
            lambda m: setattr(m.state_dict_metadata["w"], "size", torch.Size([3, 3])),
            r"has a chunk \[3, 4\] at \[0, 0\]",
        ),
        (lambda m: setattr(m.state_dict_metadata["w"], "size", [3, 4]), "w has a list where"),
        (lambda m: setattr(m.state_dict_metadata["w"], "chunks", None), "no dtype or no chunks"),
        (lambda m: setattr(m.state_dict_metadata["w"].chunks[0], "sizes", torch.Size([12])), r"has a chunk \[12\]"),
        (lambda m: setattr(places(m)[0], "relative_path", "../other.distcp"), "is not a file in the folder"),
        (lambda m: setattr(places(m)[0], "relative_path", "/etc/passwd"), "is not a file in the folder"),
        (lambda m: setattr(places(m)[0], "relative_path", ".."), "is not a file in the folder"),
        (lambda m: setattr(places(m)[0], "offset", -1), "where it should have whole numbers"),
        (lambda m: setattr(places(m)[0], "length", "9"), "where it should have whole numbers"),
        (lambda m: setattr(places(m)[0], "length", None), "has no relative_path or no offset or no length"),
        (
            lambda m: setattr(places(m)[0], "transform_descriptors", ["zstd"]),
            "stored compressed or otherwise transformed",
        ),
        (lambda m: m.storage_data.update({7: places(m)[0]}), "a int has no fqn"),
        (lambda m: m.storage_data.update({MetadataIndex(7): places(m)[0]}), "it lists 7 as a name"),  # type: ignore[arg-type]
        (lambda m: [setattr(i, "length", i.length + 999) for i in places(m)], r"is truncated: 999 bytes are missing"),
        (lambda m: [setattr(i, "relative_path", "__9_9.distcp") for i in places(m)], "__9_9.distcp is missing"),
    ],
)
def test_an_index_that_is_wrong_is_refused(saved: Path, change: Callable[[Metadata], object], message: str) -> None:
    edit(saved, change)
    with pytest.raises(ConversionError, match=message) as raised:
        dcp.read_index(saved)
    assert str(saved) in str(raised.value)


def first_of(folder: Path) -> StoredTensor:
    tensor = dcp.read_index(folder).tensors["w"]
    return dcp.stored(tensor.chunks[0], tensor.dtype)


def test_a_chunk_that_is_not_what_the_index_says_is_refused(saved: Path) -> None:
    entry = TensorStorageMetadata(
        TensorProperties(dtype=torch.float16), torch.Size([3, 4]), [chunk(0, 0, sizes=(3, 4))]
    )
    edit(saved, lambda metadata: metadata.state_dict_metadata.update(w=entry))
    with pytest.raises(ConversionError, match=r"should hold float16 \[3, 4\] but holds float32 \[3, 4\]"):
        first_of(saved)


def test_a_chunk_that_is_no_tensor_is_refused(saved: Path) -> None:
    def exchange(metadata: Metadata) -> None:
        w, x = MetadataIndex("w", (0, 0)), MetadataIndex("x")
        metadata.storage_data[w], metadata.storage_data[x] = metadata.storage_data[x], metadata.storage_data[w]

    edit(saved, exchange)
    with pytest.raises(ConversionError, match="but holds list"):
        first_of(saved)


def test_damaged_archives_are_refused(saved: Path) -> None:
    (file,) = saved.glob("*.distcp")
    item = dcp.read_index(saved).tensors["w"].chunks[0].item
    data = bytearray(file.read_bytes())
    end = item.start + item.nbytes
    (directory,) = struct.unpack_from(
        "<I", data, end - 6
    )  # where the archive's directory starts, counted in the archive
    for at, message in ((end - 20, "is truncated"), (item.start + directory, "is truncated"), (item.start, "damaged")):
        damaged = bytearray(data)
        damaged[at : at + 4] = b"\xff\xff\xff\xff"
        file.write_bytes(damaged)
        with pytest.raises(ConversionError, match=message) as raised:
            first_of(saved)
        assert f"from byte {item.start} on" in str(raised.value)
    file.write_bytes(data)
    assert first_of(saved).shape == (3, 4)


def test_a_pickle_that_calls_something_is_refused(saved: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return __import__("os").system, ("true",)

    edit(saved, lambda metadata: setattr(metadata, "planner_data", Hostile()))
    with pytest.raises(ConversionError, match=r"asks for posix\.system"):
        dcp.read_index(saved)
    (saved / ".metadata").write_bytes(b"\x80\x02X\x01\x00\x00\x00aQ.")
    with pytest.raises(ConversionError, match="persistent id"):
        dcp.read_index(saved)
    (saved / ".metadata").unlink()
    with pytest.raises(ConversionError, match=r"cannot open .*\.metadata"):
        dcp.read_index(saved)


def test_objects_alone(tmp_path: Path) -> None:
    places = {MetadataIndex("o"): _StorageInfo("__0_0.distcp", 0, 3)}
    (tmp_path / "__0_0.distcp").write_bytes(b"abc")
    metadata = Metadata({"o": BytesStorageMetadata()}, storage_data=places)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    index = dcp.read_index(tmp_path)
    assert not index.tensors and index.objects["o"].nbytes == 3


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\ud800", "", "..", "../x", "/etc/passwd"])
def test_a_file_name_that_is_none(saved: Path, name: str) -> None:
    def rename(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = name

    edit(saved, rename)
    with pytest.raises(ConversionError, match=r"is placed in .*, which is not a file in the folder") as caught:
        dcp.read_index(saved)
    assert str(caught.value).isprintable()


def test_a_file_name_that_is_too_long(saved: Path) -> None:
    edit(saved, lambda metadata: [setattr(i, "relative_path", "x" * 5000) for i in metadata.storage_data.values()])
    with pytest.raises(ConversionError, match="cannot be read: File name too long"):
        dcp.read_index(saved)


def test_a_key_that_is_no_name(saved: Path) -> None:
    edit(saved, lambda metadata: metadata.state_dict_metadata.update({"a\nb": metadata.state_dict_metadata["w"]}))
    with pytest.raises(ConversionError, match=r"it lists a\\nb as a name"):
        dcp.read_index(saved)

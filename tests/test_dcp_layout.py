"""Folders of torch.distributed.checkpoint, laid out without torch, against torch's own reader and writer."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorProperties

from megatron_converters.basics.dtypes import BY_NAME
from megatron_converters.storage import dcp, dcp_layout
from megatron_converters.storage.dcp_layout import NewChunk, NewObject, Placed

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

Boxes = list[tuple[tuple[int, ...], tuple[int, ...]]]


def write(folder: Path, tensors: dict[str, tuple[torch.Tensor, Boxes]], objects: list[str], files: int = 2) -> Path:
    """The tensors in their boxes, dealt out to files in turn."""
    folder.mkdir()
    items: list[NewChunk | NewObject] = [NewObject(key) for key in objects]
    for key, (tensor, boxes) in tensors.items():
        dtype = BY_NAME[str(tensor.dtype).removeprefix("torch.")]
        items += [NewChunk(key, tuple(tensor.shape), dtype, offsets, sizes) for offsets, sizes in boxes]
    placed: list[Placed] = []
    for number in range(files):
        layout, mine = dcp_layout.lay_out(f"__0_{number}.distcp", items[number::files])
        placed += mine
        file = layout.create(folder / f"__0_{number}.distcp")
        for entry in mine:
            if isinstance(entry.item, NewChunk):
                where = tuple(slice(o, o + s) for o, s in zip(entry.item.offsets, entry.item.sizes, strict=True))
                part = tensors[entry.item.key][0][where].contiguous()
                file.write(entry.item.name, 0, part.reshape(-1).view(torch.uint8).numpy())
        file.close()
    index = dcp_layout.index(placed).create(folder / ".metadata")
    index.close()
    return folder


def some_tensors() -> dict[str, tuple[torch.Tensor, Boxes]]:
    generator = torch.Generator().manual_seed(0)
    halves: Boxes = [((0, 0), (2, 3)), ((2, 0), (3, 3))]
    tensors = {}
    for name, dtype in BY_NAME.items():
        raw = torch.randint(0, 256, (5 * 3 * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        tensors[name] = ((raw % 2).bool() if name == "bool" else raw.view(dtype.torch)).view(5, 3), halves
    stack = torch.rand(2, 3, 4, generator=generator)
    tensors["stack"] = stack, [((i, j, 0), (1, 1, 4)) for i in range(2) for j in range(3)]
    tensors["vector"] = torch.rand(7, generator=generator), [((0,), (7,))]
    return tensors


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_torch_loads_it(tmp_path: Path) -> None:
    tensors = some_tensors()
    folder = write(tmp_path / "c", tensors, ["a._extra_state/shard_0_2", "a._extra_state/shard_1_2"])
    found = {key: torch.zeros_like(tensor) for key, (tensor, _) in tensors.items()}
    torch_dcp.load(found, storage_reader=FileSystemReader(folder), planner=DefaultLoadPlanner(), no_dist=True)
    for key, (tensor, _) in tensors.items():
        assert raw(found[key]) == raw(tensor), key


def test_our_own_reader_reads_it(tmp_path: Path) -> None:
    tensors = some_tensors()
    index = dcp.read_index(write(tmp_path / "c", tensors, ["a._extra_state/shard_0_1"]))
    assert list(index.objects) == ["a._extra_state/shard_0_1"] and index.tensors.keys() == tensors.keys()
    for key, tensor in index.tensors.items():
        assert (tensor.dtype.torch, tensor.shape) == (tensors[key][0].dtype, tuple(tensors[key][0].shape))
        for chunk in tensor.chunks:
            stored = dcp.stored(chunk, tensor.dtype)
            where = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            assert np.ascontiguousarray(stored.array()).tobytes() == raw(tensors[key][0][where])
            assert stored.offset % 64 == 0


def test_the_index_is_what_torch_s_classes_hold(tmp_path: Path) -> None:
    """Equal to what torch's own writer makes of the same plan, but for what older releases would not read."""
    folder = write(tmp_path / "c", some_tensors(), ["o"])
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    assert type(metadata) is Metadata
    assert set(vars(metadata)) == {"state_dict_metadata", "planner_data", "storage_data"}
    assert metadata.state_dict_metadata["o"] == BytesStorageMetadata()
    vector = metadata.state_dict_metadata["vector"]
    assert vector.properties == TensorProperties(dtype=torch.float32) and vector.size == torch.Size([7])
    assert type(vector.size) is torch.Size and type(vector.chunks[0].offsets) is torch.Size
    own = torch_dcp.FileSystemWriter(tmp_path / "own")
    torch_dcp.save({"vector": torch.zeros(7)}, storage_writer=own, no_dist=True)
    theirs = pickle.loads((tmp_path / "own" / ".metadata").read_bytes())
    assert theirs.state_dict_metadata["vector"] == vector
    (key,) = theirs.storage_data
    assert key in metadata.storage_data and hash(key) in map(hash, metadata.storage_data)
    assert {vars(k)["index"] for k in metadata.storage_data if k.fqn == "stack"} == set(range(6))


def test_items_are_archives_of_torch_save(tmp_path: Path) -> None:
    """Each item by itself, as `torch.save` writes it into an open file, but for the digits that tell files apart."""
    folder = write(tmp_path / "c", {"w": (torch.arange(6.0).view(2, 3), [((0, 0), (2, 3))])}, ["o"], files=1)
    data = (folder / "__0_0.distcp").read_bytes()
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for key, info in metadata.storage_data.items():
        item = data[info.offset : info.offset + info.length]
        assert zipfile.ZipFile(io.BytesIO(item)).testzip() is None
        buffer = io.BytesIO()
        torch.save(torch.arange(6.0).view(2, 3) if key.fqn == "w" else [None], buffer)
        ours, theirs = (zipfile.ZipFile(io.BytesIO(part)) for part in (item, buffer.getvalue()))
        assert len(item) == len(buffer.getvalue()) and ours.namelist() == theirs.namelist()
        for name in ours.namelist():
            if not name.endswith((".data/serialization_id", "data.pkl")):
                assert ours.read(name) == theirs.read(name), name
        loaded = torch.load(io.BytesIO(item), weights_only=True)
        assert loaded == [None] if key.fqn == "o" else torch.equal(loaded, torch.arange(6.0).view(2, 3))


def test_torch_is_not_imported() -> None:
    code = (
        "import sys; from megatron_converters.storage import dcp_layout as d;"
        "from megatron_converters.basics.dtypes import BY_NAME;"
        "l, p = d.lay_out('f', [d.NewChunk('w', (2,), BY_NAME['float32'], (0,), (2,)), d.NewObject('o')]); d.index(p);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])

"""`verify OUT` names the tensor whose shape, dtype or place a file came to say otherwise, though no byte of it changed."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import Metadata

from megatron_converters.comparison.manifest_check import check_output
from megatron_converters.conversion.journal import with_digest
from megatron_converters.conversion.progress import Silent
from megatron_converters.storage import dcp
from tests.conversions import hf_to_megatron, hf_to_torch_dist, megatron_to_hf

HFModel = Callable[..., Path]
_FILE = "mp_rank_00/model_optim_rng.pt"
_DOWN, _FC2 = "model.layers.1.mlp.down_proj.weight", "decoder.layers.1.mlp.linear_fc2.weight"
_OUTPUT, _NORM = "output_layer.weight", "decoder.final_layernorm.weight"


@pytest.fixture
def torch_out(hf_model: HFModel, tmp_path: Path) -> Path:
    return hf_to_megatron(hf_model("llama2"), tmp_path / "torch") / "iter_0000001"


@pytest.fixture
def hf_out(torch_out: Path, tmp_path: Path) -> Path:
    return megatron_to_hf(torch_out, tmp_path / "hf")


@pytest.fixture
def dist_out(hf_model: HFModel, tmp_path: Path) -> Path:
    """Of TP 2, so that a tensor has two chunks."""
    return hf_to_torch_dist(hf_model("llama2"), tmp_path / "dist", tp=2) / "iter_0000001"


def _faults(folder: Path) -> list[str]:
    return [str(fault) for fault in check_output(folder, Silent()).faults]


def _replace(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    path.write_bytes(data.replace(old, new))


def _reshape(hf_out: Path) -> None:
    header = f'"{_DOWN}":{{"dtype":"F32","shape":['.encode()
    _replace(hf_out / "model.safetensors", header + b"64,112]", header + b"112,64]")


def test_a_shape_in_a_safetensors_header(hf_out: Path) -> None:
    assert not _faults(hf_out)
    _reshape(hf_out)
    assert _faults(hf_out) == [
        "model.safetensors has changed outside its tensors",
        f"model.safetensors: {_DOWN} (layer 1 fc2) has shape [112, 64] instead of [64, 112]",
    ]


def test_a_shape_in_a_pickle(torch_out: Path) -> None:
    assert not _faults(torch_out)
    content = torch.load(torch_out / _FILE, weights_only=False)
    content["model"][_FC2] = content["model"][_FC2].view(112, 64)
    torch.save(content, torch_out / _FILE)
    named = [fault for fault in _faults(torch_out) if _FC2 in fault]
    assert named == [f"{_FILE}: {_FC2} (layer 1 fc2) has shape [112, 64] instead of [64, 112]"]


def _change_index(folder: Path, change: Callable[[Metadata], object]) -> None:
    metadata = pickle.loads((folder / dcp.METADATA).read_bytes())
    change(metadata)
    (folder / dcp.METADATA).write_bytes(pickle.dumps(metadata, 2))


def _swap_places(metadata: Metadata) -> None:
    one, other = (info for index, info in metadata.storage_data.items() if index.fqn == _OUTPUT)
    one.offset, other.offset = other.offset, one.offset
    one.relative_path, other.relative_path = other.relative_path, one.relative_path


def _resize(metadata: Metadata, key: str, size: tuple[int, ...]) -> None:
    metadata.state_dict_metadata[key].size = torch.Size(size)


def _resize_chunk(metadata: Metadata) -> None:
    metadata.state_dict_metadata[_OUTPUT].chunks[1].sizes = torch.Size((128, 63))


def _retype(metadata: Metadata) -> None:
    metadata.state_dict_metadata[_NORM].properties.dtype = torch.int32


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda metadata: _resize(metadata, _OUTPUT, (300, 64)),
            [f"{_OUTPUT} has shape [300, 64] instead of [256, 64]"],
        ),
        (_resize_chunk, [f"{_OUTPUT} [128,0] (output_layer) has shape [128, 63] instead of [128, 64]"]),
        (_retype, [f"{_NORM} [0] (final_norm) is int32 instead of float32"]),
        (
            _swap_places,
            [
                f"{_OUTPUT} [{row},0] (output_layer) is not in {{}}/__{rank}_0.distcp from byte "
                for row, rank in ((0, 1), (128, 0))
            ],
        ),
        (
            lambda metadata: _resize(metadata, _NORM, (63,)),
            [f"cannot be read: {{}}/.metadata is damaged or not the index of a distributed checkpoint: {_NORM}"],
        ),
    ],
    ids=["size", "chunk size", "dtype", "place", "contradiction"],
)
def test_an_index_that_says_otherwise(change: Callable[[Metadata], object], named: list[str], dist_out: Path) -> None:
    assert not _faults(dist_out)
    _change_index(dist_out, change)
    first, *found = _faults(dist_out)
    assert first.startswith(".metadata has ")
    assert len(found) == len(named)
    for fault, text in zip(found, named, strict=True):
        assert text.format(dist_out) in fault


def test_a_chunk_that_the_index_lost(dist_out: Path) -> None:
    def lose(metadata: Metadata) -> None:
        del metadata.state_dict_metadata[_NORM]

    _change_index(dist_out, lose)
    assert _faults(dist_out)[1:] == [f".metadata: {_NORM} [0] (final_norm) is missing"]


def _chunk(folder: Path, key: str) -> dcp.Item:
    return dcp.read_index(folder).tensors[key].chunks[0].item


def test_an_archive_that_holds_another_shape(dist_out: Path) -> None:
    item, buffer = _chunk(dist_out, _OUTPUT), io.BytesIO()
    data = bytearray(Path(item.path).read_bytes())
    whole = torch.load(io.BytesIO(data[item.start : item.start + item.nbytes]), weights_only=True)
    torch.save(whole.view(64, 128), buffer)
    assert len(buffer.getvalue()) == item.nbytes
    data[item.start : item.start + item.nbytes] = buffer.getvalue()
    Path(item.path).write_bytes(data)
    first, second = _faults(dist_out)
    assert first == "__0_0.distcp has changed outside its tensors"
    assert second.startswith(f"__0_0.distcp: {_OUTPUT} [0,0] (output_layer) cannot be read: ")
    assert second.endswith(
        "should hold float32 [128, 64] but holds float32 [64, 128]; the checkpoint is damaged, copy it again"
    )


def test_an_archive_that_cannot_be_read(dist_out: Path) -> None:
    item = _chunk(dist_out, _NORM)
    data = bytearray(Path(item.path).read_bytes())
    data[item.start + item.nbytes - 22] ^= 1  # the end record's signature
    Path(item.path).write_bytes(data)
    first, second = _faults(dist_out)
    assert "has changed outside its tensors" in first
    assert f"{_NORM} [0] (final_norm) cannot be read: " in second


def test_a_manifest_of_an_earlier_version_is_checked_for_the_rest(hf_out: Path, dist_out: Path) -> None:
    for folder in (hf_out, dist_out):
        manifest: dict[str, Any] = json.loads((folder / "conversion.json").read_text())
        for entry in manifest["files"].values():
            for tensor in entry["tensors"].values():
                assert tensor.pop("shape")
        (folder / "conversion.json").write_text(json.dumps(with_digest(manifest)))
        assert not _faults(folder)
    _reshape(hf_out)
    assert _faults(hf_out) == ["model.safetensors has changed outside its tensors"]
    _change_index(dist_out, _swap_places)
    assert len(_faults(dist_out)) == 3


def test_a_file_that_is_cut_or_missing_is_one_fault(dist_out: Path) -> None:
    path = dist_out / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-5])
    first, second = _faults(dist_out)
    assert first.startswith("__1_0.distcp has ")
    assert second.endswith("copy it again: - __1_0.distcp is truncated: 5 bytes are missing")
    (dist_out / dcp.METADATA).unlink()
    assert _faults(dist_out)[0] == ".metadata is missing"

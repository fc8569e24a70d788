"""Distributed checkpoints that other writers than megatron-core made, and those that are wrong."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from megatron_converters.basics.errors import ConversionError
from megatron_converters.formats.megatron.torch_dist_source import TorchDistSource
from tests.conversions import different, hf_to_megatron, megatron_to_hf, reshard
from tests.helpers import (
    convert,
    convert_back,
    hf_tensors,
    nothing_complete,
    rank_content,
    refused,
    same_tensors,
    succeeded,
)
from tests.oracle import by_hand_dist

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

HFModel = Callable[..., Path]
FAMILIES = ("llama3", "llama3.2-tied", "qwen2", "qwen3", "mixtral", "qwen2-moe")


@pytest.mark.parametrize(
    ("family", "stacked"), [*((f, s) for f in FAMILIES for s in (True, False)), ("qwen3-moe-dense-layers", False)]
)
def test_whole_tensors_in_one_chunk(hf_model: HFModel, tmp_path: Path, family: str, stacked: bool) -> None:
    """Layers and experts are axes of one chunk, or layers are keys; as `torch.distributed.checkpoint` writes plain tensors."""
    folder = hf_model(family)
    checkpoint = by_hand_dist.convert(folder, tmp_path / "megatron", stacked=stacked)
    assert different(hf_tensors(folder), hf_tensors(megatron_to_hf(checkpoint, tmp_path / "hf"))) == []


def test_to_the_torch_format(hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_model("mixtral", dtype="bfloat16")
    checkpoint = by_hand_dist.convert(folder, tmp_path / "megatron")
    sizes: dict[str, Any] = {"tp": 2, "pp": 2, "ep": 2}
    ours = reshard(checkpoint, tmp_path / "ours", **sizes)
    direct = hf_to_megatron(folder, tmp_path / "direct", divisor=16, **sizes)
    for file in sorted(direct.glob("iter_0000001/*/*.pt")):
        rank = file.parent.name
        one, other = (rank_content(root, rank)["model"] for root in (ours, direct))
        assert list(one) == list(other)
        tensors = [key for key, value in other.items() if value is not None]
        same_tensors({key: one[key] for key in tensors}, {key: other[key] for key in tensors})


def test_command_lines_find_the_format(hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_model("llama3")
    checkpoint = by_hand_dist.convert(folder, tmp_path / "megatron")
    run = succeeded(convert_back("--load-path", checkpoint, "--save-path", tmp_path / "hf"))
    assert different(hf_tensors(folder), hf_tensors(tmp_path / "hf")) == []
    assert "iter_0000001 (llama, tp=1, pp=1)" in run.out
    succeeded(convert_back("--load-path", checkpoint / "iter_0000001", "--save-path", tmp_path / "hf2"))
    options = ("--load-dir", checkpoint, "--save-dir", tmp_path / "torch", "--target-tensor-parallel-size", 2)
    succeeded(convert("--loader", "core", "--saver", "mcore", *options))
    succeeded(convert_back("--load-path", tmp_path / "torch", "--save-path", tmp_path / "hf3"))
    assert different(hf_tensors(folder), hf_tensors(tmp_path / "hf3")) == []


@pytest.fixture
def made(hf_model: HFModel, tmp_path: Path) -> Path:
    """A dense checkpoint, every tensor in one chunk."""
    return by_hand_dist.convert(hf_model("llama3"), tmp_path / "megatron")


def rewrite(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Save the tensors again after a change."""
    legacy = root / "legacy" / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(legacy, weights_only=False)
    entries = by_hand_dist.tensors(content.pop("model"), stacked=True)
    change(entries)
    for path in sorted((root / "iter_0000001").iterdir()):
        path.unlink()
    (root / "iter_0000001").rmdir()
    by_hand_dist.write(root / "iter_0000001", entries, content)


QKV = "decoder.layers.self_attention.linear_qkv.weight"


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda e: e.pop(QKV), [f"{QKV} (layer 0 qkv) is missing", "layer 3 qkv"]),
        (lambda e: e.update(extra=torch.ones(3)), ["extra is not a tensor of this model"]),
        (lambda e: e.update({"decoder.layers.extra": torch.ones(4, 3)}), ["decoder.layers.extra is not a tensor"]),
        (lambda e: e.update({QKV: e[QKV][:3]}), [f"{QKV} has shape [3, 128, 64]; the args require [4, 128, 64]"]),
        (lambda e: e.update({QKV: e[QKV][0]}), [f"{QKV} has shape [128, 64]; the args require [4, 128, 64]"]),
        (
            lambda e: e.update({QKV.replace("layers.", "layers.2."): torch.ones(128, 64)}),
            [f"layer 2 qkv: {QKV} and decoder.layers.2.self_attention.linear_qkv.weight are both there"],
        ),
        (
            lambda e: e.update(
                {"decoder.layers.1.mlp.linear_fc1.weight_w": e.pop("decoder.layers.mlp.linear_fc1.weight")[1]}
            ),
            [
                "decoder.layers.1.mlp.linear_fc1.weight_w has shape [224, 64]; the args require [112, 64]",
                "decoder.layers.1.mlp.linear_fc1.weight_v (layer 1 fc1) is missing",
                "decoder.layers.mlp.linear_fc1.weight (layer 0 fc1) is missing",
            ],
        ),
        (
            lambda e: e.pop("embedding.word_embeddings.weight"),
            ["is missing or not a matrix, so this is not a checkpoint of a GPT"],
        ),
    ],
)
def test_tensors_that_are_not_the_model_s(
    made: Path, change: Callable[[dict[str, Any]], object], messages: list[str]
) -> None:
    rewrite(made, change)
    with pytest.raises(ConversionError) as raised:
        TorchDistSource(made)
    assert [message for message in messages if message not in str(raised.value)] == [], str(raised.value)


def test_training_state_is_left_out_and_said(made: Path, tmp_path: Path) -> None:
    def add(entries: dict[str, Any]) -> None:
        entries["optimizer.state.exp_avg.output_layer.weight"] = torch.ones(1000)
        entries["chained_0.optimizer.state.exp_avg.output_layer.weight"] = torch.ones(1000)
        entries["rng_state/shard_0_1"] = [None]

    rewrite(made, add)
    (note,) = [note for note in TorchDistSource(made).origin.notes if "left out" in note and "training" in note]
    assert note.startswith(
        "left out of the conversion: chained_0, optimizer, rng_state (optimizer and training state, "
    )
    assert 8000 < int(note.split()[-2]) < 14000


def edit_index(root: Path, change: Callable[[Metadata], object]) -> None:
    path = root / "iter_0000001" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_gaps_and_overlaps_between_chunks(made: Path, tmp_path: Path) -> None:
    def narrow(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["output_layer.weight"]
        place = metadata.storage_data.pop(MetadataIndex("output_layer.weight", (0, 0)))
        offset = torch.Size([208 - 199, 0])
        entry.size = torch.Size([entry.size[0] + offset[0], *entry.size[1:]])
        entry.chunks = [ChunkStorageMetadata(offset, entry.chunks[0].sizes)]
        metadata.storage_data[MetadataIndex("output_layer.weight", offset)] = place

    def twice(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["output_layer.weight"]
        entry.chunks = entry.chunks * 2

    edit_index(made, twice)
    with pytest.raises(ConversionError, match=r"output_layer: row 0, columns 0 to 63, is stored 2 times"):
        megatron_to_hf(made, tmp_path / "hf")
    nothing_complete(tmp_path / "hf")
    rewrite(made, lambda entries: None)
    edit_index(made, narrow)
    with pytest.raises(ConversionError, match=r"output_layer\.weight has shape \[217, 64\]"):
        TorchDistSource(made)


def test_a_missing_chunk_is_named(made: Path, tmp_path: Path) -> None:
    edit_index(made, lambda metadata: metadata.state_dict_metadata["decoder.final_layernorm.weight"].chunks.clear())
    with pytest.raises(
        ConversionError, match=r"final_norm: no chunk of decoder\.final_layernorm\.weight holds any element of it"
    ):
        megatron_to_hf(made, tmp_path / "hf")


def test_other_formats_are_refused(made: Path) -> None:
    folder = made / "iter_0000001"
    for content, message in (
        ({"sharded_backend": "zarr", "sharded_backend_version": 1}, "is of the distributed format zarr, version 1"),
        (
            {"sharded_backend": "torch_dist", "sharded_backend_version": 2},
            "torch_dist, version 2; only torch_dist, version 1",
        ),
        ({}, "is of the distributed format None"),
    ):
        (folder / "metadata.json").write_text(json.dumps(content))
        with pytest.raises(ConversionError, match=message):
            TorchDistSource(made)
    (folder / "metadata.json").unlink()
    with pytest.raises(ConversionError, match=r"has no metadata\.json, which Megatron-LM writes last: copy it, too"):
        TorchDistSource(made)


def test_a_folder_of_both_formats_is_read_as_megatron_reads_it(made: Path, hf_model: HFModel, tmp_path: Path) -> None:
    (made / "iter_0000001" / "mp_rank_00").mkdir()
    run = succeeded(convert_back("--load-path", made, "--save-path", tmp_path / "hf"))
    assert "warning:" in run.err and "holds mp_rank_* folders, too" in run.err
    assert different(hf_tensors(hf_model("llama3")), hf_tensors(tmp_path / "hf")) == []


def test_common_state_must_be_there(made: Path, hf_model: HFModel, tmp_path: Path) -> None:
    common = made / "iter_0000001" / "common.pt"
    torch.save({"iteration": 1}, common)
    refused(
        convert_back("--load-path", made, "--save-path", tmp_path / "hf"), "common.pt has no args", "--hf-config DIR"
    )
    folder = hf_model("llama3")
    back = megatron_to_hf(made, tmp_path / "hf", hf_config=folder)
    assert different(hf_tensors(folder), hf_tensors(back)) == []
    torch.save([1], common)
    with pytest.raises(ConversionError, match="holds a list, not a checkpoint's common state"):
        TorchDistSource(made)
    common.unlink()
    with pytest.raises(ConversionError, match=r"common\.pt is missing, and \.metadata has no common_state/shard_0_1"):
        TorchDistSource(made)


def test_common_state_among_the_objects(made: Path, hf_model: HFModel, tmp_path: Path) -> None:
    """As Megatron-LM writes it from 0.19 on (core/dist_checkpointing/serialization.py): a list of the one dict."""
    file = made / "iter_0000001" / "common.pt"
    common = torch.load(file, weights_only=False)

    def rewritten(held: Any) -> None:
        rewrite(made, lambda entries: entries.update({"common_state/shard_0_1": held}))
        file.unlink()

    rewritten([common])
    source = TorchDistSource(made)
    assert source.origin.iteration == common["iteration"] == 1
    back = megatron_to_hf(made, tmp_path / "hf")
    assert different(hf_tensors(hf_model("llama3")), hf_tensors(back)) == []
    for held, message in (
        ([common, common], r"common_state/shard_0_1 in .*distcp from byte \d+ on holds a list, not a"),
        ([3], r"holds a int, not a checkpoint's common state"),
        ([{"iteration": 1}], r"__0_0\.distcp has no args"),
    ):
        rewritten(held)
        with pytest.raises(ConversionError, match=message):
            TorchDistSource(made)


def test_sizes_that_no_ranks_can_have_do_not_matter(made: Path, tmp_path: Path, hf_model: HFModel) -> None:
    common = made / "iter_0000001" / "common.pt"
    content = torch.load(common, weights_only=False)
    content["args"].tensor_model_parallel_size = 3
    torch.save(content, common)
    source = TorchDistSource(made)
    assert source.origin.parallel is None
    assert any(
        "sizes that it was written at are not taken over: 8 attention heads" in note for note in source.origin.notes
    )
    assert different(hf_tensors(hf_model("llama3")), hf_tensors(megatron_to_hf(made, tmp_path / "hf"))) == []

"""Distributed checkpoints that we write: their files, chunks, command lines, and what is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megatron_converters.assets.capacity_bins import CapacityBins
from megatron_converters.basics.dtypes import DType, dtype_named
from megatron_converters.basics.errors import ConversionError, UsageError
from megatron_converters.comparison.manifest_check import check_output
from megatron_converters.conversion.progress import Silent
from megatron_converters.formats.huggingface.source import HFSource
from megatron_converters.formats.megatron import torch_dist_target
from megatron_converters.formats.megatron.opening import open_megatron
from megatron_converters.formats.megatron.torch_dist_target import TorchDistTarget
from megatron_converters.formats.megatron.writing import MegatronOptions
from megatron_converters.model.slots import Ref
from megatron_converters.storage import dcp, torch_zip
from tests.conversions import different, hf_to_megatron, hf_to_torch_dist, megatron_to_hf, reshard, run
from tests.helpers import TRACKER, convert, convert_back, hf_tensors, succeeded, verb
from tests.oracle import by_hand_dist

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

HFModel = Callable[..., Path]
ITERATION = "iter_0000001"


def whole(root: Path, key: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor put together by torch."""
    state = {key: torch.zeros(shape, dtype=dtype)}
    torch_dcp.load(state, storage_reader=FileSystemReader(root / ITERATION), no_dist=True)
    return state[key]


@pytest.mark.parametrize("family", ["llama3", "mixtral", "qwen2-moe"])
@pytest.mark.parametrize("sizes", [{}, {"tp": 2, "pp": 2}], ids=str)
def test_torch_reads_the_tensors_that_a_conversion_by_hand_has(
    hf_model: HFModel, tmp_path: Path, family: str, sizes: dict[str, int]
) -> None:
    folder = hf_model(family)
    ours = hf_to_torch_dist(folder, tmp_path / "ours", divisor=16, **sizes)
    theirs = by_hand_dist.convert(folder, tmp_path / "theirs", moe_layer_freq=1, make_vocab_size_divisible_by=16)
    metadata = FileSystemReader(theirs / ITERATION).read_metadata()
    found = dcp.read_index(ours / ITERATION)
    tensors = {key: entry for key, entry in metadata.state_dict_metadata.items() if hasattr(entry, "size")}
    assert found.tensors.keys() == tensors.keys()
    for key, entry in tensors.items():
        shape = tuple(found.tensors[key].shape)
        rows = slice(None) if shape == tuple(entry.size) else slice(entry.size[0])  # vocabulary padding depends on TP
        assert torch.equal(whole(ours, key, shape)[rows], whole(theirs, key, tuple(entry.size))[rows]), key


def test_files_are_those_of_ranks(hf_model: HFModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hf_model("llama3")
    root = hf_to_torch_dist(folder, tmp_path / "a", tp=2, pp=2)
    names = sorted(path.name for path in (root / ITERATION).iterdir())
    fixed = [".metadata", "common.pt", "conversion.json", "metadata.json", "pretrain_gpt_flags.txt"]
    assert names == sorted([*fixed, *(f"__{rank}_0.distcp" for rank in range(4))])
    assert (root / TRACKER).read_text() == "1"
    monkeypatch.setattr(torch_dist_target, "_FILE_BYTES", 100_000)
    smaller = hf_to_torch_dist(folder, tmp_path / "b", tp=2, pp=2)
    files = sorted((smaller / ITERATION).glob("*.distcp"))
    assert len(files) == 8 and all(path.stat().st_size < 130_000 for path in files)
    assert different(hf_tensors(folder), hf_tensors(megatron_to_hf(smaller, tmp_path / "hf"))) == []
    index = dcp.read_index(smaller / ITERATION)
    assert index.files == {str(path) for path in files}


def test_chunks_are_the_shares_of_ranks(hf_model: HFModel, tmp_path: Path) -> None:
    """4 layers, 8 experts; gate and up of 48 rows each, cut in two."""
    root = hf_to_torch_dist(hf_model("qwen3-moe"), tmp_path / "a", tp=2, pp=2, ep=2, etp=2, divisor=1)
    index = dcp.read_index(root / ITERATION)
    chunks = {(chunk.offsets, chunk.sizes) for chunk in index.tensors[_EXPERT_FC1].chunks}
    assert index.tensors[_EXPERT_FC1].shape == (4, 8, 96, 64)
    assert chunks == {
        ((layer, expert, row, 0), (1, 1, 24, 64))
        for layer in range(4)
        for expert in range(8)
        for row in (0, 24, 48, 72)
    }
    files = {chunk.offsets[:2]: Path(chunk.item.path).name for chunk in index.tensors[_EXPERT_FC1].chunks}
    assert len(set(files.values())) == 4
    vocabulary = index.tensors["embedding.word_embeddings.weight"]
    assert vocabulary.shape == (200, 64) and len(vocabulary.chunks) == 2
    assert [chunk.sizes for chunk in index.tensors["decoder.layers.mlp.router.weight"].chunks] == [(1, 8, 64)] * 4


_EXPERT_FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"


def test_common_state(hf_model: HFModel, tmp_path: Path) -> None:
    root = hf_to_torch_dist(hf_model("llama3"), tmp_path / "a", tp=2)
    content = torch.load(root / ITERATION / "common.pt", weights_only=False)
    assert content["content_metadata"] == {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    assert (content["iteration"], content["checkpoint_version"]) == (1, 3.0)
    args = content["args"]
    assert (args.ckpt_format, args.use_dist_ckpt, args.tensor_model_parallel_size) == ("torch_dist", True, 2)
    assert torch_zip.read(root / ITERATION / "common.pt").keys() == content.keys()
    said = json.loads((root / ITERATION / "metadata.json").read_text())
    assert said == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    assert "--ckpt-format torch_dist" in (root / ITERATION / "pretrain_gpt_flags.txt").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padding_repeats_the_last_row(hf_model: HFModel, tmp_path: Path, dtype: str) -> None:
    folder = hf_model("llama3", dtype=dtype)
    root = hf_to_torch_dist(folder, tmp_path / "a", tp=4, divisor=64)
    found = whole(root, "output_layer.weight", (256, 64), getattr(torch, dtype))
    weight = hf_tensors(folder)["lm_head.weight"]
    assert torch.equal(found, torch.cat([weight, weight[-1:].expand(256 - 199, -1)]))


@pytest.mark.parametrize("family", ["llama3.2-tied", "qwen3-moe-dense-layers"])
def test_between_the_formats(hf_model: HFModel, tmp_path: Path, family: str) -> None:
    folder = hf_model(family)
    ep = {"ep": 2} if "moe" in family else {}
    legacy = hf_to_megatron(folder, tmp_path / "legacy", tp=2, pp=2, **ep)
    run(open_megatron(legacy), TorchDistTarget(tmp_path / "dist", MegatronOptions(tp=4, pp=1)))
    direct = hf_to_torch_dist(folder, tmp_path / "direct", tp=4, pp=1, **ep)
    ours, theirs = (dcp.read_index(root / ITERATION) for root in (tmp_path / "dist", direct))
    assert ours.objects.keys() == theirs.objects.keys()
    assert {key: tensor.shape for key, tensor in ours.tensors.items()} == {
        key: tensor.shape for key, tensor in theirs.tensors.items()
    }
    back = reshard(tmp_path / "dist", tmp_path / "back", tp=2, pp=2, **ep)
    for file in sorted(legacy.glob(f"{ITERATION}/*/*.pt")):
        one, other = (torch_zip.read(root / file.relative_to(legacy))["model"] for root in (legacy, back))
        assert list(one) == list(other)
    assert different(hf_tensors(folder), hf_tensors(megatron_to_hf(back, tmp_path / "hf"))) == []


def test_command_lines(hf_model: HFModel, tmp_path: Path) -> None:
    folder, dist = hf_model("llama2", dtype="bfloat16"), tmp_path / "dist"
    options = ("--target-tensor-parallel-size", 2, "--ckpt-format", "torch_dist")
    run = succeeded(convert("--load-dir", folder, "--save-dir", dist, *options))
    assert "wrote 9 tensors in 53 chunks and 2 files" in run.out and "cut for tp=2, pp=1, to " in run.out
    assert "--ckpt-format exists from Megatron-LM 0.9 on" in run.out
    succeeded(convert_back("--load-path", dist, "--save-path", tmp_path / "hf"))
    assert different(hf_tensors(folder), hf_tensors(tmp_path / "hf")) == []
    succeeded(verb("verify", folder, dist))
    succeeded(verb("verify", dist))
    planned = succeeded(verb("plan", folder, tmp_path / "new", "--ckpt-format", "torch_dist", "--no-measure"))
    assert "__0_0.distcp" in planned.out
    single = succeeded(verb("convert", dist, tmp_path / "single", "--tp", 1, "--ckpt-format", "torch_dist"))
    assert "cut for tp=1, pp=1" in single.out


def test_a_checked_output_names_what_is_damaged(hf_model: HFModel, tmp_path: Path) -> None:
    root = hf_to_torch_dist(hf_model("llama3"), tmp_path / "a")
    checked = check_output(root / ITERATION, Silent())
    assert checked.faults == [] and checked.tensors > 20
    chunk = dcp.read_index(root / ITERATION).tensors["decoder.layers.mlp.linear_fc2.weight"].chunks[2]
    offset = dcp.stored(chunk, dtype_named("float32")).offset
    path = Path(chunk.item.path)
    data = bytearray(path.read_bytes())
    data[offset + 5] ^= 1
    path.write_bytes(data)
    (fault,) = check_output(root / ITERATION, Silent()).faults
    assert fault.tensor == "decoder.layers.mlp.linear_fc2.weight [2,0,0]" and fault.holds == ("layer 2 fc2",)


def test_virtual_stages_and_uneven_ones_do_not_matter(hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_model("llama3")
    options = ("--target-pipeline-parallel-size", 2, "--pipeline-model-parallel-layout", "Et|t|t|tL")
    succeeded(convert("--load-dir", folder, "--save-dir", tmp_path / "a", *options, "--ckpt-format", "torch_dist"))
    found = dcp.read_index(tmp_path / "a" / ITERATION).tensors["decoder.layers.mlp.linear_fc2.weight"]
    files = {chunk.offsets[0]: Path(chunk.item.path).name for chunk in found.chunks}
    assert files == {0: "__0_0.distcp", 1: "__1_0.distcp", 2: "__0_0.distcp", 3: "__1_0.distcp"}
    assert different(hf_tensors(folder), hf_tensors(megatron_to_hf(tmp_path / "a", tmp_path / "hf"))) == []


@pytest.mark.parametrize("options", [{"expert_layout": "dynamic"}, {"load_capacity_bins": True}], ids=str)
def test_what_is_habana_s_has_no_place(hf_model: HFModel, tmp_path: Path, options: dict[str, Any]) -> None:
    source = HFSource(hf_model("mixtral"))
    source.origin.capacity_bins = CapacityBins("a file", 4, 1, 1, 1, {})
    with pytest.raises(UsageError, match="use --ckpt-format torch"):
        run(source, TorchDistTarget(tmp_path / "a", MegatronOptions(**options)))


def test_layers_of_different_dtypes_cannot_be_one_tensor(hf_model: HFModel, tmp_path: Path) -> None:
    source = HFSource(hf_model("llama3"))

    def dtype_of(ref: Ref) -> DType:
        return dtype_named("bfloat16" if str(ref) == "layer 2 input_norm" else "float32")

    with pytest.raises(
        ConversionError, match=r"layer 2 input_norm is bfloat16, but others in decoder\.layers\..* are float32"
    ):
        TorchDistTarget(tmp_path / "a", MegatronOptions()).prepare(source.spec, source.origin, dtype_of)


def test_torch_s_own_tool_turns_it_into_one_file(hf_model: HFModel, tmp_path: Path) -> None:
    root = hf_to_torch_dist(hf_model("llama2"), tmp_path / "a", tp=2)
    dcp_to_torch_save(root / ITERATION, tmp_path / "one.pt")
    content = torch.load(tmp_path / "one.pt", weights_only=False)
    assert content["decoder.layers.mlp.linear_fc2.weight"].shape == (4, 64, 112)


def test_preparing_touches_nothing(hf_model: HFModel, tmp_path: Path) -> None:
    target = TorchDistTarget(tmp_path, MegatronOptions(tp=2))
    source = HFSource(hf_model("llama3"))
    outline = target.prepare(source.spec, source.origin, source.dtype_of)
    assert not list(tmp_path.iterdir())
    (index,) = (pickle.loads(data) for _, data in outline.files[".metadata"].finish({}))
    assert index.storage_data

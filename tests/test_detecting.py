"""Detection: parallel sizes, layers, shapes, type, size and variant, from any folder of a checkpoint."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_converters as mc
from megatron_converters.formats.megatron.detecting import detect
from tests.bare import RANK_FILE, edit, tree
from tests.conversions import hf_to_megatron, hf_to_torch_dist
from tests.oracle.hf import make_model

HFModel = Callable[..., Path]
EMBEDDINGS, FINAL_NORM = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"


def write(folder: Path, ranks: Mapping[str, Mapping[str, tuple[int, ...]]], args: Any = None) -> Path:
    """Write rank files with tensors of these shapes."""
    for name, shapes in ranks.items():
        path = folder / name / RANK_FILE
        path.parent.mkdir(parents=True)
        model = {key: torch.zeros(shape) for key, shape in shapes.items()}
        torch.save({"model": model, **({} if args is None else {"args": args})}, path)
    return folder


def stage(layers: int, *, first: bool = True, last: bool = True, hidden: int = 8) -> dict[str, tuple[int, ...]]:
    """Shapes of a dense stage, whose layers are numbered from 0."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDINGS: (16, hidden)} if first else {}
    for layer in range(layers):
        shapes[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"] = (16, hidden)
        shapes[f"decoder.layers.{layer}.self_attention.linear_proj.weight"] = (hidden, 8)
        shapes[f"decoder.layers.{layer}.mlp.linear_fc1.weight"] = (24, hidden)
        shapes[f"decoder.layers.{layer}.mlp.linear_fc2.weight"] = (hidden, 12)
    return {**shapes, **({FINAL_NORM: (hidden,)} if last else {})}


WHOLE, FIRST, LAST = stage(4), stage(2, last=False), stage(2, first=False)


@pytest.mark.parametrize(
    ("ranks", "sizes"),
    [
        ({"mp_rank_00": WHOLE}, (1, 1)),
        ({"mp_rank_00": WHOLE, "mp_rank_01": WHOLE}, (2, 1)),
        ({f"mp_rank_0{tp}": WHOLE for tp in range(4)}, (4, 1)),
        ({"mp_rank_00_000": FIRST, "mp_rank_00_001": LAST}, (1, 2)),
        ({f"mp_rank_0{tp}_00{pp}": (FIRST, LAST)[pp] for tp in range(2) for pp in range(2)}, (2, 2)),
    ],
    ids=["one rank", "two", "four", "stages", "both"],
)
def test_sizes_by_folder_names(ranks: dict[str, Any], sizes: tuple[int, int], tmp_path: Path) -> None:
    """Every name has an underscore: two numbers alone mean stages, and a folder counts for one tensor-parallel rank only once."""
    found = mc.SmartConverter().detect_parallel_config(write(tmp_path, ranks))
    assert found == {"tp_size": sizes[0], "pp_size": sizes[1]}
    assert detect(tmp_path).num_layers == 4


def test_layers_are_counted_and_not_keys(tmp_path: Path) -> None:
    ranks = {"mp_rank_00_000": stage(3, last=False), "mp_rank_00_001": stage(2, first=False)}
    found = detect(write(tmp_path, ranks))
    assert (found.num_layers, found.layers_of_stages) == (5, (3, 2))


def test_shapes_tell_sizes(tmp_path: Path) -> None:
    """linear_qkv has (q + 2 kv) d rows, of which the output projection's columns are q d."""
    found = detect(write(tmp_path, {"mp_rank_00": WHOLE, "mp_rank_01": WHOLE}))
    assert (found.hidden_size, found.ffn_hidden_size, found.vocab_rows) == (8, 24, 32)
    assert (found.query_rows, found.kv_rows, found.head_dim) == (16, 8, None)
    assert (found.is_gated, found.is_moe, found.is_latent) == (True, False, False)


@pytest.mark.parametrize("args", [True, False], ids=["args", "bare"])
@pytest.mark.parametrize(("tp", "pp", "ep"), [(1, 2, 1), (1, 1, 2), (2, 1, 2), (2, 2, 2), (2, 2, 1)])
def test_a_name_of_two_numbers(args: bool, tp: int, pp: int, ep: int, hf_model: HFModel, tmp_path: Path) -> None:
    """mp_rank_00_001 is a stage or an expert-parallel rank: args say it, and without them embeddings on every rank."""
    source = tree(hf_model("mixtral"), tmp_path / "tree", args=args, tp=tp, pp=pp, ep=ep)
    found = detect(source)
    assert found.sizes == (tp, pp, ep)
    assert (found.num_layers, found.is_moe, found.decided_by == "args") == (4, True, args)
    expected = {"tp_size": tp, "pp_size": pp} | ({"ep_size": ep} if ep > 1 else {})
    assert mc.SmartConverter().detect_parallel_config(source) == expected


def test_expert_parallel_ranks_need_not_be_a_grid(hf_model: HFModel, tmp_path: Path) -> None:
    source = tree(hf_model("mixtral"), tmp_path / "tree", tp=2, ep=2, etp=1)
    assert sorted(path.name for path in source.iterdir()) == ["mp_rank_00_000", "mp_rank_01_001"]
    assert (detect(source).sizes, detect(source).vocab_rows) == ((2, 1, 2), 224)


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "args"])
def test_args_and_folders_must_agree(bare: bool, tmp_path: Path) -> None:
    args = None if bare else Namespace(tensor_model_parallel_size=4, pipeline_model_parallel_size=1)
    ranks = dict.fromkeys(("mp_rank_00", "mp_rank_01", "mp_rank_03"), WHOLE)
    with pytest.raises(mc.ConversionError, match=r"do not match tp=4, pp=1, as .* say:\n  - mp_rank_02 is missing"):
        detect(write(tmp_path, ranks, args))


def test_damaged_args_take_no_memory(tmp_path: Path) -> None:
    args = Namespace(tensor_model_parallel_size=10**9, pipeline_model_parallel_size=10**9)
    with pytest.raises(mc.ConversionError, match="are more ranks than any run has"):
        detect(write(tmp_path, {"mp_rank_00": WHOLE}, args))


@pytest.mark.parametrize("write_as", [hf_to_megatron, hf_to_torch_dist])
def test_roots_and_iterations(write_as: Callable[..., Path], hf_model: HFModel, tmp_path: Path) -> None:
    root = write_as(hf_model("llama2"), tmp_path / "root", tp=2, pp=2)
    for folder in (root, root / "iter_0000001"):
        found = detect(folder)
        assert (found.sizes, found.num_layers, found.hidden_size) == ((2, 2, 1), 4, 64)
        assert found.decided_by == "args"
        assert mc.SmartConverter().detect_model_type_and_size(folder)[0] == "llama"
    mc.smart_convert_megatron_to_hf(root, tmp_path / "w.pt", num_kv_heads=4, num_query_heads=8)
    assert mc.verify(tmp_path / "w.pt", root, read=mc.ReadOptions(hf_config=hf_model("llama2")))


def test_virtual_stages(hf_model: HFModel, tmp_path: Path) -> None:
    """Each rank has two models, whose layers count from 0 each."""
    split = mc.PipelineSplit(virtual=2)
    root = hf_to_megatron(hf_model("llama2"), tmp_path / "root", pp=2, split=split)
    edit(root / "iter_0000001", lambda content: {name: content[name] for name in ("model0", "model1")})
    found = detect(root)
    assert (found.sizes, found.layers_of_stages) == ((1, 2, 1), (1, 1, 1, 1))
    result = mc.smart_convert_megatron_to_hf(root, tmp_path / "w.pt", num_query_heads=8, true_vocab_size=199)
    assert mc.verify(result.path, hf_model("llama2"), read=mc.ReadOptions(hf_config=hf_model("llama2")))
    (tensors,) = mc.TensorParallelConverter().load_distributed_checkpoints(root, 1, 2)
    single = tree(hf_model("llama2"), tmp_path / "single", impl="transformer_engine") / "mp_rank_00" / RANK_FILE
    expected = torch.load(single)["model"]
    for key in tensors.keys() - {EMBEDDINGS, "output_layer.weight"}:
        assert torch.equal(tensors[key], expected[key]), key


@pytest.mark.parametrize("wrapped", [False, True], ids=["flat", "as a rank's file"])
def test_a_whole_model_in_one_file(wrapped: bool, hf_model: HFModel, tmp_path: Path) -> None:
    """model.pt without metadata.json: numbers and shapes describe it."""
    state = torch.load(tree(hf_model("llama2"), tmp_path / "tree") / "mp_rank_00" / RANK_FILE)["model"]
    (tmp_path / "flat").mkdir()
    torch.save({"model": state} if wrapped else state, tmp_path / "flat" / "model.pt")
    found = detect(tmp_path / "flat")
    assert (found.sizes, found.num_layers, found.vocab_rows, found.is_flat) == ((1, 1, 1), 4, 208, True)
    mc.smart_convert_megatron_to_hf(
        tmp_path / "flat", tmp_path / "w.pt", num_query_heads=8, num_kv_heads=4, true_vocab_size=199
    )
    assert mc.verify(tmp_path / "w.pt", hf_model("llama2"), read=mc.ReadOptions(hf_config=hf_model("llama2")))


def test_a_whole_model_with_metadata(hf_model: HFModel, tmp_path: Path) -> None:
    options = mc.MegatronOptions(ckpt_format="model_pt", impl="local")
    mc.convert(hf_model("llama2"), tmp_path / "flat", to="megatron", megatron=options)
    mc.smart_convert_megatron_to_hf(tmp_path / "flat", tmp_path / "hf", format="directory", num_kv_heads=4)
    assert mc.verify(tmp_path / "hf", hf_model("llama2"))
    with pytest.raises(AssertionError, match=r"--num_kv_heads 2 contradicts .*, which has 4"):
        mc.smart_convert_megatron_to_hf(tmp_path / "flat", tmp_path / "other", num_kv_heads=2)


def test_multi_latent_attention(hf_model: HFModel, tmp_path: Path) -> None:
    model = make_model("minicpm3", tmp_path / "hf")
    root = hf_to_megatron(model, tmp_path / "root", tp=2, pp=2)
    edit(root / "iter_0000001", lambda content: {"model": content["model"]})
    found = detect(root)
    assert (found.is_latent, found.is_moe, found.query_rows) == (True, False, None)
    config = json.loads((model / "config.json").read_text())
    assert mc.SmartConverter().detect_model_type_and_size(root) == ("minicpm", "unknown")
    result = mc.smart_convert_megatron_to_hf(
        root,
        tmp_path / "w.pt",
        num_query_heads=config["num_attention_heads"],
        true_vocab_size=config["vocab_size"],
    )
    assert not result.warnings


def test_norms_of_queries_tell_the_size_of_a_head(hf_model: HFModel, tmp_path: Path) -> None:
    source = tree(hf_model("qwen3"), tmp_path / "tree", tp=2)
    assert (detect(source).head_dim, detect(source).query_rows) == (16, 128)


# -- type, size and variant


def released(folder: Path, layers: int, hidden: int, queries: int, kv: int) -> Path:
    """Write a checkpoint with the shapes of attention of a released model, without its data."""
    shapes = {EMBEDDINGS: (2, hidden), FINAL_NORM: (hidden,)}
    for layer in range(layers):
        shapes[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"] = (queries + 2 * kv, hidden)
        shapes[f"decoder.layers.{layer}.self_attention.linear_proj.weight"] = (hidden, queries)
    path = folder / "mp_rank_00" / RANK_FILE
    path.parent.mkdir(parents=True)
    one = torch.zeros(1, dtype=torch.bfloat16)
    torch.save({"model": {key: one.expand(shape) for key, shape in shapes.items()}}, path)
    return folder


@pytest.mark.parametrize(
    ("shapes", "expected", "variant"),
    [
        ((24, 1024, 1024, 128), ("minicpm", "0.5b"), "minicpm4"),
        ((32, 4096, 4096, 256), ("minicpm", "8b"), "minicpm4"),
        ((40, 2304, 2304, 2304), ("minicpm", "2b"), "minicpm"),
        ((32, 4096, 4096, 4096), ("llama", "7b"), "minicpm"),
        ((60, 6656, 6656, 6656), ("llama", "30b"), "minicpm"),
        ((24, 512, 512, 128), ("minicpm", "3b"), "minicpm"),
        ((80, 512, 512, 128), ("llama", "65b"), "minicpm"),
        ((7, 512, 512, 128), ("minicpm", "unknown"), "minicpm"),
    ],
    ids=str,
)
def test_released_models(
    shapes: tuple[int, int, int, int], expected: tuple[str, str], variant: str, tmp_path: Path
) -> None:
    smart, folder = mc.SmartConverter(), released(tmp_path, *shapes)
    assert smart.detect_model_type_and_size(folder) == expected
    assert smart.detect_model_variant(folder) == variant


def test_types_of_folders(hf_model: HFModel, tmp_path: Path) -> None:
    smart = mc.SmartConverter()
    assert smart.detect_model_type_and_size(hf_model("llama2")) == ("llama", "unknown")
    config = json.loads((hf_model("llama2") / "config.json").read_text())
    config |= {"architectures": ["MiniCPMForCausalLM"], "scale_emb": 12, "num_hidden_layers": 32}
    del config["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert smart.detect_model_type_and_size(tmp_path) == ("minicpm", "8b")
    assert smart.detect_model_variant(tmp_path) == "minicpm"
    with pytest.raises(mc.ConversionError, match="OtherForCausalLM, which is not supported"):
        smart.detect_model_type_and_size(unsupported(tmp_path / "other"))


def unsupported(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["OtherForCausalLM"]}')
    return folder


def test_mixtures_are_the_documents_minicpm4(hf_model: HFModel, tmp_path: Path) -> None:
    assert mc.SmartConverter().detect_model_variant(tree(hf_model("mixtral"), tmp_path / "tree", ep=2)) == "minicpm4"
    blocks = {**WHOLE, "decoder.layers.1.mlp.moe_w_in.weight": (4, 2, 8)}
    blockffn = write(tmp_path / "blockffn", {"mp_rank_00": blocks})
    assert mc.SmartConverter().detect_model_variant(blockffn) == "minicpm4"
    assert mc.SmartConverter().detect_model_variant(write(tmp_path / "dense", {"mp_rank_00": WHOLE})) == "minicpm"


def test_vocabularies_and_scales_tell_the_type(tmp_path: Path) -> None:
    for number, (rows, args, expected) in enumerate(
        [
            (73472, None, "minicpm"),
            (32000, None, "llama"),
            (32000, Namespace(scale_emb=12.0), "minicpm"),
        ]
    ):
        folder = write(tmp_path / str(number), {"mp_rank_00": {**WHOLE, EMBEDDINGS: (rows, 8)}}, args)
        assert mc.SmartConverter().detect_model_type_and_size(folder)[0] == expected

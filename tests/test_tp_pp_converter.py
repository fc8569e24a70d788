"""Converters by numbers: checkpoints with and without args come out as the model that they were written from, or not at all."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_converters as mc
from megatron_converters.tensor_parallel.presets import PRESETS
from tests.bare import RANK_FILE, edit, left_in, tree
from tests.helpers import hf_tensors, refused, same_tensors, succeeded
from tests.helpers import tp_pp_converter as run
from tests.oracle.hf import make_model

HFModel = Callable[..., Path]
#: tp and pp. The model has 8 query heads and 4 KV heads, fewer than 8 ranks.
SIZES = [(1, 1), (2, 1), (1, 2), (2, 2), (8, 1)]
NUMBERS = dict(num_layer=4, num_kv_heads=4, num_query_heads=8)
VOCABULARY = 199


@pytest.fixture(scope="module")
def trees(hf_model: HFModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Function that writes a tree once for the same arguments."""
    known: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("trees")

    def made(family: str, tp: int, pp: int, **options: Any) -> Path:
        name = f"{family}-{tp}-{pp}-{options}"
        if name not in known:
            known[name] = tree(hf_model(family), root / str(len(known)), tp=tp, pp=pp, **options)
        return known[name]

    return made


def written(path: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return tensors


# -- what comes out


@pytest.mark.parametrize("args", [False, True], ids=["bare", "args"])
@pytest.mark.parametrize(("tp", "pp"), SIZES)
def test_the_weights_are_the_source_models(
    tp: int, pp: int, args: bool, hf_model: HFModel, trees: Callable[..., Path], tmp_path: Path
) -> None:
    source = trees("llama2", tp, pp, args=args, impl="transformer_engine" if tp == 2 else "local")
    options = dict(tp_size=tp, pp_size=pp, in_dir=source, **NUMBERS, true_vocab_size=VOCABULARY)
    expected = hf_tensors(hf_model("llama2"))
    converter = mc.TensorParallelConverter()
    for name in ("llama", "minicpm"):
        convert = getattr(converter, f"convert_{name}_megatron_to_hf_tp_pp")
        result = convert(**options, save_path=tmp_path / f"{name}.pt")
        same_tensors(written(tmp_path / f"{name}.pt"), expected)
        assert mc.verify(result.path)
    if (tp, pp) == (2, 2):
        for name in ("llama", "minicpm"):
            twin = getattr(converter, f"convert_{name}_megatron_to_hf_tp_pp_memory_efficient")
            twin(**options, save_path=tmp_path / f"{name}-twin.pt", batch_size=2)
            same_tensors(written(tmp_path / f"{name}-twin.pt"), expected)


@pytest.mark.parametrize("pp", [1, 2])
def test_a_tied_model_has_no_head(pp: int, hf_model: HFModel, trees: Callable[..., Path], tmp_path: Path) -> None:
    """On two stages the last holds a copy of the embeddings, which bytes alone tell from a head of its own."""
    source = trees("llama3.2-tied", 2, pp)
    mc.smart_convert_megatron_to_hf(source, tmp_path / "w.pt", num_query_heads=8, true_vocab_size=199, tp_size=2)
    same_tensors(written(tmp_path / "w.pt"), hf_tensors(hf_model("llama3.2-tied")))


@pytest.mark.parametrize("family", ["llama-bias", "llama-head_dim"])
def test_biases_and_heads_of_other_sizes(
    family: str, hf_model: HFModel, trees: Callable[..., Path], tmp_path: Path
) -> None:
    mc.smart_convert_megatron_to_hf(
        trees(family, 2, 1), tmp_path / "w.pt", num_kv_heads=4, tp_size=2, true_vocab_size=VOCABULARY
    )
    same_tensors(written(tmp_path / "w.pt"), hf_tensors(hf_model(family)))


@pytest.mark.parametrize("ep", [1, 2])
def test_experts_without_args_are_minicpms(
    ep: int, hf_model: HFModel, trees: Callable[..., Path], tmp_path: Path
) -> None:
    """Mixtral's tensors are those of MiniCPM-MoE under other names."""
    mc.smart_convert_megatron_to_hf(
        trees("mixtral", 2, 1, ep=ep),
        tmp_path / "w.pt",
        model_type="minicpm",
        num_query_heads=8,
        true_vocab_size=VOCABULARY,
    )
    expected = {name.replace("block_sparse_moe", "mlp"): held for name, held in hf_tensors(hf_model("mixtral")).items()}
    same_tensors(written(tmp_path / "w.pt"), expected)


def test_stages_of_different_lengths(hf_model: HFModel, trees: Callable[..., Path], tmp_path: Path) -> None:
    """Three layers before one: the tensors say where the cut is."""
    bare = tmp_path / "uneven"
    shutil.copytree(trees("llama2", 1, 2), bare)
    first, last = (torch.load(bare / f"mp_rank_00_00{pp}" / RANK_FILE)["model"] for pp in range(2))
    moved = [key for key in last if key.startswith("decoder.layers.0.")]
    first |= {key.replace("layers.0.", "layers.2."): last.pop(key) for key in moved}
    last |= {key.replace("layers.1.", "layers.0."): last.pop(key) for key in [*last] if "layers.1." in key}
    for pp, state in enumerate((first, last)):
        torch.save({"model": state}, bare / f"mp_rank_00_00{pp}" / RANK_FILE)
    mc.smart_convert_megatron_to_hf(bare, tmp_path / "w.pt", num_query_heads=8, true_vocab_size=VOCABULARY)
    same_tensors(written(tmp_path / "w.pt"), hf_tensors(hf_model("llama2")))


def test_args_without_some_sizes(hf_model: HFModel, trees: Callable[..., Path], tmp_path: Path) -> None:
    """Heads are the args', sizes the tensors'."""
    partial = tmp_path / "partial"
    shutil.copytree(trees("llama2", 2, 1, args=True), partial)

    def forget(content: dict[str, Any]) -> dict[str, Any]:
        for name in ("ffn_hidden_size", "hidden_size", "num_query_groups", "group_query_attention"):
            delattr(content["args"], name)
        return content

    edit(partial, forget)
    mc.smart_convert_megatron_to_hf(partial, tmp_path / "w.pt")
    same_tensors(written(tmp_path / "w.pt"), hf_tensors(hf_model("llama2")))
    with pytest.raises(AssertionError, match=r"--num_query_heads 16 contradicts the args of .*, which have 8"):
        mc.smart_convert_megatron_to_hf(partial, tmp_path / "x.pt", num_query_heads=16)


def test_all_rows_are_kept_where_nothing_says_the_vocabulary(trees: Callable[..., Path], tmp_path: Path) -> None:
    result = mc.smart_convert_megatron_to_hf(trees("llama2", 1, 1), tmp_path / "w.pt", num_query_heads=8)
    assert written(tmp_path / "w.pt")["lm_head.weight"].shape == (208, 64)
    assert any("all 208 rows are kept, padding included" in note for note in result.notes)


# -- numbers


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((4, 2, 1, 3, 8), "query heads must be divisible by KV heads: --num_query_heads 8, --num_kv_heads 3"),
        ((5, 1, 2, 4, 8), "the number of layers must be divisible by the PP size: --num_layer 5, --pp_size 2"),
        ((4, 3, 1, 1, 8), "query heads must be divisible by the TP size: --num_query_heads 8, --tp_size 3"),
        ((4, 6, 1, 4, 12), "KV heads must be divisible by the TP size, or it by them: --num_kv_heads 4, --tp_size 6"),
        ((4, 0, 1, 4, 8), "--tp_size 0 must be a whole number from 1 on"),
    ],
)
def test_the_rules_of_parallel_configurations(numbers: tuple[int, ...], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        mc.TensorParallelConverter().validate_parallel_config(*numbers)


@pytest.mark.parametrize("numbers", [(32, 2, 1, 8, 32), (4, 8, 2, 2, 8), (80, 8, 4, 8, 64)])
def test_valid_configurations(numbers: tuple[int, ...]) -> None:
    mc.TensorParallelConverter().validate_parallel_config(*numbers)


@pytest.mark.parametrize("args", [False, True], ids=["bare", "args"])
@pytest.mark.parametrize(
    ("given", "held"),
    [
        (dict(num_kv_heads=2), "4"),
        (dict(num_layer=8), "4"),
        (dict(tp_size=4), "2"),
        (dict(pp_size=1), "2"),
    ],
    ids=str,
)
def test_a_number_that_contradicts_the_checkpoint(
    given: dict[str, int], held: str, args: bool, trees: Callable[..., Path], tmp_path: Path
) -> None:
    source = trees("llama2", 2, 2, args=args)
    ((name, value),) = given.items()
    options = [part for key, each in {"num_query_heads": 8, **given}.items() for part in (f"--{key}", each)]
    out = refused(
        run("--in_dir", source, "--save_path", tmp_path / "o" / "w.pt", *options), f"--{name} {value}", code=2
    )
    assert held in out.err
    assert len(out.err.splitlines()) == 1
    assert left_in(tmp_path) == []
    with pytest.raises(AssertionError):
        mc.smart_convert_megatron_to_hf(source, tmp_path / "w.pt", **{"num_query_heads": 8, **given})


def test_a_reference_that_contradicts_a_number(hf_model: HFModel, trees: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"--num_kv_heads 2 contradicts .*, which has 4"):
        mc.smart_convert_megatron_to_hf(
            trees("llama2", 2, 1), tmp_path / "w.pt", num_kv_heads=2, hf_config=hf_model("llama2")
        )
    assert left_in(tmp_path) == []


def test_a_number_that_nothing_says_is_asked_for(trees: Callable[..., Path], tmp_path: Path) -> None:
    source = trees("llama2", 2, 1)
    for options in ((), ("--model_type", "minicpm"), ("--num_layer", 4, "--tp_size", 2)):
        out = run("--in_dir", source, "--save_path", tmp_path / "w.pt", *options)
        refused(out, "say the number of query heads; give --num_query_heads", code=2)
    assert left_in(tmp_path) == []


def test_a_preset_that_does_not_fit_is_passed_over(trees: Callable[..., Path], tmp_path: Path) -> None:
    """Llama 30B has 52 query heads, which 64 rows cannot be."""
    source = trees("llama2", 2, 1)
    out = run("--in_dir", source, "--save_path", tmp_path / "w.pt", "--model_type", "llama", "--model_size", "30B")
    refused(out, "the preset 30b means 52, which the shapes cannot have", "--num_query_heads", code=2)


# -- presets


@pytest.fixture(scope="module")
def few_groups(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Llama with 32 query heads and 2 KV heads, and its tree: what MiniCPM4-8B has, and no preset says."""
    root = tmp_path_factory.mktemp("few")
    model = make_model("llama2", root / "hf", num_attention_heads=32, num_key_value_heads=2, num_hidden_layers=2)
    return model, tree(model, root / "tree", tp=4)


@pytest.mark.parametrize(
    "convert", [mc.convert_minicpm_8b, mc.convert_minicpm_3b, mc.convert_minicpm4_8b, mc.convert_llama_7b]
)
def test_presets_yield_to_shapes(
    convert: Callable[..., mc.Result], few_groups: tuple[Path, Path], tmp_path: Path
) -> None:
    model, source = few_groups
    result = convert(source, tmp_path / "w.pt", true_vocab_size=VOCABULARY)
    same_tensors(written(tmp_path / "w.pt"), hf_tensors(model))
    (warning,) = result.warnings
    assert warning.startswith("neither args nor shapes say the number of query heads; 32 is taken from the preset")
    assert any(warning in note for note in json.loads(result.manifest.read_text())["notes"])


def test_every_size_of_the_tables_is_taken(trees: Callable[..., Path], tmp_path: Path) -> None:
    source = trees("llama2", 1, 1)
    common = ("--in_dir", source, "--num_query_heads", 8, "--overwrite", "--save_path", tmp_path / "w.pt")
    for model_type, sizes in PRESETS.items():
        for size in sizes:
            succeeded(run("--model_type", model_type, "--model_size", size.upper(), *common))
    out = run("--model_type", "llama", "--model_size", "8b", *common)
    refused(out, "--model_size 8b is no known size (llama: 7b, 13b, 30b, 65b)", code=2)


def test_a_size_that_layers_tell_is_used(tmp_path: Path) -> None:
    """A bare checkpoint of 12 layers is taken for MiniCPM 0.5B, as the table has it."""
    model = make_model("llama2", tmp_path / "hf", num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=12)
    source = tree(model, tmp_path / "tree", tp=2, pp=2)
    assert mc.SmartConverter().detect_model_type_and_size(source) == ("minicpm", "0.5b")
    result = mc.SmartConverter().convert_megatron_to_hf(source, tmp_path / "w.pt", true_vocab_size=VOCABULARY)
    same_tensors(written(tmp_path / "w.pt"), hf_tensors(model))
    assert "the preset minicpm 0.5b, which has as many layers" in result.warnings[0]


# -- folders


def test_a_folder_needs_a_configuration(hf_model: HFModel, trees: Callable[..., Path], tmp_path: Path) -> None:
    source, out = trees("llama2", 2, 2), tmp_path / "hf"
    common = ("--in_dir", source, "--save_path", out, "--format", "directory")
    refused(run(*common, "--num_query_heads", 8), "has no args that describe the model", "--hf_config DIR", code=2)
    assert left_in(tmp_path) == []
    succeeded(run(*common, "--hf_config", hf_model("llama2")))
    assert mc.verify(out, hf_model("llama2"))
    same_tensors(hf_tensors(out), hf_tensors(hf_model("llama2")))


def test_args_are_a_configuration(hf_model: HFModel, trees: Callable[..., Path], tmp_path: Path) -> None:
    source = trees("llama2", 2, 2, args=True)
    mc.smart_convert_megatron_to_hf(source, tmp_path / "hf", format="directory")
    assert mc.verify(tmp_path / "hf", hf_model("llama2"))
    with pytest.raises(mc.UsageError, match="no args that say MiniCPM's scales"):
        mc.smart_convert_megatron_to_hf(source, tmp_path / "b", format="directory", model_type="minicpm")


def test_minicpms_weights_are_taken_as_unscaled(
    hf_model: HFModel, trees: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = tmp_path / "reference"
    reference.mkdir()
    config = json.loads((hf_model("llama2") / "config.json").read_text())
    config |= {"architectures": ["MiniCPMForCausalLM"], "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}
    del config["model_type"]
    (reference / "config.json").write_text(json.dumps(config))
    for args in (False, True):
        with caplog.at_level(logging.DEBUG):
            result = mc.smart_convert_megatron_to_hf(
                trees("llama2", 2, 2, args=args), tmp_path / f"hf{args}", format="directory", hf_config=reference
            )
        same_tensors(hf_tensors(tmp_path / f"hf{args}"), hf_tensors(hf_model("llama2")))
        assert json.loads((tmp_path / f"hf{args}/config.json").read_text())["scale_emb"] == 12
        assert any("its weights are taken as unscaled" in warning for warning in result.warnings)
        assert "its weights are taken as unscaled" in caplog.text


# -- the way back


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_a_folder_becomes_a_tree(impl: str, hf_model: HFModel, tmp_path: Path) -> None:
    result = mc.smart_convert_hf_to_megatron(
        hf_model("llama2"), tmp_path / "meg", tp_size=2, pp_size=2, transformer_impl=impl, num_layer=4
    )
    assert (tmp_path / "meg" / "latest_checkpointed_iteration.txt").read_text() == "1"
    expected = tree(hf_model("llama2"), tmp_path / "by-hand", tp=2, pp=2, impl=impl)
    folders = sorted(path.name for path in expected.iterdir())
    assert folders == sorted(path.name for path in result.path.glob("mp_rank_*"))
    for folder in folders:
        ours, theirs = (
            torch.load(path / folder / RANK_FILE, weights_only=False)["model"] for path in (result.path, expected)
        )
        padded = ("embedding.word_embeddings.weight", "output_layer.weight")  # to another number of rows
        for key in theirs.keys() - padded:
            assert theirs[key] is None or torch.equal(ours[key], theirs[key]), key
    assert mc.verify(hf_model("llama2"), result.path)


def test_a_file_of_weights_becomes_a_tree(hf_model: HFModel, trees: Callable[..., Path], tmp_path: Path) -> None:
    source = trees("llama2", 2, 2)
    weights = mc.smart_convert_megatron_to_hf(source, tmp_path / "w.pt", num_query_heads=8, true_vocab_size=199).path
    mc.smart_convert_hf_to_megatron(weights, tmp_path / "meg", tp_size=4, hf_config=hf_model("llama2"))
    assert mc.verify(tmp_path / "meg", hf_model("llama2"))


def test_numbers_are_checked_on_the_way_back(hf_model: HFModel, tmp_path: Path) -> None:
    model = hf_model("llama2")
    with pytest.raises(AssertionError, match=r"--num_kv_heads 8 contradicts .*, which has 4"):
        mc.smart_convert_hf_to_megatron(model, tmp_path / "meg", num_kv_heads=8)
    with pytest.raises(AssertionError, match="layers must be divisible by the PP size: --num_layer 4, --pp_size 3"):
        mc.smart_convert_hf_to_megatron(model, tmp_path / "meg", pp_size=3)
    assert left_in(tmp_path) == []


def test_a_preset_says_the_sizes_to_write(hf_model: HFModel, tmp_path: Path) -> None:
    mc.SmartConverter().convert_hf_to_megatron(hf_model("llama2"), tmp_path / "meg", "minicpm", "8b")
    assert mc.SmartConverter().detect_parallel_config(tmp_path / "meg") == {"tp_size": 2, "pp_size": 1}


# -- bad input


def test_a_missing_path(hf_model: HFModel, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    refused(run("--in_dir", nowhere, "--save_path", tmp_path / "w.pt"), nowhere, code=2)
    smart = mc.SmartConverter()
    for call in (
        lambda: mc.smart_convert_megatron_to_hf(nowhere, tmp_path / "w.pt"),
        lambda: mc.smart_convert_hf_to_megatron(nowhere, tmp_path / "meg"),
        lambda: smart.detect_parallel_config(nowhere),
        lambda: smart.detect_model_type_and_size(nowhere),
        lambda: smart.detect_model_variant(nowhere),
        lambda: mc.TensorParallelConverter().load_distributed_checkpoints(nowhere, 1, 1),
    ):
        with pytest.raises(FileNotFoundError, match=str(nowhere)):
            call()
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("args", [False, True], ids=["bare", "args"])
@pytest.mark.parametrize("rank", ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"])
def test_a_missing_rank(rank: str, args: bool, trees: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "tree"
    shutil.copytree(trees("llama2", 2, 2, args=args), source)
    shutil.rmtree(source / rank)
    out = run("--in_dir", source, "--save_path", tmp_path / "o" / "w.pt", "--num_query_heads", 8)
    refused(out, rank)
    assert left_in(tmp_path / "o") == []


def test_a_missing_rank_that_names_do_not_show(trees: Callable[..., Path], tmp_path: Path) -> None:
    """Half of the heads are there: nothing but the shapes says so."""
    source = tmp_path / "tree"
    shutil.copytree(trees("llama2", 2, 1), source)
    shutil.rmtree(source / "mp_rank_01")
    out = run("--in_dir", source, "--save_path", tmp_path / "w.pt", "--num_query_heads", 8)
    refused(out, "have 32 rows, but the hidden size is 64; is a rank missing?", code=2)
    out = run("--in_dir", source, "--save_path", tmp_path / "w.pt", "--num_query_heads", 8, "--tp_size", 2)
    refused(out, "--tp_size 2 contradicts", "which has 1", code=2)


@pytest.mark.parametrize("args", [False, True], ids=["bare", "args"])
@pytest.mark.parametrize("rank", ["mp_rank_00_000", "mp_rank_01_001"])
def test_a_truncated_rank(rank: str, args: bool, trees: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "tree"
    shutil.copytree(trees("llama2", 2, 2, args=args), source)
    path = source / rank / RANK_FILE
    path.write_bytes(path.read_bytes()[:-2000])
    out = run("--in_dir", source, "--save_path", tmp_path / "o" / "w.pt", "--num_query_heads", 8)
    refused(out, path)
    assert len(out.err.splitlines()) == 1
    assert left_in(tmp_path / "o") == []


def test_stages_that_do_not_follow_each_other(trees: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "tree"
    shutil.copytree(trees("llama2", 1, 2), source)
    (source / "mp_rank_00_001").rename(source / "mp_rank_00_002")
    with pytest.raises(mc.ConversionError, match="mp_rank_00_001 is missing"):
        mc.SmartConverter().detect_parallel_config(source)


# -- tensors by rank


@pytest.mark.parametrize("args", [False, True], ids=["bare", "args"])
def test_tensors_of_ranks_are_merged_over_stages(args: bool, trees: Callable[..., Path]) -> None:
    load = mc.TensorParallelConverter().load_distributed_checkpoints
    ranks = load(trees("llama2", 2, 2, args=args), tp_size=2, pp_size=2)
    for tp, tensors in enumerate(ranks):
        expected = torch.load(trees("llama2", 2, 1) / f"mp_rank_0{tp}" / RANK_FILE, weights_only=True)["model"]
        same_tensors(tensors, {key: value for key, value in expected.items() if value is not None})
    ranks[0]["decoder.final_layernorm.weight"].fill_(7)  # writes to no file
    again = load(trees("llama2", 2, 2, args=args), tp_size=2, pp_size=2)
    assert not (again[0]["decoder.final_layernorm.weight"] == 7).any()
    with pytest.raises(AssertionError, match=r"--tp_size 4 contradicts .* which has 2"):
        load(trees("llama2", 2, 2), tp_size=4, pp_size=2)


def test_debug_shows_each_step(
    trees: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG, logger="megatron_converters"):
        mc.smart_convert_megatron_to_hf(trees("llama2", 2, 2), tmp_path / "w.pt", num_query_heads=8)
    for words in (
        "tp=2, pp=2 (by folder names, and embeddings on the first rank alone)",
        "4 layers; on the stages [2, 2]",
        "8 query heads and 4 KV heads (by the given numbers and the shapes)",
        "w.pt.conversion.json",
    ):
        assert words in caplog.text
    assert capsys.readouterr() == ("", "")

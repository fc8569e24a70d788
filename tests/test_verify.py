"""`verify`: equal models are equal in any format, each mutation is named with its slot and place, and damaged outputs are seen."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_converters.basics.dtypes import dtype_named
from megatron_converters.basics.errors import ConversionError
from megatron_converters.cli.main import main
from megatron_converters.comparison.manifest_check import check_output
from megatron_converters.comparison.tensors import Comparison, Rules, compare
from megatron_converters.conversion.journal import with_digest
from megatron_converters.conversion.progress import Silent
from megatron_converters.conversion.run import convert
from megatron_converters.conversion.staging import Staging
from megatron_converters.formats.huggingface.source import HFSource
from megatron_converters.formats.megatron.rank_files_source import MegatronSource
from megatron_converters.formats.megatron.rank_files_target import MegatronTarget
from megatron_converters.formats.megatron.writing import MegatronOptions
from megatron_converters.storage import safetensors, torch_zip
from tests.conversions import hf_to_megatron, megatron_to_hf, reshard
from tests.helpers import finished, start_verb
from tests.json_reports import fields_of
from tests.oracle.hf import FAMILIES, MOE_FAMILIES

HFModel = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
Ranks = dict[str, Tensors]
FILE = "model_optim_rng.pt"
_LAYER = "decoder.layers.0."
_QKV, _PROJ = f"{_LAYER}self_attention.linear_qkv.weight", f"{_LAYER}self_attention.linear_proj.weight"
_FC1, _NORM = f"{_LAYER}mlp.linear_fc1.weight", f"{_LAYER}input_layernorm.weight"
_ROUTER = f"{_LAYER}mlp.router.weight"
_EXPERT = _LAYER + "mlp.experts.local_experts.{}.linear_fc1.weight"


@pytest.fixture(scope="module")
def checkpoint(hf_model: HFModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A model's folder, and a checkpoint of it with local names at TP 2, PP 2 and, with experts, EP 2."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(family: str) -> tuple[Path, Path]:
        if family not in made:
            head_dim = {} if family in MOE_FAMILIES else {"head_dim": 16}
            source = hf_model(family, **head_dim)
            sizes = dict(tp=2, pp=2, impl="local", **({"ep": 2} if family in MOE_FAMILIES else {}))
            made[family] = source, hf_to_megatron(source, tmp_path_factory.mktemp("verify") / family, **sizes)
        return made[family]

    return make


def contrast(one: Path, other: Path, **rules: Any) -> Comparison:
    def opened(path: Path) -> Any:
        return HFSource(path) if (path / "config.json").exists() else MegatronSource(path)

    return compare(opened(one), opened(other), Rules(**rules), Silent())


def named(comparison: Comparison) -> set[str]:
    return {str(tensor.ref) for tensor in comparison.different}


def finding(comparison: Comparison, name: str) -> Any:
    (found,) = [tensor for tensor in comparison.different if str(tensor.ref) == name]
    (one,) = found.findings
    return one


def mutate(checkpoint: Path, target: Path, change: Callable[[Ranks], None]) -> Path:
    """A copy with changed tensors, by rank folder, saved by torch."""
    shutil.copytree(checkpoint, target)
    files = {path.parent.name: path for path in sorted(target.glob(f"iter_0000001/mp_rank_*/{FILE}"))}
    contents = {name: torch.load(path, weights_only=False) for name, path in files.items()}
    change({name: content["model"] for name, content in contents.items()})
    for name, path in files.items():
        torch.save(contents[name], path)
    return target


def mutate_hf(source: Path, target: Path, change: Callable[[Tensors], None]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    return target


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return int(exit_.value.code or 0), shown.out, shown.err


# --- equal models


@pytest.mark.parametrize("family", [*FAMILIES, *MOE_FAMILIES])
def test_a_model_equals_itself_in_every_format(family: str, hf_model: HFModel, tmp_path: Path) -> None:
    source = hf_model(family)
    sizes = dict(tp=2, pp=2, allow_inexpressible=True, **({"ep": 2} if family in MOE_FAMILIES else {}))
    meg = hf_to_megatron(source, tmp_path / "meg", **sizes)
    other = reshard(meg, tmp_path / "other", tp=1, pp=1, ep=1, allow_inexpressible=True)
    for one, two in ((source, meg), (meg, source), (meg, other)):
        found = contrast(one, two)
        assert found.equal, (found.spec, named(found))
        assert len(found.tensors) > 20
    padded = 2 - ("tied" in family)  # embeddings, and an output layer of their own, to 256 rows
    assert contrast(source, meg).padding == (0, 57 * padded)


def test_all_bytes_are_read_and_counted(checkpoint: Any) -> None:
    source, meg = checkpoint("llama3")
    total = 0

    class Counted(Silent):
        def __call__(self, count: int) -> None:
            nonlocal total
            total += count

    found = compare(HFSource(source), MegatronSource(meg), Rules(), Counted())
    model = sum(tensor.nbytes for tensor in load_file(source / "model.safetensors").values())
    norms = 9 * 64 * 4  # on two tensor-parallel ranks
    assert total == found.nbytes == 2 * model + norms


# --- mutations of a checkpoint


def _each(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Ranks], None]:
    def apply(ranks: Ranks) -> None:
        for model in ranks.values():
            if key in model:
                model[key] = change(model[key]).clone()

    return apply


def _swap_query_and_key(weight: torch.Tensor) -> torch.Tensor:
    """Two groups a rank, each of two query heads, a key head and a value head, of 16 rows."""
    return weight.reshape(2, 4, 16, -1)[:, [2, 1, 0, 3]].reshape(weight.shape)


def _swap_halves(weight: torch.Tensor) -> torch.Tensor:
    return torch.cat(weight.chunk(2)[::-1])


def _swap_tp(ranks: Ranks) -> None:
    one, other = ranks["mp_rank_00_000"], ranks["mp_rank_01_000"]
    one[_QKV], other[_QKV] = other[_QKV], one[_QKV]


def _permute_experts(ranks: Ranks) -> None:
    for name in ("mp_rank_00_000_001", "mp_rank_01_000_001"):  # experts 4 to 7
        model = ranks[name]
        first, second = _EXPERT.format(0), _EXPERT.format(2)
        model[first], model[second] = model[second], model[first]


def _swap_etp(ranks: Ranks) -> None:
    one, other = ranks["mp_rank_00_000_000"], ranks["mp_rank_01_000_000"]
    key = _EXPERT.format(3)
    one[key], other[key] = other[key], one[key]


def _shift_layers(ranks: Ranks) -> None:
    for model in ranks.values():
        layers = {key: value for key, value in model.items() if ".layers." in key}
        for key, value in layers.items():
            other = key.replace(".layers.0.", ".layers.X.").replace(".layers.1.", ".layers.0.")
            model[other.replace(".layers.X.", ".layers.1.")] = value


def _flip_bit(ranks: Ranks) -> None:
    ranks["mp_rank_01_001"][_PROJ].view(torch.int32)[7, 11] ^= 1


def _wrong_norm(ranks: Ranks) -> None:
    for name in ("mp_rank_00_001", "mp_rank_01_001"):
        ranks[name][_NORM] = torch.ones_like(ranks[name][_NORM])


def _swap_router_rows(ranks: Ranks) -> None:
    for name, model in ranks.items():
        if name.split("_")[3] == "000":
            model[_ROUTER] = model[_ROUTER][[0, 1, 5, 3, 4, 2, 6, 7]].clone()


def _change_dtype(ranks: Ranks) -> None:
    ranks["mp_rank_01_000"][_FC1] = ranks["mp_rank_01_000"][_FC1].bfloat16()


def _change_copy(ranks: Ranks) -> None:
    ranks["mp_rank_01_001"]["output_layer.weight"][3, 4] += 1


_LAYER_SLOTS = ("input_norm", "qkv", "proj", "mlp_norm", "fc1", "fc2")
#: Name: family, change, the tensors that must be named, and the kind of finding.
MUTATIONS: dict[str, tuple[str, Callable[[Ranks], None], set[str], str]] = {
    "query and key swapped": ("llama3", _each(_QKV, _swap_query_and_key), {"layer 0 qkv", "layer 2 qkv"}, "values"),
    "gate and up swapped": ("llama3", _each(_FC1, _swap_halves), {"layer 0 fc1", "layer 2 fc1"}, "values"),
    "square transposed": ("llama3", _each(_PROJ, lambda weight: weight.T), {"layer 0 proj", "layer 2 proj"}, "values"),
    "tensor ranks swapped": ("llama3", _swap_tp, {"layer 0 qkv"}, "values"),
    "experts permuted": ("mixtral", _permute_experts, {f"layer 0 expert {n} expert_fc1" for n in (4, 6)}, "values"),
    "layers shifted": ("llama3", _shift_layers, {f"layer {n} {s}" for n in range(4) for s in _LAYER_SLOTS}, "values"),
    "a bit flipped": ("llama3", _flip_bit, {"layer 2 proj"}, "values"),
    "a norm lost": ("llama3", _wrong_norm, {"layer 2 input_norm"}, "values"),
    "router rows swapped": ("mixtral", _swap_router_rows, {"layer 0 router"}, "values"),
    "expert-tensor ranks swapped": ("mixtral", _swap_etp, {"layer 0 expert 3 expert_fc1"}, "values"),
    "a tied copy changed": ("llama3.2-tied", _change_copy, {"word_embeddings"}, "copy"),
    "one rank's dtype changed": ("llama3", _change_dtype, {"layer 0 fc1"}, "dtype"),
    "all ranks' dtype changed": ("llama3", _each(_FC1, torch.Tensor.double), {"layer 0 fc1", "layer 2 fc1"}, "dtype"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_of_a_checkpoint_is_named(name: str, checkpoint: Any, tmp_path: Path) -> None:
    family, change, wanted, kind = MUTATIONS[name]
    source, meg = checkpoint(family)
    found = contrast(source, mutate(meg, tmp_path / "meg", change))
    assert named(found) == wanted
    assert {one.kind for tensor in found.different for one in tensor.findings} == {kind}
    assert not found.spec


def test_no_mutation_is_named_where_there_is_none(checkpoint: Any, tmp_path: Path) -> None:
    for family in ("llama3", "mixtral", "llama3.2-tied"):
        source, meg = checkpoint(family)
        assert contrast(source, mutate(meg, tmp_path / family, lambda _: None)).equal


def test_a_stale_row_of_padding_is_no_difference_of_models_but_one_of_files(checkpoint: Any, tmp_path: Path) -> None:
    source, meg = checkpoint("llama3")

    def stale(ranks: Ranks) -> None:
        ranks["mp_rank_01_001"]["output_layer.weight"][-1] += 1

    changed = mutate(meg, tmp_path / "meg", stale)
    assert contrast(source, changed).equal
    faults = check_output(changed / "iter_0000001", Silent()).faults
    # torch wrote all files anew, with other bytes beside the tensors; of the tensors only one differs.
    assert [(fault.file, fault.tensor, fault.holds) for fault in faults if fault.tensor] == [
        (f"mp_rank_01_001/{FILE}", "output_layer.weight", ("output_layer",))
    ]


# --- mutations of a Hugging Face folder


def _hf(part: str, change: Callable[[torch.Tensor], torch.Tensor], layer: int = 1) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        name = f"model.layers.{layer}.{part}.weight"
        tensors[name] = change(tensors[name]).clone()

    return apply


def _swapped(one: str, other: str) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        left, right = f"model.layers.{one}.weight", f"model.layers.{other}.weight"
        tensors[left], tensors[right] = tensors[right], tensors[left]

    return apply


def _hf_bit(weight: torch.Tensor) -> torch.Tensor:
    weight.view(torch.int32)[-1, -1] ^= 1 << 31
    return weight


HF_MUTATIONS: dict[str, tuple[str, Callable[[Tensors], None], set[str]]] = {
    "key and value swapped": ("llama3", _swapped("1.self_attn.k_proj", "1.self_attn.v_proj"), {"layer 1 qkv"}),
    "gate and up swapped": ("llama3", _swapped("1.mlp.gate_proj", "1.mlp.up_proj"), {"layer 1 fc1"}),
    "square transposed": ("llama2", _hf("self_attn.o_proj", lambda weight: weight.T), {"layer 1 proj"}),
    "layers swapped": ("llama3", _swapped("1.mlp.down_proj", "3.mlp.down_proj"), {"layer 1 fc2", "layer 3 fc2"}),
    "a bit flipped": ("llama3", _hf("mlp.up_proj", _hf_bit), {"layer 1 fc1"}),
    "a norm lost": ("llama3", _hf("input_layernorm", torch.ones_like), {"layer 1 input_norm"}),
    "dtype changed": ("llama3", _hf("mlp.down_proj", torch.Tensor.double), {"layer 1 fc2"}),
    "router rows swapped": (
        "mixtral",
        _hf("block_sparse_moe.gate", lambda weight: weight.flip(0)),
        {"layer 1 router"},
    ),
    "experts permuted": (
        "mixtral",
        _swapped("1.block_sparse_moe.experts.2.w2", "1.block_sparse_moe.experts.5.w2"),
        {f"layer 1 expert {n} expert_fc2" for n in (2, 5)},
    ),
}


@pytest.mark.parametrize("name", HF_MUTATIONS)
def test_each_mutation_of_a_folder_is_named(name: str, checkpoint: Any, hf_model: HFModel, tmp_path: Path) -> None:
    family, change, wanted = HF_MUTATIONS[name]
    source = hf_model(family) if family == "llama2" else checkpoint(family)[0]
    meg = hf_to_megatron(source, tmp_path / "meg", tp=2, pp=2)
    assert named(contrast(mutate_hf(source, tmp_path / "hf", change), meg)) == wanted


def test_a_stored_head_that_differs_from_the_tied_embeddings_is_named(checkpoint: Any, tmp_path: Path) -> None:
    source, meg = checkpoint("llama3.2-tied")

    def add(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][100, 9] = 5

    found = finding(contrast(meg, mutate_hf(source, tmp_path / "hf", add)), "word_embeddings")
    assert (found.kind, found.measure.differing, found.measure.first) == ("copy", 1, (100, 9))
    one, other = found.measure.places
    assert (one.side, other.side, other.value) == ("B", "B, copy", 5.0)
    assert "lm_head.weight" in found.text


# --- where the first difference lies


def test_the_first_element_is_named_with_its_places(checkpoint: Any, tmp_path: Path) -> None:
    """Row 7 of fc2 on the second rank's columns: local column 3 is the slot's 56 + 3."""
    source, meg = checkpoint("llama3")
    key = f"{_LAYER}mlp.linear_fc2.weight"

    def change(ranks: Ranks) -> None:
        ranks["mp_rank_01_001"][key][7, 3] = 2.5
        ranks["mp_rank_01_001"][key][9, 0] = 1.5

    changed = mutate(meg, tmp_path / "meg", change)
    measure = finding(contrast(source, changed), "layer 2 fc2").measure
    stored = load_file(source / "model.safetensors")["model.layers.2.mlp.down_proj.weight"]
    assert (measure.elements, measure.differing, measure.first) == (64 * 112, 2, (7, 59))
    assert measure.largest == float(max(abs(2.5 - stored[7, 59].double()), abs(1.5 - stored[9, 56].double())))
    one, other = measure.places
    assert (one.where, one.row, one.col) == ("model.safetensors: model.layers.2.mlp.down_proj.weight", 7, 59)
    assert (other.where, other.row, other.col, other.value) == (f"mp_rank_01_001: {key}", 7, 3, 2.5)
    for path, place in ((source / "model.safetensors", one), (changed / f"iter_0000001/mp_rank_01_001/{FILE}", other)):
        assert np.frombuffer(path.read_bytes()[place.byte :][:4], np.float32)[0] == np.float32(place.value)


def test_a_row_of_packed_attention_is_found_in_its_part(checkpoint: Any, tmp_path: Path) -> None:
    """Head dimension 16, two query heads a group: the slot's row 3 x 64 + 32 + 5 is row 3 x 16 + 5 of the keys."""
    source, meg = checkpoint("llama3")

    def change(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.k_proj.weight"][53, 8] += 1

    measure = finding(contrast(meg, mutate_hf(source, tmp_path / "hf", change)), "layer 0 qkv").measure
    assert measure.first == (229, 8)
    assert [(place.row, place.col) for place in measure.places] == [(101, 8), (53, 8)]
    assert "mp_rank_01_000" in measure.places[0].where


def test_an_expert_of_a_stack_is_found_in_the_file(hf_model: HFModel, tmp_path: Path) -> None:
    """Stacked experts are stored transposed in one tensor; the byte tells which element is meant."""
    source = hf_model("mixtral")
    one = hf_to_megatron(source, tmp_path / "one", tp=2, ep=2, expert_layout="stacked")

    def change(ranks: Ranks) -> None:
        ranks["mp_rank_01_001"]["decoder.layers.3.mlp.experts.weight2"].view(-1)[4321] = 7.0

    other = mutate(one, tmp_path / "other", change)
    place = finding(contrast(source, other), f"layer 3 expert {4 + 4321 // (56 * 64)} expert_fc2").measure.places[1]
    data = (other / f"iter_0000001/mp_rank_01_001/{FILE}").read_bytes()
    assert np.frombuffer(data[place.byte :][:4], np.float32)[0] == 7.0


# --- rules


def test_tolerance_and_dtypes(checkpoint: Any, tmp_path: Path) -> None:
    source, meg = checkpoint("llama3")
    half = mutate_hf(source, tmp_path / "hf", lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    exact = contrast(half, meg)
    assert {one.kind for tensor in exact.different for one in tensor.findings} == {"dtype", "values"}
    assert len(exact.different) == 27
    assert {one.kind for tensor in contrast(half, meg, tolerance=1e-2).different for one in tensor.findings} == {
        "dtype"
    }
    assert contrast(half, meg, tolerance=1e-2, ignore_dtype=True).equal
    worst = max(float((t - t.half()).abs().max()) for t in load_file(source / "model.safetensors").values())
    assert contrast(half, meg, tolerance=worst, ignore_dtype=True).equal
    below = contrast(half, meg, tolerance=worst * 0.999, ignore_dtype=True)
    assert len(below.different) >= 1
    assert max(tensor.measure.largest for tensor in below.tensors if tensor.measure) == worst


def _two_layers(source: Path, target: Path) -> Path:
    def cut(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".layers.2." in name or ".layers.3." in name]:
            del tensors[name]

    mutate_hf(source, target, cut)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    return target


def test_what_only_one_has_is_named_and_the_rest_compared(checkpoint: Any, tmp_path: Path) -> None:
    source, meg = checkpoint("llama3")
    found = contrast(_two_layers(source, tmp_path / "hf"), meg)
    assert found.spec == ["num_layers: A has 2, B has 4"]
    assert named(found) == {f"layer {n} {slot}" for n in (2, 3) for slot in _LAYER_SLOTS}
    assert {one.text for tensor in found.different for one in tensor.findings} == {"only B has it"}
    assert [str(tensor.ref) for tensor in found.tensors][-3:] == ["layer 3 fc2", "final_norm", "output_layer"]


def test_a_vocabulary_with_its_padding_is_compared_as_far_as_both_have_it(
    checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, meg = checkpoint("llama3")
    changed = shutil.copytree(meg, tmp_path / "meg")
    for path in changed.glob(f"iter_0000001/mp_rank_*/{FILE}"):
        content = torch.load(path, weights_only=False)
        del content["args"].vocab_size
        torch.save(content, path)
    code, out, _ = run(capsys, "verify", source, changed)
    assert code == 1
    assert "different: vocab_size: A has 199, B has 256" in out
    assert "different: word_embeddings, output_layer: A has shape [199, 64], B [256, 64]" in out
    assert "elements differ" not in out
    assert run(capsys, "verify", source, changed, "--true-vocab-size", 199)[0] == 0


def test_a_family_is_compared_only_where_both_say_it(checkpoint: Any, hf_model: HFModel, tmp_path: Path) -> None:
    source = hf_model("mistral")
    meg = hf_to_megatron(source, tmp_path / "meg", tp=1)
    path = meg / "iter_0000001/mp_rank_00" / FILE
    content = torch.load(path, weights_only=False)
    del content["args"].hf_config
    torch.save(content, path)
    assert MegatronSource(meg).spec.family == "llama"
    assert contrast(source, meg).equal


# --- the command


def test_equal_folders_are_said_to_be(checkpoint: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source, meg = checkpoint("llama3")
    code, out, _ = run(capsys, "verify", source, meg)
    assert code == 0
    assert "EQUAL: 27 tensors" in out
    assert "rows of vocabulary padding not compared: 114 of B" in out
    assert run(capsys, "verify", source, meg / "iter_0000001", "--quiet") == (0, "", "")


def test_differences_are_listed_up_to_a_limit(
    checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, meg = checkpoint("llama3")
    changed = mutate(meg, tmp_path / "meg", _shift_layers)
    code, out, _ = run(capsys, "verify", source, changed, "--limit", 3)
    assert (code, out.count("different: ")) == (1, 3)
    assert "… and 21 more (--limit 0 prints all)" in out
    assert "DIFFERENT: 24 of 27 tensors" in out
    lines = run(capsys, "verify", source, changed, "--limit", 0)[1].splitlines()
    listed = [line.split(":")[1].strip() for line in lines if line.startswith("different: ")]
    assert listed == [f"layer {n} {slot}" for n in range(4) for slot in _LAYER_SLOTS]
    assert any(
        line.startswith("  B: mp_rank_00_000: decoder.layers.0.input_layernorm.weight [0, 0] is") for line in lines
    )


def test_the_report_for_programs(checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, meg = checkpoint("llama3")

    def change(ranks: Ranks) -> None:
        ranks["mp_rank_00_000"][_QKV][1, 2] = float("nan")

    code, out, _ = run(capsys, "verify", source, mutate(meg, tmp_path / "meg", change), "--json")
    report = json.loads(out, parse_constant=pytest.fail)
    assert (code, report["equal"], report["a"]["format"], report["b"]["format"]) == (1, False, "hf", "megatron")
    (tensor,) = report["different"]
    (found,) = tensor["findings"]
    assert (tensor["tensor"], found["kind"], found["differing"], found["first"]) == ("layer 0 qkv", "values", 1, [1, 2])
    assert (found["largest"], found["places"][1]["value"]) == ("inf", "nan")


@pytest.mark.parametrize(
    "options", [("--tolerance", "-1"), ("--tolerance", "x"), ("--tolerance", "nan"), ("--from-b", "x")]
)
def test_options_that_mean_nothing(options: tuple[str, str], checkpoint: Any, capsys: Any) -> None:
    source, meg = checkpoint("llama3")
    assert run(capsys, "verify", source, meg, *options)[0] == 2


def test_the_format_of_each_side_can_be_said(checkpoint: Any, tmp_path: Path, capsys: Any) -> None:
    source, meg = checkpoint("llama3")
    both = shutil.copytree(meg, tmp_path / "both")
    shutil.copy(source / "config.json", both)
    code, _, err = run(capsys, "verify", source, both)
    assert (code, "could be hf or megatron" in err) == (2, True)
    assert run(capsys, "verify", source, both, "--from-b", "megatron")[0] == 0
    assert run(capsys, "verify", both, source, "--from", "megatron")[0] == 0


# --- logits


_LOGITS = ("verify", "--logits", "--length", "16")


def test_logits_are_compared(hf_model: HFModel, tmp_path: Path) -> None:
    """In a process of its own, since the models' processes are spawned from its main module."""
    source = hf_model("llama3")
    done = finished(start_verb(*_LOGITS, source, hf_to_megatron(source, tmp_path)), 300)
    assert (done.code, "logits agree" in done.out) == (0, True), done


def test_logits_that_differ_are_told(checkpoint: Any, tmp_path: Path, preloaded: None, capsys: Any) -> None:
    source, meg = checkpoint("llama3")
    wrong = mutate(meg, tmp_path / "meg", _shift_layers)
    code, out, _ = run(capsys, *_LOGITS, source, wrong, "--json")
    report = json.loads(out)
    assert (code, report["equal"], report["positions"]) == (1, False, 32)
    assert fields_of(report, "verify_logits")
    assert report["difference"] > report["tolerance"] * report["scale"]


@pytest.mark.parametrize("options", [["--ignore-dtype"], ["--from", "hf"], ["--from-b", "megatron"], ["--untie"]])
def test_logits_heed_no_options_of_tensors(options: list[str], checkpoint: Any, capsys: Any) -> None:
    code, _, err = run(capsys, "verify", *checkpoint("llama3"), "--logits", *options)
    assert (code, f"{options[0]} is for comparing tensors" in err) == (2, True)


# --- an output against its manifest


@pytest.fixture
def outputs(checkpoint: Any, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint and a Hugging Face folder, to be damaged."""
    meg = shutil.copytree(checkpoint("llama3")[1], tmp_path / "meg")
    return meg, megatron_to_hf(meg, tmp_path / "hf")


def _damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_an_output_is_intact(outputs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    meg, hf = outputs
    for arguments, tensors in (((meg,), 54), ((hf,), 39), ((meg / "iter_0000001",), 54)):
        code, out, _ = run(capsys, "verify", *arguments)
        assert code == 0
        assert f"INTACT: {tensors} tensors" in out
    assert run(capsys, "verify", meg, "--ckpt-dir-name", "iter_0000001")[0] == 0
    assert json.loads(run(capsys, "verify", hf, "--json")[1])["intact"] is True


def test_what_the_manifest_says_of_finished_files_makes_no_other_run_of_it(hf_model: HFModel, tmp_path: Path) -> None:
    """A command that is repeated finds its work done, though the manifest knows more than the run did before."""
    source = HFSource(hf_model("llama3"))
    first, again = (convert(source, MegatronTarget(tmp_path, MegatronOptions(tp=2)), None, Silent()) for _ in range(2))
    assert "wrote" in first[0]
    assert again == [f"{tmp_path / 'iter_0000001'} is complete already; nothing to do (--overwrite writes it again)"]


def test_any_damaged_byte_is_seen(outputs: tuple[Path, Path]) -> None:
    meg, hf = outputs
    draw = random.Random(0)
    for folder, name in ((hf, "model.safetensors"), (meg / "iter_0000001", f"mp_rank_01_000/{FILE}")):
        size = (folder / name).stat().st_size
        kept = (folder / name).read_bytes()
        for at in [0, 7, 8, size - 1, size - 30, *(draw.randrange(size) for _ in range(15)), *range(40, 4000, 400)]:
            _damage(folder / name, at)
            faults = check_output(folder, Silent()).faults
            assert {fault.file for fault in faults} == {name}, at
            (folder / name).write_bytes(kept)
        assert check_output(folder, Silent()).faults == []


def test_a_small_file_that_changed_or_is_missing_is_named(outputs: tuple[Path, Path]) -> None:
    megatron, hf = outputs
    (hf / "config.json").write_text((hf / "config.json").read_text() + " ")
    flags = next(megatron.rglob("pretrain_gpt_flags.txt"))
    flags.unlink()
    assert [str(fault) for fault in check_output(hf, Silent()).faults] == [
        "config.json has changed since it was written"
    ]
    assert [str(fault) for fault in check_output(flags.parent, Silent()).faults] == [
        "pretrain_gpt_flags.txt is missing"
    ]


def test_a_damaged_tensor_is_named_with_its_slots(
    outputs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    hf = outputs[1]
    manifest = json.loads((hf / "conversion.json").read_text())
    name = "model.layers.1.self_attn.v_proj.weight"
    offset, nbytes = manifest["files"]["model.safetensors"]["tensors"][name]["at"]
    _damage(hf / "model.safetensors", offset + nbytes - 1)
    code, out, _ = run(capsys, "verify", hf)
    assert code == 1
    assert f"damaged: model.safetensors: {name} (layer 1 qkv) has changed since it was written" in out
    assert "DAMAGED: 1 fault; checked 39 tensors" in out
    (fault,) = json.loads(run(capsys, "verify", hf, "--json")[1])["faults"]
    assert (fault["file"], fault["tensor"], fault["holds"]) == ("model.safetensors", name, ["layer 1 qkv"])


def _faults(folder: Path) -> list[str]:
    return [str(fault) for fault in check_output(folder, Silent()).faults]


def test_files_that_are_missing_cut_or_too_many(outputs: tuple[Path, Path]) -> None:
    folder = outputs[0] / "iter_0000001"
    (folder / "mp_rank_00_000" / FILE).unlink()
    cut = folder / "mp_rank_00_001" / FILE
    size = cut.stat().st_size
    with open(cut, "r+b") as file:
        file.truncate(size - 5)
    shutil.copytree(folder / "mp_rank_01_001", folder / "mp_rank_02_001")
    faults = _faults(folder)
    assert faults[:2] == [
        f"mp_rank_00_000/{FILE} is missing",
        f"mp_rank_00_001/{FILE} has {size - 5} bytes instead of {size}",
    ]
    assert "is truncated" in faults[2]
    assert faults[3:] == [f"mp_rank_02_001/{FILE} is not listed in conversion.json"]


def test_tensors_that_are_missing_added_or_of_another_type(outputs: tuple[Path, Path]) -> None:
    path = outputs[1] / "model.safetensors"
    tensors = load_file(path)
    tensors["new"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].half()
    tensors["model.norm.weight"] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    faults = _faults(outputs[1])
    assert faults[0].startswith("model.safetensors has ")
    shown = "\n".join(faults)
    assert len(faults) == 5
    assert "new is not listed in conversion.json" in shown
    assert "model.layers.0.mlp.up_proj.weight (layer 0 fc1) is missing" in shown
    assert "lm_head.weight (output_layer) is 25472 bytes of float16 instead of 50944 of float32" in shown
    assert "model.norm.weight (final_norm) has changed since it was written" in shown


def test_a_tensor_saved_with_other_strides_is_named(outputs: tuple[Path, Path]) -> None:
    meg = mutate(outputs[0], outputs[0].parent / "again", _strided)
    (found,) = [fault for fault in _faults(meg / "iter_0000001") if _PROJ in fault]
    assert found.endswith("(layer 0 proj) is stored in another order of its elements")


def _strided(ranks: Ranks) -> None:
    ranks["mp_rank_00_000"][_PROJ] = ranks["mp_rank_00_000"][_PROJ].T


def test_an_output_without_a_manifest(hf_model: HFModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (hf_model("llama3"), tmp_path):
        code, _, err = run(capsys, "verify", path)
        assert code == 2
        assert "is no output of a conversion that can be checked alone: it has no conversion.json" in err
    assert run(capsys, "verify", tmp_path / "nowhere")[2].endswith("does not exist; give a folder or file that does\n")
    assert run(capsys, "verify", tmp_path, "--ckpt-dir-name", "iter_0000009")[0] == 2
    for option in ("--ignore-dtype", "--logits", "--tolerance=0"):
        code, _, err = run(capsys, "verify", tmp_path, option)
        assert (code, "compares two folders" in err) == (2, True)


def test_options_of_logits_need_logits(hf_model: HFModel, capsys: pytest.CaptureFixture[str]) -> None:
    """Else a user would believe that something was computed."""
    for option in ("--seed=0", "--batch=1", "--length=7"):
        code, _, err = run(capsys, "verify", hf_model("llama3"), hf_model("llama3"), option)
        assert code == 2
        assert f"{option.partition('=')[0]} is for comparing logits; give --logits, too" in err


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda files: files["model.safetensors"].update({key: value})


def _tensor(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda files: files["model.safetensors"]["tensors"]["lm_head.weight"].update({key: value})


@pytest.mark.parametrize(
    "change",
    [
        _set("bytes", "1"),
        _set("outside", None),
        _set("tensors", []),
        _tensor("at", [1]),
        _tensor("at", [-1, 5]),
        _tensor("at", ["0", 5]),
        _tensor("at", [10**12, 8]),
        _tensor("crc32", "xyz"),
        _tensor("holds", None),
        _tensor("shape", ["x"]),
        lambda files: files.update({"../x": files["model.safetensors"]}),
        lambda files: files.update({"/x": files["model.safetensors"]}),
        lambda files: files.update({"x": None}),
        lambda files: files["model.safetensors"].pop("outside"),
    ],
)
def test_a_damaged_manifest_is_said_to_be(
    change: Callable[[dict[str, Any]], None], outputs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = outputs[1] / "conversion.json"
    manifest = json.loads(path.read_text())
    change(manifest["files"])
    path.write_text(json.dumps(with_digest(manifest)))
    code, _, err = run(capsys, "verify", outputs[1])
    assert code == 2
    assert "is damaged, or of an older version" in err


def test_any_damaged_byte_of_the_manifest_is_seen(outputs: tuple[Path, Path]) -> None:
    """Also where it says what nothing else can contradict: where a tensor came from, by which options."""
    path = outputs[1] / "conversion.json"
    written = path.read_bytes()
    for at in random.Random(0).sample(range(len(written)), 200):
        path.write_bytes(written[:at] + bytes([written[at] ^ 1]) + written[at + 1 :])
        with pytest.raises(ConversionError, match=r"conversion\.json is damaged"):
            check_output(outputs[1], Silent())
    for at in (0, 1, len(written) // 2, len(written) - 4):
        path.write_bytes(written[:at])
        with pytest.raises(ConversionError, match=r"conversion\.json is damaged"):
            check_output(outputs[1], Silent())


def test_an_unfinished_conversion_is_said_to_be_one(
    hf_model: HFModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    staging = Staging(tmp_path, "iter_0000001")
    staging.open()
    for arguments in (["verify", tmp_path], ["inspect", tmp_path], ["diff", hf_model("llama3"), tmp_path]):
        _, _, err = run(capsys, *arguments)
        assert f"{tmp_path} holds an unfinished conversion (.iter_0000001.incomplete); run the same convert" in err


def test_a_manifest_that_lies_of_places_finds_faults(outputs: tuple[Path, Path]) -> None:
    """Other places than those of the tensors, or too few of them, are faults and no crash."""
    path = outputs[1] / "conversion.json"
    written = path.read_text()
    for change in (_tensor("at", [0, 8]), lambda files: files["model.safetensors"]["tensors"].popitem()):
        manifest = json.loads(written)
        change(manifest["files"])
        path.write_text(json.dumps(with_digest(manifest)))
        assert _faults(outputs[1])


def test_a_file_that_cannot_be_read_is_a_fault(outputs: tuple[Path, Path]) -> None:
    path = outputs[1] / "model.safetensors"
    path.unlink()
    path.symlink_to(path)
    (fault,) = _faults(outputs[1])
    assert fault.startswith("model.safetensors cannot be read: ")


def test_what_surrounds_the_tensors_is_all_that_a_layout_writes_last() -> None:
    """The digest leaves out nothing: the manifest's stretches and what `finish` gives are the file, each byte once."""
    layouts = (
        safetensors.layout({"a": (dtype_named("bf16"), (3, 5)), "b": (dtype_named("fp32"), (0,))}, {"format": "pt"}),
        torch_zip.layout("x.pt", {"a": torch_zip.NewTensor("a", dtype_named("bf16"), (7,)), "n": 1}),
    )
    for layout in layouts:
        rest = [(offset, len(data)) for offset, data in layout.finish(dict.fromkeys(layout.regions, 0))]
        stretches = sorted((offset, nbytes) for offset, nbytes in [*layout.regions.values(), *rest] if nbytes)
        ends = [0, *(offset + nbytes for offset, nbytes in stretches)]
        assert [offset for offset, _ in stretches] == ends[:-1]
        assert ends[-1] == layout.nbytes

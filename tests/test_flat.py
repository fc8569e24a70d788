"""`model.pt` and `metadata.json`: what torch and the real megatron-core make of them, the exact way back, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_converters.basics.errors import ConversionError, UsageError
from megatron_converters.comparison.manifest_check import check_output
from megatron_converters.conversion.progress import Silent
from megatron_converters.formats.huggingface.source import HFSource
from megatron_converters.formats.huggingface.target import HFOptions, HFTarget
from megatron_converters.formats.megatron.flat_target import FlatTarget
from megatron_converters.formats.megatron.opening import open_megatron
from megatron_converters.formats.megatron.reading import MegatronReadOptions
from megatron_converters.formats.megatron.writing import MegatronOptions
from megatron_converters.logits import megatron
from megatron_converters.logits.pool import Pool
from tests.conversions import different, hf_to_megatron, hf_to_torch_dist, megatron_to_hf, reshard, run
from tests.forked import forked
from tests.helpers import convert, hf_tensors, nothing_complete, rank_content, refused, same_tensors, succeeded, verb
from tests.logits_processes import PRELOADED
from tests.oracle import by_hand, checkpoint
from tests.oracle.hf import FAMILIES, MOE_FAMILIES, hf_logits, sample_tokens
from tests.oracle.hf_kinds import KINDS
from tests.oracle.pool import MegatronPool

HFModel = Callable[..., Path]
TOKENS = sample_tokens()
VOCABULARY = 199
IMPLS = ("local", "transformer_engine")
ORIGINAL = (
    *("model_type", "num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size"),
    *("position_embedding_type", "swiglu", "linear_bias", "output_layer"),
)


def flat(source: Path, target: Path, **options: Any) -> Path:
    run(HFSource(source), FlatTarget(target, MegatronOptions(ckpt_format="model_pt", **options)))
    return target


def state_of(folder: Path) -> dict[str, Any]:
    """Content of model.pt, read by torch, which accepts nothing but tensors and containers."""
    state: dict[str, Any] = torch.load(folder / "model.pt", weights_only=True)
    return state


def weights(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if not key.endswith("_extra_state")}


def metadata(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metadata.json").read_text())
    return found


def edit(folder: Path, **changes: Any) -> None:
    (folder / "metadata.json").write_text(json.dumps({**metadata(folder), **changes}))


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def only_original(folder: Path) -> None:
    """Leave in the metadata what Model Converter Tool writes."""
    kept = {key: value for key, value in metadata(folder).items() if key in ORIGINAL}
    (folder / "metadata.json").write_text(json.dumps({**kept, "model_type": "GPT", "output_layer": True}))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("family", ["llama3", "qwen2-tied", "qwen3", "mixtral"])
def test_torch_loads_what_a_conversion_by_hand_has(hf_model: HFModel, tmp_path: Path, family: str, impl: str) -> None:
    folder = hf_model(family)
    ours = state_of(flat(folder, tmp_path / "flat", impl=impl, expert_layout="sequential" if "mix" in family else None))
    by = by_hand.convert(folder, tmp_path / "by_hand", impl=impl, moe_layer_freq=1, make_vocab_size_divisible_by=128)
    theirs = rank_content(by)["model"]
    assert type(ours) is OrderedDict
    same_tensors(weights(ours), weights(theirs))
    assert all(value is None for key, value in ours.items() if key.endswith("_extra_state"))


@pytest.fixture(scope="module")
def plain_pool() -> Iterator[Pool]:
    """A process with megatron-core alone: beside Transformer Engine, the final norm of local layers has an extra state."""
    with Pool(1, megatron._setup, 120.0, PRELOADED) as pool:
        yield pool


def load_and_run(folder: Path, args: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    """In a process of a pool: logits of a real GPTModel of these args that has loaded model.pt."""
    from megatron_converters.logits import cpu, gpt

    cpu.cut(1, 1, 1, 1)
    state = torch.load(folder / "model.pt", weights_only=True)
    if args["transformer_impl"] == "local":
        (model,) = gpt.build(Namespace(**args))
        model.load_state_dict(state, strict=True)
    else:
        from tests.oracle import megatron

        (model,) = megatron.build(Namespace(**args))
        fault = megatron.load(
            model, state, "model.pt"
        )  # norms have an extra state in some releases of Transformer Engine
        assert fault is None, fault
    logits = gpt.run([model], tokens)
    assert logits is not None
    return logits.clone()


CASES = [
    *((family, impl, "float32") for family in ("llama3.1", "mistral-window", "qwen2-tied", "qwen3") for impl in IMPLS),
    *(("llama-bias", "local", "float32"), ("llama2", "local", "bfloat16"), ("qwen3-moe", "local", "bfloat16")),
    *((family, impl, "float32") for family in ("mixtral", "qwen2-moe") for impl in IMPLS),
    ("qwen3-moe-dense-layers", "local", "float32"),
]


@pytest.mark.parametrize(("family", "impl", "dtype"), CASES, ids=str)
def test_megatron_loads_it_strictly_and_computes_what_transformers_computes(
    megatron_pool: MegatronPool,
    plain_pool: Pool,
    hf_model: HFModel,
    tmp_path: Path,
    family: str,
    impl: str,
    dtype: str,
) -> None:
    """The model is built from the JSON of metadata.json alone."""
    folder = hf_model(family, dtype=dtype)
    out = flat(folder, tmp_path / "flat", impl=impl)
    assert {value.dtype for value in weights(state_of(out)).values()} == {getattr(torch, dtype)}
    found = metadata(out)["args"]
    assert found["transformer_impl"] == impl
    pool = plain_pool if impl == "local" else megatron_pool
    (got, *_) = pool.run(load_and_run, out, found, TOKENS)
    wanted = hf_logits(folder, TOKENS)
    assert float((got[..., :VOCABULARY] - wanted).abs().max() / wanted.abs().max()) < 1e-5


@pytest.mark.parametrize("family", [*FAMILIES, *MOE_FAMILIES, *KINDS])
def test_the_way_back_is_exact(hf_model: HFModel, tmp_path: Path, family: str) -> None:
    folder = hf_model(family)
    out = flat(folder, tmp_path / "flat", allow_inexpressible=True)
    back = megatron_to_hf(out, tmp_path / "hf")
    same_tensors(hf_tensors(folder), hf_tensors(back))
    assert config(folder) == config(back)
    generation = "generation_config.json"
    assert (folder / generation).exists() == (back / generation).exists()


@pytest.mark.parametrize("family", ["llama3.2-tied", "qwen3-moe"])
def test_from_and_to_the_other_formats(hf_model: HFModel, tmp_path: Path, family: str) -> None:
    """Sizes of the source are not taken over, and what comes of a flat model is what comes of the folder itself."""
    folder = hf_model(family)
    direct = state_of(flat(folder, tmp_path / "direct"))
    moe = {"ep": 2} if "moe" in family else {}
    cut = hf_to_megatron(folder, tmp_path / "cut", tp=2, pp=2, **moe)
    spread = hf_to_torch_dist(folder, tmp_path / "spread", tp=2, **moe)
    for number, source in enumerate((cut, spread)):
        run(open_megatron(source), FlatTarget(tmp_path / str(number), MegatronOptions()))
        same_tensors(weights(state_of(tmp_path / str(number))), weights(direct))
    again = reshard(tmp_path / "direct", tmp_path / "again", tp=2, pp=2, **moe)
    for path in sorted((cut / "iter_0000001").glob("*/*.pt")):
        ours, theirs = (checkpoint.load_rank(root / path.relative_to(cut))["model"] for root in (again, cut))
        same_tensors(weights(ours), weights(theirs))


def test_the_metadata(hf_model: HFModel, tmp_path: Path) -> None:
    out = flat(hf_model("llama3.1", dtype="bfloat16"), tmp_path / "flat", divisor=64)
    found = metadata(out)
    assert tuple(found)[:10] == ORIGINAL
    assert {key: found[key] for key in ORIGINAL} == {
        "model_type": "llama",
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "max_position_embeddings": 131072,
        "vocab_size": 199,
        "position_embedding_type": "rope",
        "swiglu": True,
        "linear_bias": False,
        "output_layer": True,
    }
    assert (found["format"], found["format_version"], found["hf_files"]) == ("megatron-converters", 1, [])
    sizes = [found[key] for key in ("num_query_groups", "ffn_hidden_size", "kv_channels", "true_vocab_size")]
    assert sizes == [4, 112, 32, 199]
    assert (found["padded_vocab_size"], found["dtype"], found["tie_word_embeddings"]) == (256, "bfloat16", False)
    assert (found["norm_epsilon"], found["rotary_base"], found["rope_scaling"]["factor"]) == (1e-5, 5e5, 8.0)
    args = found["args"]
    assert (args["params_dtype"], args["ckpt_format"]) == ("torch.bfloat16", "torch")
    assert args["hf_config"] == config(hf_model("llama3.1", dtype="bfloat16"))
    assert not metadata(flat(hf_model("qwen2-tied"), tmp_path / "tied"))["output_layer"]
    assert sorted(path.name for path in out.iterdir()) == [
        *("conversion.json", "metadata.json", "model.pt", "pretrain_gpt_flags.txt")
    ]


def test_the_command_lines(hf_model: HFModel, tmp_path: Path) -> None:
    folder, out, saved = hf_model("llama2"), tmp_path / "flat", tmp_path / "saved"
    command = ("convert", folder, out, "--ckpt-format", "model_pt")
    assert "model.pt" in succeeded(verb("plan", *command[1:])).out
    assert "27 tensors as model.pt" in succeeded(verb(*command)).out
    assert "is complete already" in succeeded(verb(*command)).out
    assert "is complete already" in succeeded(verb("plan", *command[1:])).out
    options = ("--load-dir", folder, "--save-dir", saved, "--ckpt-format", "model_pt")
    succeeded(convert(*options, "--saver-transformer-impl", "transformer_engine"))
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in state_of(saved)
    shown = succeeded(verb("inspect", out)).out
    for words in ("Megatron-LM, model_pt", "local layers (local)", "model.pt       27"):
        assert words in shown
    told = json.loads(succeeded(verb("inspect", saved, "--json")).out)
    assert (told["checkpoint_format"], told["names"]) == ("model_pt", "transformer_engine")
    assert told["parallel"]["tensor"] == 1
    succeeded(verb("inspect", out, "--html", tmp_path / "page.html"))
    flags = succeeded(verb("args", out)).out
    assert "--num-query-groups 4" in flags and "--transformer-impl local" in flags and "--ckpt-format" not in flags
    assert (out / "pretrain_gpt_flags.txt").read_text().startswith("--num-layers 4")
    assert "INTACT" in succeeded(verb("verify", out)).out
    for other in (folder, saved):
        assert "EQUAL" in succeeded(verb("verify", out, other)).out
    assert "EQUAL" in succeeded(verb("diff", folder, out)).out


@pytest.mark.usefixtures("preloaded")
def test_verify_runs_it(hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_model("mixtral")
    out = flat(folder, tmp_path / "flat", impl="transformer_engine")
    assert "logits agree" in succeeded(verb("verify", folder, out, "--logits", "--length", "16")).out


def test_a_check_of_the_output_finds_what_has_changed(hf_model: HFModel, tmp_path: Path) -> None:
    out = flat(hf_model("llama2"), tmp_path / "flat")
    assert not check_output(out, Silent()).faults
    state = state_of(out)
    state["decoder.layers.1.mlp.linear_fc2.weight"][3, 4] += 1
    torch.save(state, out / "model.pt")
    edit(out, num_layers=5)
    faults = [str(fault) for fault in check_output(out, Silent()).faults]
    assert any("decoder.layers.1.mlp.linear_fc2.weight (" in fault for fault in faults)
    assert "metadata.json has changed since it was written" in faults
    assert not any("layers.2" in fault for fault in faults)


def test_metadata_of_model_converter_tool_needs_a_reference(hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_model("llama2")
    out = flat(folder, tmp_path / "flat")
    only_original(out)
    told = refused(
        verb("convert", out, tmp_path / "hf"), "metadata.json does not describe the model", "--hf-config DIR"
    )
    for missing in ("num_query_groups", "ffn_hidden_size", "norm_epsilon", "rotary_base"):
        assert missing in told.err
    nothing_complete(tmp_path / "hf")
    done = succeeded(verb("convert", out, tmp_path / "hf", "--hf-config", folder))
    assert "leaves norms and output layer of model.pt as they were initialised" in done.err
    same_tensors(hf_tensors(folder), hf_tensors(tmp_path / "hf"))
    edit(out, hidden_size=128)
    refused(verb("convert", out, tmp_path / "b", "--hf-config", folder), "hidden_size 128, but", str(folder), " 64;")
    edit(out, hidden_size=64, vocab_size=256)
    done = succeeded(verb("convert", out, tmp_path / "c", "--hf-config", folder))
    assert "vocab_size: 199, not 256" in done.out


def test_without_metadata_a_reference_describes_it(hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_model("qwen2-tied")
    out = flat(folder, tmp_path / "flat")
    (out / "metadata.json").unlink()
    refused(verb("convert", out, tmp_path / "hf"), "has no metadata.json", "--hf-config DIR")
    succeeded(verb("convert", out, tmp_path / "hf", "--hf-config", folder))
    same_tensors(hf_tensors(folder), hf_tensors(tmp_path / "hf"))


def test_a_rank_file_under_this_name_is_read_if_it_is_whole(hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_model("llama2")
    for tp in (1, 2):
        root = hf_to_megatron(folder, tmp_path / f"tp{tp}", tp=tp)
        (tmp_path / str(tp)).mkdir()
        shutil.copyfile(root / "iter_0000001/mp_rank_00/model_optim_rng.pt", tmp_path / str(tp) / "model.pt")
    same_tensors(hf_tensors(folder), hf_tensors(megatron_to_hf(tmp_path / "1", tmp_path / "hf")))
    with pytest.raises(ConversionError, match=r"one rank's share of a model with tp=2 by its args"):
        open_megatron(tmp_path / "2")


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "groups": ({"num_query_groups": 2}, "num_query_groups 2, but its args and tensors 4;"),
    "hidden": ({"hidden_size": 128}, "hidden_size 128, but its args and tensors 64;"),
    "layers": ({"num_layers": 5}, "num_layers 5, but its args and tensors 4;"),
    "rows": ({"padded_vocab_size": 512}, "padded_vocab_size 512, but its args and tensors 256;"),
    "dtype": ({"dtype": "bfloat16"}, "dtype bfloat16, but its args and tensors float32;"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings True, but its args and tensors False;"),
    "version": ({"format_version": 2}, "format_version 2, and only version 1 can be read"),
}


@pytest.mark.parametrize(("changes", "words"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_metadata_that_contradicts_itself(
    hf_model: HFModel, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    out = flat(hf_model("llama2"), tmp_path / "flat")
    edit(out, **changes)
    told = refused(verb("convert", out, tmp_path / "hf"), out / "metadata.json", words)
    assert len(told.err.splitlines()) == 1
    nothing_complete(tmp_path / "hf")


def test_metadata_that_contradicts_the_shapes(hf_model: HFModel, tmp_path: Path) -> None:
    out = flat(hf_model("llama2"), tmp_path / "flat")
    args = metadata(out)["args"]
    args["hf_config"]["num_key_value_heads"] = 2
    edit(out, num_query_groups=2, args={**args, "num_query_groups": 2})
    refused(
        verb("convert", out, tmp_path / "hf"),
        "model.pt: decoder.layers.0.self_attention.linear_qkv.weight",
        "has shape [128, 64]; the args require [96, 64]",
    )
    nothing_complete(tmp_path / "hf")


def test_tensors_that_are_missing_or_too_many(hf_model: HFModel, tmp_path: Path) -> None:
    out = flat(hf_model("llama2"), tmp_path / "flat")
    state = state_of(out)
    lost = state.pop("decoder.layers.3.mlp.linear_fc1.weight")
    torch.save({**state, "decoder.layers.4.mlp.linear_fc1.weight": lost}, out / "model.pt")
    refused(
        verb("convert", out, tmp_path / "hf"),
        "decoder.layers.3.mlp.linear_fc1.weight is missing",
        "model.pt: decoder.layers.4.mlp.linear_fc1.weight is not a tensor of this model",
    )
    torch.save({"state_dict": state}, out / "model.pt")
    refused(verb("convert", out, tmp_path / "hf"), "model entries that are not named tensors: state_dict")
    torch.save([1], out / "model.pt")
    refused(verb("convert", out, tmp_path / "hf"), "model.pt holds a list, not a state dict")
    nothing_complete(tmp_path / "hf")


def test_a_file_that_is_cut_short(hf_model: HFModel, tmp_path: Path) -> None:
    out = flat(hf_model("llama2"), tmp_path / "flat")
    content = (out / "model.pt").read_bytes()
    (out / "model.pt").write_bytes(content[: len(content) // 2])
    told = refused(verb("convert", out, tmp_path / "hf"), out / "model.pt")
    assert len(told.err.splitlines()) == 1
    (out / "model.pt").unlink()
    refused(verb("convert", out, tmp_path / "hf"), "no known format", "model.pt", code=2)
    nothing_complete(tmp_path / "hf")


@pytest.mark.parametrize("option", ["--tp", "--pp"])
def test_sizes_are_refused(hf_model: HFModel, tmp_path: Path, option: str) -> None:
    command = ("convert", hf_model("llama2"), tmp_path / "flat", "--ckpt-format", "model_pt")
    refused(verb(*command, option, "2"), f"{option} 2: model.pt holds the whole model", "--ckpt-format torch", code=2)
    refused(verb(*command, "--decoder-first-pipeline-num-layers", "2"), "options of pipeline stages", code=2)
    refused(verb(*command, "--release"), "--release: model.pt lies in no folder of an iteration", code=2)
    assert not (tmp_path / "flat").exists()
    with pytest.raises(UsageError, match="--ep 2"):
        flat(hf_model("mixtral"), tmp_path / "flat", ep=2)
    succeeded(verb(*command, option, "1"))


def test_what_is_there_is_replaced_only_if_asked_for(hf_model: HFModel, tmp_path: Path) -> None:
    out = flat(hf_model("llama2"), tmp_path / "flat")
    before = (out / "model.pt").read_bytes()
    with pytest.raises(ConversionError, match=r"already holds files of a model \(metadata.json, model.pt"):
        flat(hf_model("qwen2"), out)
    assert (out / "model.pt").read_bytes() == before
    (out / "hf_files").mkdir()
    (out / "hf_files/modeling_old.py").write_text("old")
    flat(hf_model("qwen2"), out, overwrite=True)
    assert not (out / "hf_files").exists() and metadata(out)["model_type"] == "qwen2"
    with pytest.raises(ConversionError, match=r"holds a model of another format \(model.pt\)"):
        hf_to_megatron(hf_model("llama2"), out, overwrite=True)
    for other in (hf_to_torch_dist(hf_model("llama2"), tmp_path / "dist") / "iter_0000001", tmp_path / "dist"):
        with pytest.raises(ConversionError, match="holds a model of another format"):
            flat(hf_model("llama2"), other, overwrite=True)


KILLED_BEFORE = """
import os, signal
real = os.replace
def replace(source, target, **more):
    if os.path.basename(target) == {name!r} and "incomplete" not in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(source, target, **more)
os.replace = replace
"""


@pytest.mark.parametrize("name", ["model.pt", "metadata.json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_while_the_files_are_shown(hf_model: HFModel, tmp_path: Path, name: str, overwrite: bool) -> None:
    from megatron_converters.cli import main

    out, command = (
        tmp_path / "out",
        ["convert", str(hf_model("llama2")), str(tmp_path / "out"), "--ckpt-format", "model_pt"],
    )
    if overwrite:
        flat(hf_model("qwen2"), out)
        command.append("--overwrite")

    def call() -> None:
        exec(KILLED_BEFORE.format(name=name), {})
        main.main(command)

    assert forked(call).code == -signal.SIGKILL
    assert not (out / "metadata.json").exists()
    refused(verb("convert", out, tmp_path / "hf"), "unfinished conversion", code=2 if name == "model.pt" else 1)
    succeeded(verb(*command))
    whole = flat(hf_model("llama2"), tmp_path / "whole")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


def test_a_reference_beside_complete_metadata(hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_model("llama2")
    out = flat(folder, tmp_path / "flat")
    run(open_megatron(out, MegatronReadOptions(hf_config=folder)), HFTarget(tmp_path / "hf", HFOptions()))
    assert different(hf_tensors(folder), hf_tensors(tmp_path / "hf")) == []
    with pytest.raises(ConversionError, match=r"max_position|num_layers 4, but .* 2;"):
        open_megatron(out, MegatronReadOptions(hf_config=hf_model("llama2", num_hidden_layers=2)))

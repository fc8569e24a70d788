"""Options that name what is not there, or is of another model: one line each, with the cause first and the right remedy."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_converters.assets.tokenizer import write_tokenizer
from megatron_converters.cli import queue_convert
from megatron_converters.cli.options.reading import open_hf_source
from tests.helpers import args_of, convert, convert_back, edit_rank, refused, succeeded, tp_pp_converter, verb

HFModel = Callable[..., Path]
MARGS = "source_megatron_args.json"


@pytest.fixture(scope="module")
def small(hf_model: HFModel) -> Path:
    return hf_model("llama2", num_hidden_layers=1)


# --- --source-margs-file


def test_a_model_from_the_hub_has_no_training_arguments(small: Path, tmp_path: Path) -> None:
    run = convert("--load-dir", small, "--save-dir", tmp_path / "out", "--source-margs-file", small / MARGS)
    refused(
        run,
        f"--source-margs-file {small / MARGS} does not exist",
        "leave the option out for a model from elsewhere",
        code=2,
    )
    first, second = run.err.splitlines()
    assert first.startswith("loader: error: ") and second.startswith("saver: error: ")  # the cause, then what follows
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (".", f"is a folder; name the file in it, such as {MARGS}"),
        ("config.json", "is a configuration of Hugging Face"),
    ],
)
def test_what_is_no_file_of_training_arguments(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.chdir(small)
    for command in (("convert", small, tmp_path / "out", "--tp", 1), ("inspect", small)):
        refused(verb(*command, "--source-margs-file", name), words, code=2)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"num_layers": 80, "hidden_size": 8192}, "num_layers 80, here 1; hidden_size 8192, here 64"),
        ({"num_experts": 8}, "num_experts 8, here None"),
        ({"qk_layernorm": True}, "qk_layernorm True, here False"),
        ({"hf_config": {"model_type": "qwen2"}}, "model_type qwen2, here llama"),
        (
            {"normalization": "LayerNorm", "swiglu": False},
            "normalization LayerNorm, here RMSNorm; swiglu False, here True",
        ),
        (
            {"num_layers": 1, "num_experts": None, "normalization": "RMSNorm", "swiglu": True, "num_query_groups": 99},
            None,
        ),
    ],
)
def test_arguments_of_another_model_are_a_warning(
    small: Path, tmp_path: Path, args: dict[str, object], words: str | None
) -> None:
    margs = tmp_path / "margs.json"
    margs.write_text(json.dumps({**args, "lr": 1e-3}))
    run = succeeded(verb("convert", small, tmp_path / "out", "--source-margs-file", margs))
    if words is None:
        assert "another model" not in run.err
    else:
        assert (
            f"warning: {margs} is of another model ({words}), of which only training arguments are taken over"
            in run.err
        )
    written = args_of(tmp_path / "out")
    assert (written.num_layers, written.hidden_size, written.num_experts, written.lr) == (1, 64, None, 1e-3)


def test_arguments_of_the_model_itself_are_silent(small: Path, tmp_path: Path) -> None:
    succeeded(verb("convert", small, tmp_path / "meg", "--dtype", "bf16", "--tp", 2, "--quiet"))
    succeeded(verb("convert", tmp_path / "meg", tmp_path / "hf", "--quiet"))
    run = verb(
        "convert",
        tmp_path / "hf",
        tmp_path / "again",
        "--source-margs-file",
        tmp_path / "hf" / MARGS,
        "--dtype",
        "fp32",
    )
    assert "warning" not in succeeded(run).err


# --- --model-size, --loader, --tokenizer-model of stock command lines


@pytest.mark.parametrize(
    ("size", "warned"), [("llama3-70B", True), ("llama2-7Bf", True), ("llama3", False), ("llama-0.00006B", False)]
)
def test_a_model_of_another_size(small: Path, tmp_path: Path, size: str, warned: bool) -> None:
    run = succeeded(convert("--load-dir", small, "--save-dir", tmp_path / "out", "--model-size", size))
    assert (f"warning: --model-size {size} is not this model, which has" in run.err) == warned


@pytest.mark.parametrize(
    ("loader", "family", "note"),
    [
        ("mixtral_hf", "llama2", "the loader mixtral_hf reads a model without experts, llama"),
        ("llama_mistral", "mixtral", "the loader llama_mistral reads a mixture of experts, mixtral"),
        ("mixtral_hf", "mixtral", ""),
        ("hf", "mixtral", ""),
    ],
)
def test_a_loader_for_other_models(hf_model: HFModel, tmp_path: Path, loader: str, family: str, note: str) -> None:
    source = hf_model(family, num_hidden_layers=1)
    parser = queue_convert.parser(queue_convert.load_plugin("loader", loader))
    args = parser.parse_args(["--loader", loader, "--load-dir", str(source), "--save-dir", str(tmp_path)])
    notes = open_hf_source(args).origin.notes
    assert [line.partition(", as --loader hf does")[0] for line in notes] == ([note] if note else [])


def test_a_vocabulary_that_is_not_there(small: Path, tmp_path: Path) -> None:
    run = convert("--loader", "core", "--load-dir", small, "--save-dir", tmp_path / "out", "--vocab-file", "/no/v.json")
    refused(run, "loader: error: /no/v.json does not exist; give a folder or file that does", code=2)


@pytest.mark.parametrize("name", ["/no/such", "gone/tokenizer.model", "gone/tokenizer.json", "~nobody/else/at all"])
def test_a_tokenizer_that_is_nowhere_is_refused_at_once(small: Path, tmp_path: Path, name: str) -> None:
    run = convert("--load-dir", small, "--save-dir", tmp_path / "out", "--tokenizer-model", name)
    refused(run, f"--tokenizer-model {name} does not exist", code=2)
    assert "loading" not in run.out and not (tmp_path / "out").exists()


# --- --hf-config that was given already


def test_nobody_is_told_to_give_the_reference_that_is_there(small: Path, tmp_path: Path) -> None:
    meg = tmp_path / "meg"
    succeeded(verb("convert", small, meg, "--quiet"))
    args = args_of(meg)
    del args.num_attention_heads, args.hf_config
    edit_rank(meg, "mp_rank_00", args=args)
    run = succeeded(verb("convert", meg, tmp_path / "out", "--hf-config", small))
    assert (
        f"taken from {small} where the args do not say it: the checkpoint's args have no valid num_attention_heads"
        in run.out
    )
    assert "with --hf-config" not in run.out + run.err
    refused(
        verb("convert", meg, tmp_path / "none"),
        "no valid num_attention_heads; give a reference model with --hf-config DIR",
    )


def test_a_reference_without_a_configuration(small: Path, tmp_path: Path) -> None:
    weights = shutil.copy(small / "model.safetensors", tmp_path / "weights.safetensors")
    (tmp_path / "empty").mkdir()
    run = refused(
        verb("inspect", weights, "--hf-config", tmp_path / "empty"), "has no config.json", "that has one", code=2
    )
    assert "with --hf-config" not in run.err
    refused(verb("inspect", weights), "give the folder of a reference model with --hf-config DIR", code=2)


def test_multipliers_of_a_reference_without_any(small: Path, tmp_path: Path) -> None:
    succeeded(verb("convert", small, tmp_path / "meg", "--quiet"))
    run = refused(
        verb("inspect", tmp_path / "meg", "--hf-config", small, "--mup", "fold"), "without multipliers", code=2
    )
    assert "or give another configuration" in run.err


# --- without torch


def test_conversions_and_casts_need_no_torch(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    succeeded(verb("convert", small, tmp_path / "meg", "--tp", 2))
    succeeded(convert_back("--load-path", tmp_path / "meg", "--save-path", tmp_path / "hf"))
    succeeded(verb("verify", small, tmp_path / "hf"))
    for dtype in ("bf16", "fp16"):
        succeeded(verb("plan", tmp_path / "meg", tmp_path / dtype, "--dtype", dtype))
        run = tp_pp_converter("--in_dir", tmp_path / "meg", "--save_path", tmp_path / f"{dtype}.pt", "--dtype", dtype)
        succeeded(run)
    run = verb("verify", small, tmp_path / "meg", "--logits")
    assert run.code != 0 and "computing logits needs torch, which is not installed" in run.err


# --- what was done, or not done, is said


@pytest.mark.parametrize("json_too", [False, True])
def test_a_page_that_was_written_is_said(small: Path, tmp_path: Path, json_too: bool) -> None:
    page = tmp_path / "page.html"
    run = succeeded(verb("inspect", small, "--html", page, *(["--json"] if json_too else [])))
    assert run.err == f"wrote the page {page}\n" and page.exists()
    assert not json_too or json.loads(run.out)["format"] == "hf"


def test_instruct_that_changes_no_tokenizer_says_so(tmp_path: Path) -> None:
    named = tmp_path / "tokenizer.json"
    named.write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}))
    out = tmp_path / "out"
    out.mkdir()
    *_, note = write_tokenizer(named, out, vocab_size=4, instruct=True)
    assert note.startswith("warning: --instruct leaves this tokenizer as it is")
    assert not any("--instruct" in note for note in write_tokenizer(named, out, vocab_size=4))
    ranks = tmp_path / "ranks"
    ranks.write_bytes(b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)))
    assert not any("--instruct" in note for note in write_tokenizer(ranks, out, vocab_size=999, instruct=True))


def test_instruct_of_a_model_without_settings_says_so(hf_model: HFModel, tmp_path: Path) -> None:
    source = shutil.copytree(hf_model("qwen2", num_hidden_layers=1), tmp_path / "hf")
    (source / "generation_config.json").write_text('{"temperature": 0.9}')
    run = succeeded(verb("convert", source, tmp_path / "out", "--to", "hf", "--instruct"))
    assert (
        "warning: --instruct knows no end tokens and sampling of this qwen2 model; those that came with it are written"
        in run.err
    )
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"temperature": 0.9}

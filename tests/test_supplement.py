"""A tokenizer that is named after a conversion: written beside finished weights, which stay, whatever happens in between."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_converters.conversion import supplement
from megatron_converters.conversion.staging import Staging
from tests.helpers import convert_back, refused, succeeded, verb

HFModel = Callable[..., Path]
MARKERS = {"hf": "config.json", "mindspore": "param_name_map.json"}


def tokenizer(folder: Path, size: int = 5, template: str | None = None) -> Path:
    folder.mkdir()
    vocab = {"<s>": 0, "</s>": 1, **{f"t{number}": number for number in range(2, size)}}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab, "merges": []}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    if template is not None:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tools.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def source(hf_model: HFModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that records neither a tokenizer nor a configuration."""
    folder = tmp_path_factory.mktemp("supplement")
    bare = folder / "bare"
    shutil.copytree(hf_model("llama2", num_hidden_layers=1), bare)
    checkpoint = folder / "megatron"
    succeeded(verb("convert", bare, checkpoint, "--ckpt-format", "model_pt", "--quiet"))
    metadata = next(checkpoint.rglob("metadata.json"))
    described = json.loads(metadata.read_text())
    for key in ("hf_config", "hf_generation_config", "tokenizer_model"):
        described["args"].pop(key, None)
    metadata.write_text(json.dumps(described))
    return checkpoint


def weights(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each file of weights."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.safetensors")}


def same_files(folder: Path, other: Path) -> None:
    for path in other.rglob("*"):
        if path.is_file():
            assert (folder / path.relative_to(other)).read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize("to", sorted(MARKERS))
def test_it_is_written_beside_the_weights(source: Path, tmp_path: Path, to: str) -> None:
    out, named = tmp_path / "out", tokenizer(tmp_path / "tokenizer", template="{{ messages }}")
    command = ("convert", source, out, "--to", to)
    first = succeeded(verb(*command))
    assert "the same command with --tokenizer-model PATH writes one beside the weights" in first.err
    before = weights(out)
    assert before
    planned = succeeded(verb("plan", *command[1:], "--tokenizer-model", named, "--no-measure"))
    assert "the command writes the tokenizer beside them, and nothing else" in planned.out
    assert "disk    0 B needed" in planned.out and weights(out) == before
    run = succeeded(verb(*command, "--tokenizer-model", named))
    assert (
        "wrote additional_chat_templates/tools.jinja, tokenizer.json, tokenizer_config.json beside the finished"
        in run.out
    )
    assert weights(out) == before
    same_files(out, named)
    if to == "hf":
        assert json.loads((out / "config.json").read_text())["eos_token_id"] == 1
    manifest = json.loads((out / "conversion.json").read_text())
    assert manifest["options"]["tokenizer"] == str(named) and "tokenizer.json" in manifest["beside"]
    assert succeeded(verb("verify", out)).out.startswith("INTACT")
    assert not list(out.glob(".*"))
    # The result is what one conversion would have written.
    once = tmp_path / "once"
    succeeded(verb("convert", source, once, "--to", to, "--tokenizer-model", named))
    same_files(out, once)
    for again in (("--tokenizer-model", named), ()):  # a job that is put back into the queue takes nothing away
        assert "is complete already" in succeeded(verb(*command, *again)).out
        same_files(out, once)


def test_another_one_replaces_it_in_full(source: Path, tmp_path: Path) -> None:
    out, one, two = tmp_path / "out", tokenizer(tmp_path / "one", template="x"), tokenizer(tmp_path / "two", size=7)
    for named in (one, two):
        succeeded(verb("convert", source, out, "--tokenizer-model", named))
    same_files(out, two)
    assert not (out / "additional_chat_templates" / "tools.jinja").exists()
    assert succeeded(verb("verify", out)).out.startswith("INTACT")


def test_habana_s_command_line_does_it_too(source: Path, tmp_path: Path) -> None:
    out, named = tmp_path / "out", tokenizer(tmp_path / "tokenizer")
    for options in ((), ("--tokenizer-model", named)):
        run = succeeded(convert_back("--load-path", source, "--save-path", out, *options))
    assert "beside the finished weights" in run.out
    same_files(out, named)


def test_one_that_is_found_now_is_written(source: Path, tmp_path: Path) -> None:
    """The checkpoint names a tokenizer that was not there yet."""
    checkpoint, out = shutil.copytree(source, tmp_path / "megatron"), tmp_path / "out"
    metadata = next(checkpoint.rglob("metadata.json"))
    described = json.loads(metadata.read_text())
    described["args"]["tokenizer_model"] = str(tmp_path / "tokenizer")
    metadata.write_text(json.dumps(described))
    succeeded(verb("convert", checkpoint, out))
    assert "is complete already" in succeeded(verb("convert", checkpoint, out)).out
    tokenizer(tmp_path / "tokenizer", size=500)  # of another model
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert "is complete already" in succeeded(verb("convert", checkpoint, out)).out
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    shutil.rmtree(tmp_path / "tokenizer")
    named = tokenizer(tmp_path / "tokenizer")
    assert "beside the finished weights" in succeeded(verb("convert", checkpoint, out)).out
    same_files(out, named)
    assert succeeded(verb("verify", out)).out.startswith("INTACT")


def test_what_does_not_fit_leaves_all_as_it_was(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeeded(verb("convert", source, out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    large = tokenizer(tmp_path / "large", size=500)
    for named, words in ((large, "500 tokens"), ("/no/such", "does not exist"), (source, "holds none")):
        run = verb("convert", source, out, "--tokenizer-model", named)
        assert run.code in (1, 2) and words in run.err, run
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("edited", ["config.json", "tokenizer.json"])
def test_what_a_user_has_put_there_is_kept(source: Path, tmp_path: Path, edited: str) -> None:
    out, named = tmp_path / "out", tokenizer(tmp_path / "tokenizer")
    succeeded(verb("convert", source, out))
    (out / edited).write_text('{"mine": 1}')
    refused(verb("convert", source, out, "--tokenizer-model", named), edited, "--overwrite")
    assert (out / edited).read_text() == '{"mine": 1}' and not (out / "tokenizer_config.json").exists()
    succeeded(verb("convert", source, out, "--tokenizer-model", named, "--overwrite"))
    same_files(out, named)


@pytest.mark.parametrize("change", ["weights", "source", "options"])
def test_another_run_is_still_refused(source: Path, tmp_path: Path, change: str) -> None:
    checkpoint, out, named = (
        shutil.copytree(source, tmp_path / "in"),
        tmp_path / "out",
        tokenizer(tmp_path / "tokenizer"),
    )
    succeeded(verb("convert", checkpoint, out))
    if change == "weights":
        with open(next(out.glob("*.safetensors")), "ab") as file:
            file.write(b"x")
    elif change == "source":
        os.utime(next(checkpoint.rglob("model.pt")))
    options = ("--dtype", "fp16") if change == "options" else ()
    run = verb("convert", checkpoint, out, "--tokenizer-model", named, *options)
    refused(run, "already holds a model", "--overwrite")
    assert not (out / "tokenizer.json").exists()


@pytest.mark.parametrize("moved", range(5))
def test_a_kill_in_between_leaves_nothing_that_looks_complete(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    out, old, new = tmp_path / "out", tokenizer(tmp_path / "old"), tokenizer(tmp_path / "new", size=9, template="x")
    succeeded(verb("convert", source, out, "--tokenizer-model", old))
    before, left = weights(out), [moved]

    def replace(*paths: Any) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        os.replace(*paths)

    command = ("convert", source, out, "--tokenizer-model", new)
    with monkeypatch.context() as patched:
        patched.setattr(supplement, "os", SimpleNamespace(replace=replace))
        if moved % 2:  # as after SIGKILL, which leaves the hidden folder
            patched.setattr(Staging, "discard", Staging.leave)
        assert verb(*command).code == 130
    assert not (out / "config.json").exists() and weights(out) == before
    assert verb("inspect", out).code != 0 and bool(list(out.glob(".*.incomplete"))) == bool(moved % 2)
    assert "beside the finished weights" in succeeded(verb(*command)).out
    assert weights(out) == before
    same_files(out, new)
    assert succeeded(verb("verify", out)).out.startswith("INTACT") and not list(out.glob(".*"))


def test_a_checkpoint_records_it_in_its_files(hf_model: HFModel, tmp_path: Path) -> None:
    source, out, named = hf_model("llama2", num_hidden_layers=1), tmp_path / "out", tokenizer(tmp_path / "tokenizer")
    refused(
        verb("convert", source, out, "--tokenizer-model", "/no/such"),
        "--tokenizer-model /no/such does not exist",
        code=2,
    )
    refused(verb("convert", source, out, "--tokenizer-model", "gone/tokenizer.model"), "does not exist", code=2)
    assert not out.exists()
    run = succeeded(verb("convert", source, out, "--tokenizer-model", "some/model"))
    assert "some/model is recorded as a name on the Hugging Face Hub, since there is no such path here" in run.out
    empty = verb("convert", source, tmp_path / "other", "--tokenizer-model", tmp_path)
    assert f"warning: {tmp_path} holds no tokenizer, and is recorded all the same" in succeeded(empty).err
    refused(verb("convert", source, out, "--tokenizer-model", named), "already exists", "to change the tokenizer alone")

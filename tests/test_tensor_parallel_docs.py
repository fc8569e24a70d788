"""docs/tensor-parallel.md is true: its blocks and commands run, with paths substituted, and give the models' weights."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_converters as mc
from megatron_converters.tensor_parallel.presets import PRESETS
from tests.bare import left_in, tree
from tests.command_blocks import blocks, run
from tests.helpers import ROOT, hf_tensors
from tests.oracle.hf import make_model
from tests.test_docs import _HEADING, _LINK, anchor, python_blocks

PAGE = "docs/tensor-parallel.md"
TEXT = (ROOT / PAGE).read_text()
VOCABULARY = 199
#: What the page's paths name: layers, query heads, KV heads, tp and pp of a model.
MODELS = {
    "/path/to/megatron/checkpoint": (32, 32, 8, 2, 1),
    "/path/to/minicpm_8b_checkpoint": (32, 32, 2, 2, 1),
    "/path/to/llama_7b_checkpoint": (32, 32, 32, 1, 2),
    "/path/to/checkpoint": (32, 32, 8, 2, 2),
}
#: By what the page's blocks write, what they convert.
OUTPUTS = {
    "output.pt": "/path/to/checkpoint",
    "output/hf_weights.pt": "/path/to/megatron/checkpoint",
    "output/minicpm_8b_hf.pt": "/path/to/minicpm_8b_checkpoint",
    "output/llama_7b_hf.pt": "/path/to/llama_7b_checkpoint",
}
LARGE = (80, 64, 8, 8, 4)
BLOCKS = python_blocks(PAGE)
COMMANDS = blocks(TEXT, "bash")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Function that makes a model and its tree of rank files without args, once for the same numbers."""
    known: dict[Any, tuple[Path, Path]] = {}

    def make(numbers: tuple[int, int, int, int, int]) -> tuple[Path, Path]:
        if numbers not in known:
            layers, queries, groups, tp, pp = numbers
            root = tmp_path_factory.mktemp("model")
            heads = dict(num_attention_heads=queries, num_key_value_heads=groups)
            model = make_model(
                "llama2", root / "hf", dtype="bfloat16", hidden_size=128, num_hidden_layers=layers, **heads
            )
            known[numbers] = model, tree(model, root / "tree", tp=tp, pp=pp)
        return known[numbers]

    return make


def substituted(text: str, made: Callable[..., tuple[Path, Path]], out: Path) -> str:
    """Text with the page's paths replaced."""
    for path, numbers in MODELS.items():
        if path in text:
            text = text.replace(path, str(made(LARGE if "--num_layer 80" in text else numbers)[1]))
    return text.replace("/path/to/output", str(out)).replace("/path/to/hf_model", str(made(LARGE)[0]))


def check(path: Path, model: Path) -> None:
    """Assert that a file has the model's weights; nothing tells how many rows of the vocabulary are padding."""
    ours, theirs = torch.load(path, weights_only=True), hf_tensors(model)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        rows = len(tensor)
        assert torch.equal(ours[name][:rows], tensor), name
        assert len(ours[name]) == rows or rows == VOCABULARY
    assert mc.verify(path)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split())[:50])
def test_commands(command: str, made: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (programs / "python").chmod(0o755)
    run(f"PATH={programs}:$PATH\n" + substituted(command, made, tmp_path / "out"), {})
    numbers = LARGE if "--num_layer 80" in command else MODELS["/path/to/megatron/checkpoint"]
    check(tmp_path / "out" / "hf_weights.pt", made(numbers)[0])


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("import")[1].split()[0][:30])
def test_blocks(
    block: str, made: Callable[..., tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "output"
    checkpoint = made(MODELS["/path/to/megatron/checkpoint"])[1]
    names = {"input_path": str(checkpoint), "output_path": str(out / "hf_weights.pt")}
    exec(compile(substituted(block, made, out), PAGE, "exec"), names)
    shown = capsys.readouterr().out
    assert "error" not in shown.lower()
    assert "not found" not in shown
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.pt") if "mp_rank" not in str(path))
    for name in written:
        check(tmp_path / name, made(MODELS[OUTPUTS[name]])[0])
    if "hf_to_megatron" in block:
        assert mc.verify(out / "megatron", made(LARGE)[0])
    elif "print(smart" in block:
        assert shown.split("\n")[:3] == ["{'tp_size': 2, 'pp_size': 1}", "('minicpm', '8b')", "minicpm"]
    else:
        assert written


def test_the_blocks_that_catch_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], made: Any) -> None:
    (block,) = [block for block in BLOCKS if "except FileNotFoundError" in block]
    bad = made(LARGE)[1]
    for source, words in ((tmp_path / "nowhere", "Checkpoint not found: "), (bad, "Invalid configuration: ")):
        call = block.replace("output_path)", "output_path, num_kv_heads=3)")
        exec(compile(call, PAGE, "exec"), {"input_path": str(source), "output_path": str(tmp_path / "w.pt")})
        assert capsys.readouterr().out.startswith(words)
    assert left_in(tmp_path) == []


def test_the_tables_are_the_presets() -> None:
    for row in re.findall(r"^\| (\d+\.?5?B .*) \|$", TEXT, re.MULTILINE):
        cells = [cell.strip() for cell in row.split("|")]
        for model_type, part in (("minicpm", cells[:6]), ("llama", cells[7:])):
            if part[0]:
                assert list(PRESETS[model_type][part[0].lower()]) == [int(cell) for cell in part[1:]], part


def test_links_lead_somewhere() -> None:
    for target, part in _LINK.findall(TEXT):
        path = (ROOT / PAGE).parent / target
        assert path.exists(), target
        assert not part or part in map(anchor, _HEADING.findall(path.read_text()))


def test_the_example(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples/example_tensor_parallel.py", tmp_path],
        env={"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "False" not in done.stdout
    assert done.stdout.count("True") == 7
    assert "Checkpoint not found: " in done.stdout
    assert "Invalid configuration: --num_kv_heads 4 contradicts" in done.stdout

"""The documentation is true: its commands run, its example table works, its links lead somewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_converters.families import FAMILIES
from tests.conversions import different, hf_to_megatron, megatron_to_hf
from tests.helpers import hf_tensors
from tests.oracle.by_hand_mindspore import write_by_hand
from tests.oracle.hf import make_model
from tests.oracle.minicpm import make_minicpm

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/adding-a-family.md",
    "docs/messages.md",
    "docs/mindspore.md",
    "docs/json.md",
    "docs/python-api.md",
    "scripts/bench/README.md",
)
#: Documents whose commands have a test of their own.
OTHERS = ("docs/modelconvert.md", "docs/autobridge.md")
_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
_YAML = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#([^)]+))?\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
#: Commands that cannot run inside the test suite that they start, or have a test of their own.
_ELSEWHERE = ("scripts/test.sh", "scripts/quickstart.sh")


def commands() -> list[str]:
    blocks = [block for name in DOCUMENTS for block in _BLOCK.findall((ROOT / name).read_text())]
    return [block for block in blocks if not any(name in block for name in _ELSEWHERE)]


def python_blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the documents' commands call the models and files that they need."""
    root = tmp_path_factory.mktemp("docs")
    folder, example = make_model("llama3.1", root / "hf", dtype="bfloat16"), make_model("qwen2", root / "example")
    as_example(example)
    (family,) = _YAML.findall((ROOT / "docs/adding-a-family.md").read_text())
    (root / "example.yaml").write_text(family)
    named = {"HF": folder, "MEG": hf_to_megatron(folder, root / "megatron", tp=2, pp=2)}
    named |= {"MINICPM": make_minicpm(root)[0]}
    named |= {"MS": write_by_hand(make_model("llama2", root / "plain"), root / "ms", mlp="contiguous")}
    named |= {"MOE": make_model("mixtral", root / "moe"), "EXAMPLE": example, "FAMILY": root / "example.yaml"}
    return {name: str(path) for name, path in named.items()}


def run(command: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command.split())[:60])
def test_commands_run_as_written(command: str, model: dict[str, str], tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    python = programs / "python"  # a link would lose the virtual environment
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    environment = {**model, "OUT": str(tmp_path / "out")}
    environment["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
    run(command, environment)
    assert any((tmp_path / "out").iterdir())


def test_the_blocks_of_the_python_api_run_one_after_the_other(
    model: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {**model, "OUT": str(tmp_path)}
    for block in python_blocks("docs/python-api.md"):
        exec(compile(block, "docs/python-api.md", "exec"), names)
    shown = capsys.readouterr().out
    for words in (f"{tmp_path}/megatron/iter_0000001", "--use-checkpoint-args", "LlamaForCausalLM", "; use tp 1"):
        assert words in shown


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    shown = run(f"bash scripts/quickstart.sh {tmp_path / 'demo'}", {"PYTHON": sys.executable})
    assert shown.rstrip().endswith("EQUAL")
    assert (tmp_path / "demo/megatron/iter_0000001/mp_rank_01_001/model_optim_rng.pt").exists()


@pytest.mark.parametrize("name", (*DOCUMENTS, *OTHERS))
def test_links_lead_somewhere(name: str) -> None:
    for target, part in _LINK.findall((ROOT / name).read_text()):
        path = (ROOT / name).parent / target
        assert path.exists(), target
        assert not part or part in map(anchor, _HEADING.findall(path.read_text())), f"{target}#{part}"


def anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_example_family_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of docs/adding-a-family.md, on a Qwen2 (a Llama with a QKV bias) under the example's names."""
    monkeypatch.setattr(FAMILIES, "_registered", {})
    namespace: dict[str, Any] = {}
    for code in python_blocks("docs/adding-a-family.md"):
        exec(code, namespace)
    folder = make_model("qwen2", tmp_path / "hf")
    as_example(folder)
    checkpoint = hf_to_megatron(folder, tmp_path / "megatron", tp=2, pp=2)
    back = megatron_to_hf(checkpoint, tmp_path / "back")
    assert different(hf_tensors(folder), hf_tensors(back)) == []
    assert "model.layers.3.norm_2.weight" in hf_tensors(back)


def as_example(folder: Path) -> None:
    import json

    from safetensors.torch import save_file

    config = json.loads((folder / "config.json").read_text())
    config["n_layers"] = config.pop("num_hidden_layers")
    for key in ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"):
        config.pop(key, None)
    config |= {"architectures": ["ExampleForCausalLM"], "model_type": "example"}
    (folder / "config.json").write_text(json.dumps(config))
    renamed = {
        name.replace("input_layernorm", "norm_1").replace("post_attention_layernorm", "norm_2"): tensor
        for name, tensor in hf_tensors(folder).items()
    }
    save_file(renamed, folder / "model.safetensors")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_project_speaks_of_itself_alone() -> None:
    """No tracked file names places or tools outside the project."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    forbidden = re.compile(
        "|".join(("/".join(("", "work", "")), "".join(("..", "/sha", "red")), "/".join(("", "opt", "dev"))))
    )
    for name in listed.stdout.split():
        path = ROOT / name
        if path.is_file():
            assert not forbidden.search(path.read_text(encoding="utf-8", errors="ignore")), name

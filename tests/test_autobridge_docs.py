"""docs/autobridge.md is true: its blocks run in their order as printed, with small models under the names that it uses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conversions import different
from tests.helpers import ROOT, hf_tensors
from tests.hub_server import Hub, serving
from tests.oracle.hf import make_model
from tests.test_docs import _BLOCK, python_blocks

PAGE = "docs/autobridge.md"
BLOCKS = python_blocks(PAGE)
#: Sizes of the page that take more processes than one.
SUBSTITUTED = {
    "tensor_model_parallel_size = 8": "tensor_model_parallel_size = 1",
    "pipeline_model_parallel_size = 2": "pipeline_model_parallel_size = 1",
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("published")
    llama = make_model("llama3.2-tied", root / "llama")
    models = {
        "meta-llama__Llama-3.2-1B": llama,
        "meta-llama__Llama-2-7b-hf": make_model("llama2", root / "llama2"),
        "meta-llama__Llama-3-8B": make_model("llama3", root / "llama3"),
        "microsoft__phi-2": make_model("phi", root / "phi"),
        "custom__model": make_model("qwen3", root / "qwen3"),
        "gpt2": make_model("gpt2", root / "gpt2"),
    }
    with serving(**models) as served:
        yield served


def test_blocks(hub: Hub, tmp_path: Path) -> None:
    program = "\n".join(BLOCKS).replace("/path/to/local/model", str(make_model("mistral", tmp_path / "local")))
    for printed, small in SUBSTITUTED.items():
        assert printed in program
        program = program.replace(printed, small)
    environment = {**os.environ, **hub.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "✅ Model is supported!" in done.stdout and "Model not supported: unsupported/model" in done.stdout
    assert "Hidden size: 64" in done.stdout
    assert "attn_implementation, load_in_8bit: not heeded" in done.stderr
    source = hf_tensors(ROOT / hub.models["meta-llama/Llama-3.2-1B"])
    for folder in ("exported", "checkpoint", "checkpoint-2"):
        assert (tmp_path / folder).is_dir()
    assert different(hf_tensors(tmp_path / "exported"), source) == []
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["model_type"] == "llama"


def test_commands(tmp_path: Path) -> None:
    folder = make_model("llama3", tmp_path / "hf")
    (command,) = _BLOCK.findall((ROOT / PAGE).read_text())
    program = command.replace("torchrun", f"{sys.executable} -W ignore -m torch.distributed.run")
    environment = {**os.environ, "HF": str(folder), "OUT": str(tmp_path / "out"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-ec", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "39 of 39 weights exported, 0 differ" in done.stdout
    assert different(hf_tensors(tmp_path / "out"), hf_tensors(folder)) == []

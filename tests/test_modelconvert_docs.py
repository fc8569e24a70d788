"""docs/model-converter-tool.md is true: its commands, YAML and Python run as printed, on tiny models under its names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_converter_tool.options import ALIASES, OPTIONS, REFUSED
from model_converter_tool.settings import SETTINGS
from tests.command_blocks import blocks
from tests.conversions import hf_to_megatron
from tests.helpers import ROOT, hf_tensors
from tests.hub_server import Hub, serving, without_hub_variables
from tests.modelconvert import minicpm
from tests.oracle.hf import make_model
from tests.test_meta_source import write as write_meta

DOCUMENT = (ROOT / "docs/model-converter-tool.md").read_text()
BASH, YAML, PYTHON = (blocks(DOCUMENT, language) for language in ("bash", "yaml", "python"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("published")
    llama = make_model("llama2", root / "llama", vocab_size=200)
    models = {
        "OpenBMB__MiniCPM4-0.5B": minicpm(root / "minicpm"),
        "meta-llama__Llama-2-7b": write_meta(llama, root / "meta", ranks=1, embedding_dim=1),
        "mistralai__Mistral-7B-v0.1": make_model("mistral", root / "mistral", weights="bin"),
    }
    with serving(llama=llama, **models) as served:
        yield served


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """Environment with a program `modelconvert`, and a folder `here` to run it in, which has what the document names."""
    programs, here = tmp_path / "bin", tmp_path / "here"
    programs.mkdir()
    here.mkdir()
    (programs / "modelconvert").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m model_converter_tool "$@"\n')
    (programs / "modelconvert").chmod(0o755)
    (here / "batch.yaml").write_text(YAML[0])
    shutil.copytree(hub.models["OpenBMB/MiniCPM4-0.5B"], here / "model")
    return {
        **without_hub_variables(),
        **hub.environment(tmp_path / "hf_home"),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MODELCONVERT_HOME": str(tmp_path / "workspace"),
    }


def run(command: list[str], here: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def checkpoint(hub: Hub, folder: Path, kind: str) -> None:
    hf_to_megatron(
        hub.models["OpenBMB/MiniCPM4-0.5B" if kind == "minicpm" else "llama"], folder, allow_inexpressible=True
    )


def of(kind: str, blocks: list[str]) -> list[str]:
    """Blocks that need a MiniCPM, or those that do not."""
    needing = [block for block in blocks if "minicpm" in block or "batch.yaml" in block]
    return needing if kind == "minicpm" else [block for block in blocks if block not in needing]


def _name(block: str) -> str:
    return " ".join(block.split())[:60]


@pytest.mark.parametrize("block", of("llama", BASH), ids=_name)
def test_commands(block: str, hub: Hub, environment: dict[str, str], tmp_path: Path) -> None:
    run_block(block, "llama", hub, environment, tmp_path / "here")


@pytest.mark.parametrize("block", of("minicpm", BASH), ids=_name)
def test_commands_about_minicpm(block: str, hub: Hub, environment: dict[str, str], tmp_path: Path) -> None:
    run_block(block, "minicpm", hub, environment, tmp_path / "here")


def run_block(block: str, kind: str, hub: Hub, environment: dict[str, str], here: Path) -> None:
    checkpoint(hub, here / "models/megatron_model", kind)
    done = run(["bash", "-euo", "pipefail", "-c", block], here, environment)
    if " hf2megatron" in block and "--tp" not in block:
        (output,) = (here / "outputs").iterdir()
        assert {"model.pt", "metadata.json"} <= {path.name for path in output.iterdir()}
        assert f"Conversion succeeded! Output: ./outputs/{output.name}\n" in done.stdout
        if kind == "minicpm":
            assert "warning: Megatron-LM will not compute LongRoPE" in done.stderr
            assert (output / "hf_files/modeling_minicpm.py").is_file()
    elif "models/megatron_model hf" in block or "megatron2hf" in block:
        (output,) = (here / "outputs").iterdir()
        there = {path.name for path in output.iterdir()}
        assert {"config.json", "model.safetensors", "generation_config.json"} <= there
        theirs = hf_tensors(hub.models["OpenBMB/MiniCPM4-0.5B" if kind == "minicpm" else "llama"])
        assert sorted(hf_tensors(output)) == sorted(theirs)
    if "MODELCONVERT_DEBUG" in block:
        assert "it holds a minicpm model" in done.stderr


def test_python(hub: Hub, environment: dict[str, str], tmp_path: Path) -> None:
    here = tmp_path / "here"
    checkpoint(hub, here / "megatron_model", "minicpm")
    code = PYTHON[0] + "\nassert result.success, result.error\n" + PYTHON[1]
    done = run([sys.executable, "-c", code], here, environment)
    assert done.stdout.startswith("True []") and "True ./outputs" in done.stdout
    assert (here / "minicpm_megatron/model.pt").is_file() and (here / "minicpm_hf/model.safetensors").is_file()


def test_every_option_and_setting_is_described() -> None:
    flags = {name: alias for alias, name in ALIASES.items()}
    for name in (*OPTIONS, *SETTINGS):
        flag = flags.get(name, name).replace("_", "-")
        assert f"--{flag}" in DOCUMENT or f"`{name}`" in DOCUMENT, name
    for refused in REFUSED.values():
        assert refused.flag.partition("-config")[0] in DOCUMENT

"""Our plugins with those of real trees of Megatron-LM, under each tree's own convert.py: the same tensors each time.

`MEGATRON_LM_TREES` is a folder of trees, named by tag (`core_v0.12.3`), `main` and `habana`. What cannot run is printed as not run.
The tools of 0.15 and later do not work as they are, on a GPU either: process groups are unset that the model asks for, and the
loader_core builds no model. tests/oracle/tree_convert.py gives them both, and changes nothing of what they read or write.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.helpers import ROOT, Run, finished, hf_tensors, nothing_complete, same_tensors, start, succeeded, verb

HFModel = Callable[..., Path]
VARIABLE = "MEGATRON_LM_TREES"


class Tree(NamedTuple):
    """What a tree calls its own plugins, and what they can do with a model of 199 tokens, which takes padding."""

    folder: str
    loader: str = "core"
    saver: str = "core"
    impl: str = "local"
    tp: int = 2
    vocabulary: int = 199


TREES = {
    # Its `local` layers have no RMSNorm.
    "0.8": Tree("core_v0.8.*", loader="mcore", saver="mcore", impl="transformer_engine"),
    **{release: Tree(f"core_v{release}.*") for release in ("0.12", "0.15", "0.17", "0.19")},
    "main": Tree("main"),
    # Its saver cannot pad, and its loader cannot read what its saver writes for tensor parallelism.
    "habana": Tree("habana", impl="transformer_engine", tp=1, vocabulary=256),
}


def folder_of(release: str) -> Path:
    if VARIABLE not in os.environ:
        pytest.skip(f"not run: {VARIABLE} does not say where trees of Megatron-LM are")
    found = sorted(Path(os.environ[VARIABLE]).glob(TREES[release].folder))
    if not found:
        pytest.skip(f"not run: {os.environ[VARIABLE]} has no {TREES[release].folder}")
    return found[-1]


def converted(tree: Path, *options: Any, prepared: bool = True) -> Run:
    """Run a tree's convert.py: in a process that can do without a GPU, or as it is."""
    script = ("-m", "tests.oracle.tree_convert", tree) if prepared else (tree / "tools/checkpoint/convert.py",)
    env = {"PYTHONPATH": str(ROOT), "CUDA_DEVICE_MAX_CONNECTIONS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return finished(start(script[0], *script[1:], "--model-type", "GPT", *options, env=env), 300)


def model_for(release: str, hf_model: HFModel) -> Path:
    return hf_model("llama2", dtype="float32", vocab_size=TREES[release].vocabulary)


@pytest.fixture(scope="module")
def saved(hf_model: HFModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Function `saved(release)`: a checkpoint that the tree's own saver wrote of what our loader sent; made once."""

    @cache
    def save(release: str) -> Path:
        tree, out = TREES[release], tmp_path_factory.mktemp("trees") / release
        sizes = ("--target-tensor-parallel-size", tree.tp, "--target-pipeline-parallel-size", 2)
        plugins = ("--loader", "loaders.loader_llama_mistral", "--saver", tree.saver)
        folders = ("--load-dir", model_for(release, hf_model), "--save-dir", out)
        succeeded(converted(folder_of(release), *plugins, *folders, *sizes, "--saver-transformer-impl", tree.impl))
        return out

    return save


def same_model(checkpoint: Path, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "back"
    succeeded(verb("convert", checkpoint, out, "--to", "hf", "--hf-config", source, "--quiet"))
    same_tensors(hf_tensors(out), hf_tensors(source))


@pytest.mark.parametrize("release", TREES)
def test_our_loader_with_our_saver(release: str, hf_model: HFModel, tmp_path: Path) -> None:
    """Under the tree's convert.py as it is, without copying anything."""
    tree, source = folder_of(release), model_for(release, hf_model)
    plugins = ("--loader", "loaders.loader_llama_mistral", "--saver", "savers.saver_mcore")
    sizes = ("--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2)
    folders = ("--load-dir", source, "--save-dir", tmp_path / "out")
    succeeded(converted(tree, *plugins, *folders, *sizes, prepared=False))
    same_model(tmp_path / "out", source, tmp_path)


@pytest.mark.parametrize("release", TREES)
def test_our_loader_with_the_tree_s_saver(
    release: str, hf_model: HFModel, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder_of(release)
    same_model(saved(release), model_for(release, hf_model), tmp_path)


@pytest.mark.parametrize("saver", ["hf", "mcore"])
@pytest.mark.parametrize("release", TREES)
def test_the_tree_s_loader_with_our_savers(
    release: str, saver: str, hf_model: HFModel, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, tree = folder_of(release), TREES[release]
    source, out = model_for(release, hf_model), tmp_path / "out"
    size = ("--true-vocab-size", tree.vocabulary, "--position-embedding-type", "rope")
    plugins = ("--loader", tree.loader, "--saver", f"savers.saver_{saver}", "--loader-transformer-impl", tree.impl)
    folders = ("--load-dir", saved(release), "--save-dir", out)
    succeeded(converted(folder, *plugins, *folders, *size))
    if saver == "hf":
        same_tensors(hf_tensors(out), hf_tensors(source))
    else:
        same_model(out, source, tmp_path)


@pytest.mark.parametrize("names", ["", "--as-core"])
@pytest.mark.parametrize("release", TREES)
def test_installed_in_the_tree(release: str, names: str, tmp_path: Path) -> None:
    """Into a copy of its tools: the script checks itself, and leaves the copy as it was when it is taken out."""
    tools = folder_of(release) / "tools"
    for name in ("tree", "kept"):
        shutil.copytree(tools, tmp_path / name / "tools")
    script = ["bash", str(ROOT / "scripts/install_dropin.sh"), str(tmp_path / "tree")]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([*script, *names.split()], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "came back as they were" in done.stdout, done
    subprocess.run([*script, "--uninstall"], check=True)
    assert subprocess.run(["diff", "-r", tmp_path / "tree", tmp_path / "kept"], check=False).returncode == 0


@pytest.mark.parametrize("release", ["0.12", "0.19"])
def test_a_saver_of_the_tree_that_fails_ends_our_loader_with_an_error(
    release: str, hf_model: HFModel, tmp_path: Path
) -> None:
    """Stock convert.py itself would end with 0."""
    folder = folder_of(release)
    options = ("--loader", "loaders.loader_llama_mistral", "--saver", "core", "--target-tensor-parallel-size", 3)
    folders = ("--load-dir", model_for(release, hf_model), "--save-dir", tmp_path / "out")
    run = converted(folder, *options, *folders, "--saver-transformer-impl", "local")
    assert run.code == 1 and "loader: error: the saver ended with exit code 1" in run.err
    nothing_complete(tmp_path / "out")

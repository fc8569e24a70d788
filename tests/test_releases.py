"""Releases of Megatron-LM, unmodified, load what we write with the flags that we print, and compute what transformers computes.

    MEGATRON_LM_TREES=/path/to/0.9:/path/to/0.19 scripts/test.sh tests/test_releases.py

Each is a checkout of NVIDIA/Megatron-LM at the tag of a release, core_v0.8.0 to core_v0.19.0. Without one there is nothing to do.
"""

from __future__ import annotations

import functools
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conversions import hf_to_megatron, hf_to_torch_dist
from tests.helpers import ROOT
from tests.oracle.families.sparse import SPARSE
from tests.oracle.hf import difference, hf_logits, sample_tokens

HFModel = Callable[..., Path]
TREES = [Path(tree) for tree in os.environ.get("MEGATRON_LM_TREES", "").split(os.pathsep) if tree]
TOLERANCE = 1e-4
#: Largest difference relative to the largest logit; GELU's two forms differ by 7e-5.
RELATIVE_TOLERANCE = 1e-5
#: Of any training run, and what keeps Megatron-LM from asking for a GPU.
RUN = """--micro-batch-size 2 --global-batch-size 32 --seq-length 64 --train-iters 1 --lr 1e-4
    --tokenizer-type NullTokenizer --vocab-size 198
    --use-cpu-initialization --distributed-backend gloo --no-persist-layer-norm --no-gradient-accumulation-fusion
    --no-masked-softmax-fusion --no-rope-fusion --no-bias-swiglu-fusion""".split()
ENGINE = "transformer_engine"
#: Releases with which the stand-in for Transformer Engine works.
WITH_ENGINE = (8, 9, 10, 11, 12, 13, 15, 16)
#: Family: parallel sizes and names to write, and the first release that can run it.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "llama3": (dict(tp=2, pp=2), 8),
    "llama-bias": (dict(tp=2, pp=2), 8),
    "qwen2-tied": (dict(tp=2, pp=2), 8),
    "llama3.1": (dict(tp=2, pp=2), 10),
    "qwen3": (dict(tp=2, pp=2), 10),
    "mixtral": (dict(ep=2, pp=2, expert_layout="sequential"), 11),
    "qwen3-moe-dense-layers": (dict(ep=2, pp=2, expert_layout="sequential"), 12),
    "qwen2-moe": (dict(ep=2, pp=2), 16),
    "gpt2": (dict(tp=2, pp=2), 12),
    "starcoder2": (dict(tp=2, pp=2), 15),
    "phi3-partial": (dict(tp=2, pp=2), 12),
    "glm": (dict(tp=2, pp=2), 12),  # rotary pairs are moved apart for the releases before 0.14
    "granite-untied": (dict(tp=2, pp=2), 12),  # multipliers are folded for the releases before 0.17
    "qwen3-window": (dict(tp=2, pp=2), 15),
    "glm4-moe": (dict(ep=2, pp=2, expert_layout="sequential"), 12),
    "gpt-oss": (dict(ep=2, pp=2, expert_layout="sequential"), 15),
    "gpt-oss-yarn": (dict(ep=2, pp=2, expert_layout="sequential"), 19),
    # Layers of megatron_layers, by --spec.
    "gpt_neox-parallel": (dict(tp=2, pp=2), 12),
    "olmo2": (dict(tp=2, pp=2), 12),
    "exaone4-windows": (dict(tp=2, pp=2), 15),
    "olmoe": (dict(ep=2, pp=2, expert_layout="sequential"), 16),
    "deepseek-v3": (dict(tp=2, expert_layout="sequential", impl=ENGINE), 12),  # down projections are cut before 0.14
}
pytestmark = pytest.mark.skipif(not TREES, reason="MEGATRON_LM_TREES names no tree of Megatron-LM")


def release(tree: Path) -> int:
    """The 17 of 0.17.1."""
    return int(runpy.run_path(str(tree / "megatron/core/package_info.py"))["MINOR"])


def impl_of(tree: Path) -> str:
    """Local layers where they know RMS norms, without which our stand-in for Transformer Engine must do."""
    return "local" if release(tree) >= 10 else "transformer_engine"


def flags_of(checkpoint: Path) -> list[str]:
    flags = shlex.split((checkpoint / "iter_0000001/pretrain_gpt_flags.txt").read_text().replace("\\\n", " "))
    return [flag for flag in flags if flag != "--sequence-parallel"]  # for training only, and the stand-in has none


def ranks(flags: list[str]) -> int:
    sizes = dict(
        re.findall(r"--(tensor|pipeline|expert|expert-tensor)(?:-model)?-parallel-size (\d+)", " ".join(flags))
    )
    tp, pp, ep, etp = (int(sizes.get(name, 1)) for name in ("tensor", "pipeline", "expert", "expert-tensor"))
    return pp * math.lcm(tp, ep * etp)


def computed(tree: Path, checkpoint: Path, tmp_path: Path) -> torch.Tensor:
    flags, tokens, out = flags_of(checkpoint), tmp_path / "tokens.pt", tmp_path / "logits.pt"
    torch.save(sample_tokens(), tokens)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks(flags))]
    command += ["-m", "tests.oracle.release", str(tokens), str(out), *flags, *RUN]
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tree}", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **paths}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return torch.load(out)


@functools.cache
def wanted(folder: Path) -> torch.Tensor:
    return hf_logits(folder, sample_tokens())


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("tree", TREES, ids=str)
def test_a_release_computes_what_transformers_computes(
    tree: Path, family: str, hf_model: HFModel, tmp_path: Path
) -> None:
    options, first = MODELS[family]
    if release(tree) < first:
        pytest.skip(f"needs Megatron-LM 0.{first}")
    if options.get("impl") == ENGINE and release(tree) not in WITH_ENGINE:
        pytest.skip("the stand-in for Transformer Engine does not work with this release")
    folder = hf_model(family)
    options = {"impl": impl_of(tree), "megatron_version": f"0.{release(tree)}", **options}
    got = computed(tree, hf_to_megatron(folder, tmp_path / "megatron", **options), tmp_path)
    largest = float(wanted(folder).abs().max())
    assert float((got[..., :199] - wanted(folder)).abs().max()) < RELATIVE_TOLERANCE * largest


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama3", "mixtral"])
@pytest.mark.parametrize("tree", TREES, ids=str)
def test_a_release_loads_a_distributed_checkpoint(tree: Path, family: str, hf_model: HFModel, tmp_path: Path) -> None:
    if release(tree) < 13:
        pytest.skip("older releases ask for Transformer Engine's version")
    folder = hf_model(family)
    options = {**MODELS[family][0], "impl": impl_of(tree)}
    got = computed(tree, hf_to_torch_dist(folder, tmp_path / "dist", **options), tmp_path)
    assert float((got[..., :199] - wanted(folder)).abs().max()) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("family", SPARSE)
@pytest.mark.parametrize("tree", TREES, ids=str)
def test_sparse_attention_computes_what_transformers_computes(
    tree: Path, family: str, hf_model: HFModel, tmp_path: Path
) -> None:
    """Whole models, whose indexers choose 9 of up to 40 positions: 0.19 computes them without a GPU, too."""
    if release(tree) < 19:
        pytest.skip("needs Megatron-LM 0.19")
    folder, tokens, out = hf_model(family, index_topk=9), tmp_path / "tokens.pt", tmp_path / "logits.pt"
    torch.save(sample_tokens(length=40), tokens)
    root = hf_to_megatron(folder, tmp_path / "megatron")
    command = [sys.executable, "-m", "tests.oracle.sparse_release", str(root), str(tokens), str(out)]
    paths = {"PYTHONPATH": f"{tree}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **paths}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-8000:]
    expected = hf_logits(folder, sample_tokens(length=40))
    assert difference(torch.load(out), expected) < RELATIVE_TOLERANCE

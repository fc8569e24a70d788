"""The proof of `AutoBridge` on several processes: the real megatron-core computes what transformers computes, every way out
gives the bits that went in, and nobody waits for a process that is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import bridge_jobs
from tests.bridge_jobs import EXPORTS, Digest, Found, digest
from tests.helpers import hf_tensors
from tests.oracle.hf import hf_logits, sample_tokens
from tests.oracle.pool import MegatronPool, _concatenate

TOKENS = sample_tokens(length=40)
VOCABULARY = 199
#: Largest difference, relative to the largest logit.
TOLERANCE = 1e-5
Models = Callable[..., Path]

ENGINE = dict(transformer_impl="transformer_engine", moe_grouped_gemm=True)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3.1, TP2 PP2": ("llama3.1", dict(tp=2, pp=2)),
    "tied llama3.2, TP2 PP2": ("llama3.2-tied", dict(tp=2, pp=2)),
    "tied llama3.2, TP2 PP2 VPP2": ("llama3.2-tied", dict(tp=2, pp=2, vpp=2)),
    "GPT-2, TP2 PP2": ("gpt2", dict(tp=2, pp=2)),
    "Qwen3-MoE, TP2 PP2": ("qwen3-moe", dict(tp=2, pp=2)),
    "Qwen3-MoE, TP2 PP2 EP2 ETP1": ("qwen3-moe", dict(tp=2, pp=2, ep=2, etp=1)),
    "Qwen3-MoE, TP2 EP2 ETP1, twice": ("qwen3-moe", dict(tp=2, ep=2, etp=1)),
    "Qwen3-MoE of Transformer Engine, TP2 EP2": ("qwen3-moe", dict(tp=2, ep=2, etp=1, **ENGINE)),
    "DeepSeek-V3, TP2 PP2": ("deepseek-v3-yarn", dict(tp=2, pp=2)),
    "DeepSeek-V3, TP2 PP2 EP2 ETP1, VPP2": ("deepseek-v3-yarn", dict(tp=2, pp=2, ep=2, etp=1, vpp=2)),
    "DeepSeek-V3 of Transformer Engine, TP2 EP2": ("deepseek-v3-yarn", dict(tp=2, ep=2, etp=1, **ENGINE)),
}


@pytest.fixture(scope="module")
def logits(hf_model: Models) -> Callable[[str], torch.Tensor]:
    """Function that gives transformers' logits of a family; computed once."""
    known: dict[str, torch.Tensor] = {}

    def of(family: str) -> torch.Tensor:
        if family not in known:
            known[family] = hf_logits(hf_model(family), TOKENS)
        return known[family]

    return of


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours[..., :VOCABULARY] - theirs).abs().max() / theirs.abs().max())


def digests(folder: Path) -> dict[str, Digest]:
    return {name: digest(tensor) for name, tensor in hf_tensors(folder).items()}


@pytest.mark.parametrize("case", CASES)
def test_models_compute_the_same_and_come_back_bit_by_bit(
    megatron_pool: MegatronPool, hf_model: Models, logits: Any, tmp_path: Path, case: str
) -> None:
    family, sizes = CASES[case]
    found = megatron_pool.run(bridge_jobs.export_and_save, hf_model(family), sizes, tmp_path, TOKENS)
    assert difference(_concatenate([each.logits for each in found]), logits(family)) < TOLERANCE
    wanted = digests(hf_model(family))
    check_exports(found, wanted)
    for folder in (tmp_path / "by one", tmp_path / "by two"):
        assert digests(folder) == wanted
        assert torch.equal(hf_logits(folder, TOKENS), logits(family))
    assert len(list((tmp_path / "by one").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "by two").glob("*.safetensors"))) > 2


def check_exports(found: list[Found], wanted: dict[str, Digest]) -> None:
    """Each mode gives its processes the weights, and no others."""
    by_mode = {how: [each.exports[how] for each in found] for how in EXPORTS}
    nothing: dict[str, Digest] = {}
    assert by_mode["consolidate"] == [wanted, nothing, nothing, nothing]
    assert by_mode["replicate"] == by_mode["replicate files"] == [wanted] * 4
    for how in ("distribute", "distribute files"):
        assert sum(len(own) for own in by_mode[how]) == len(wanted)
        assert {name: value for own in by_mode[how] for name, value in own.items()} == wanted
    assert all(by_mode["distribute"])
    stages = {each.stage: own for each, own in zip(found, by_mode["stage"], strict=True)}
    assert [stages[each.stage] for each in found] == by_mode["stage"]
    assert sum(len(own) for own in stages.values()) == len(wanted)
    assert {name: value for own in stages.values() for name, value in own.items()} == wanted

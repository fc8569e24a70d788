"""The oracle judges itself on models that differ from Llama in kind: right ones agree with transformers, wrong ones do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.oracle import by_hand_kinds, by_hand_kinds_dist, checkpoint, kinds_args
from tests.oracle.checkpoint import Grid, Rank
from tests.oracle.errors import OracleError
from tests.oracle.hf import TOKENS, difference
from tests.oracle.hf_kinds import KINDS
from tests.oracle.pool import MegatronPool, write_checkpoint, write_distributed

VOCABULARY = 199
#: Largest difference, relative to the largest logit. GELU's two forms differ by 7e-5, so it must not be larger.
TOLERANCE = 1e-5
WITH_ENGINE = ("deepseek-v2-lite", "deepseek-v3", "deepseek-v3-yarn", "qwen3-next")
WITH_EXPERTS = ("glm4-moe", *WITH_ENGINE)
ENGINE = dict(transformer_impl="transformer_engine")
CUT = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
Reference = Callable[[str], torch.Tensor]


@pytest.mark.parametrize("family", KINDS)
def test_converted_by_hand_it_agrees_with_transformers(
    megatron_pool: MegatronPool, tmp_path: Path, hf_model: Callable[..., Path], logits: Reference, family: str
) -> None:
    """Cut over ranks, its files are those that `test_proof_kinds` has compared with ours and run."""
    sizes = ENGINE if family in WITH_ENGINE else {}
    root = by_hand_kinds.convert(hf_model(family), tmp_path, **sizes)
    assert difference(megatron_pool.logits(root, TOKENS), logits(family)) < TOLERANCE


@pytest.mark.parametrize("family", ["glm4-moe", "deepseek-v3"])
def test_grouped_experts_agree_with_transformers(
    megatron_pool: MegatronPool, tmp_path: Path, hf_model: Callable[..., Path], logits: Reference, family: str
) -> None:
    root = by_hand_kinds.convert(
        hf_model(family), tmp_path / "meg", **ENGINE, moe_grouped_gemm=True, expert_model_parallel_size=2
    )
    assert difference(megatron_pool.logits(root, TOKENS), logits(family)) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("gpt2", dict(bias_gelu_fusion=False)),
        ("gpt2", dict(layernorm_epsilon=1e-5)),
        ("starcoder2", dict(window_size=(7, 0))),
        ("phi3-partial", dict(rotary_percent=1.0)),
        ("glm", dict(rotary_interleaved=False)),
        ("granite", dict(layernorm_epsilon=1e-3)),
        ("granite", dict(mup_attn_scale_power=0.5)),
        ("granite-untied", dict(mup_base_head_dim=None)),
        ("qwen2-window", dict(window_attn_skip_freq=None)),
        ("glm4-moe", dict(moe_router_topk_scaling_factor=None)),
        ("deepseek-v2-lite", dict(moe_router_pre_softmax=False)),
        ("deepseek-v3", dict(moe_router_num_groups=None, moe_router_group_topk=None)),
        ("deepseek-v3-yarn", dict(mscale_all_dim=0.0)),
        ("qwen3-next", dict(layernorm_zero_centered_gamma=False)),
    ],
)
def test_a_wrong_argument_shows(
    megatron_pool: MegatronPool,
    tmp_path: Path,
    hf_model: Callable[..., Path],
    logits: Reference,
    family: str,
    wrong: dict[str, Any],
) -> None:
    root = by_hand_kinds.convert(hf_model(family), tmp_path / "meg", **ENGINE, **wrong)
    assert difference(megatron_pool.logits(root, TOKENS), logits(family)) > 5 * TOLERANCE


def test_latent_down_projections_were_cut_before_0_14(
    megatron_pool: MegatronPool, tmp_path: Path, hf_model: Callable[..., Path]
) -> None:
    sizes = dict(**ENGINE, tensor_model_parallel_size=2)
    roots = [
        by_hand_kinds.convert(hf_model("deepseek-v3"), tmp_path / str(cut), down_cut=cut, **sizes)
        for cut in (True, False)
    ]
    with pytest.raises(OracleError, match=r"size mismatch for .*linear_kv_down_proj.weight"):
        megatron_pool.logits(roots[0], TOKENS)
    old, new = ([_state(root, Grid(tp=2, etp=2), Rank(tp, 0, 0, tp)) for tp in (0, 1)] for root in roots)
    for name in ("q_down", "kv_down"):
        key = f"decoder.layers.3.self_attention.linear_{name}_proj.weight"
        assert torch.equal(torch.cat([rank[key] for rank in old]), new[0][key])
        assert torch.equal(new[0][key], new[1][key])


def _state(root: Path, grid: Grid, rank: Rank) -> dict[str, Any]:
    state: dict[str, Any] = checkpoint.load_rank(checkpoint.rank_file(root / "iter_0000001", grid, rank))["model"]
    return state


@pytest.mark.parametrize("family", ["gpt2", "glm4-moe", "deepseek-v3", "qwen3-next"])
def test_a_distributed_checkpoint_by_hand_agrees_with_transformers(
    megatron_pool: MegatronPool, tmp_path: Path, hf_model: Callable[..., Path], logits: Reference, family: str
) -> None:
    root = by_hand_kinds_dist.convert(hf_model(family), tmp_path / "meg", stacked=family not in WITH_EXPERTS)
    assert difference(megatron_pool.distributed_logits(root, TOKENS, tp=2), logits(family)) < TOLERANCE


@pytest.mark.parametrize("family", ["glm4-moe", "deepseek-v3", "qwen3-next"])
def test_layers_that_predict_further_tokens_are_saved_and_loaded(
    megatron_pool: MegatronPool, tmp_path: Path, hf_model: Callable[..., Path], family: str
) -> None:
    config = kinds_args.read(hf_model(family))
    args = kinds_args.args_of(config, **ENGINE, **CUT, expert_tensor_parallel_size=2, mtp_num_layers=1)
    expected = write_checkpoint(megatron_pool, tmp_path / "torch", args, seed=1, tokens=TOKENS)
    assert torch.equal(megatron_pool.logits(tmp_path / "torch", TOKENS, by_megatron=True), expected)
    path = checkpoint.rank_file(tmp_path / "torch" / "iter_0000001", Grid(2, 2, 1, 2), Rank(pp=1))
    last = checkpoint.load_trusted(path)["model"]
    assert {"mtp.layers.0.eh_proj.weight", "embedding.word_embeddings.weight"} <= last.keys()
    assert last["mtp.layers.0.eh_proj.weight"].shape == (args.hidden_size // 2, 2 * args.hidden_size)
    expected = write_distributed(megatron_pool, tmp_path / "dist", args, seed=1, tokens=TOKENS)
    logits = megatron_pool.distributed_logits(tmp_path / "dist", TOKENS, tp=1, pp=1)
    assert difference(logits, expected[..., :VOCABULARY]) < TOLERANCE

"""The oracle judges itself on mixtures of experts: right ones agree with transformers, each wrong one is told apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.oracle import by_hand, checkpoint
from tests.oracle.args import megatron_args
from tests.oracle.checkpoint import Grid, Rank
from tests.oracle.errors import OracleError
from tests.oracle.hf import MOE_FAMILIES, hf_logits, make_model, sample_tokens
from tests.oracle.pool import MegatronPool, write_checkpoint
from tests.pairs import chessboard

TOKENS = sample_tokens()
VOCABULARY = 199
SEQUENTIAL = [dict(impl="local"), dict(impl="transformer_engine")]
GROUPED = [dict(impl=impl, moe_grouped_gemm=True) for impl in ("local", "transformer_engine")]
GRIDS = [
    dict(ep=2),
    dict(ep=4),
    dict(tp=2),
    dict(tp=2, etp=1),
    dict(tp=2, ep=2),
    dict(tp=2, ep=2, etp=1),
    dict(pp=2, ep=2),
    dict(tp=2, pp=2, ep=2, etp=1),
    dict(tp=4, ep=2, etp=2),
    dict(tp=4, ep=4, etp=1),
    dict(pp=4),
]


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours[..., :VOCABULARY] - theirs).abs().max())


def edit(root: Path, grid: Grid, rank: Rank, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply `change` to the tensors of one rank of a checkpoint."""
    path = checkpoint.rank_file(root / "iter_0000001", grid, rank)
    content = checkpoint.load_rank(path)
    change(content["model"])
    torch.save(content, path)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def expected(mixtral: Path) -> torch.Tensor:
    """Logits of `mixtral` as transformers computes them."""
    return hf_logits(mixtral, TOKENS)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_every_form_of_a_model_is_the_same_model(family: str, tmp_path: Path) -> None:
    plain = make_model(family, tmp_path / "plain")
    fused = make_model(family, tmp_path / "fused", fused_experts=True, legacy_config=True)
    pickled = make_model(family, tmp_path / "pickled", weights="bin", max_shard_size="50KB")
    expected = hf_logits(plain, TOKENS)
    assert torch.equal(hf_logits(fused, TOKENS), expected) and torch.equal(hf_logits(pickled, TOKENS), expected)
    one, stack = ("block_sparse_moe.experts.7.w1.weight", "mlp.experts.gate_up_proj")
    if family != "mixtral":
        one = "mlp.experts.7.gate_proj.weight"
    for folder, has, lacks in ((plain, one, stack), (fused, stack, one)):
        with safe_open(folder / "model.safetensors", "pt") as file:
            names = set(file.keys())
        assert f"model.layers.1.{has}" in names and f"model.layers.1.{lacks}" not in names


@pytest.mark.parametrize(("layout", "grid"), chessboard([*SEQUENTIAL, *GROUPED], GRIDS), ids=str)
def test_experts_converted_by_hand_agree_with_transformers(
    megatron_pool: MegatronPool,
    tmp_path: Path,
    mixtral: Path,
    expected: torch.Tensor,
    layout: dict[str, Any],
    grid: dict[str, int],
) -> None:
    root = by_hand.convert(mixtral, tmp_path / "megatron", **grid, **layout)
    assert difference(megatron_pool.logits(root, TOKENS, **grid), expected) < 1e-5


@pytest.mark.parametrize("impl", ("local", "transformer_engine"))
@pytest.mark.parametrize("family", [family for family in MOE_FAMILIES if family.startswith("qwen")])
def test_every_family_converted_by_hand_agrees_with_transformers(
    megatron_pool: MegatronPool, tmp_path: Path, family: str, impl: str
) -> None:
    hf = make_model(family, tmp_path / "hf")
    root = by_hand.convert(hf, tmp_path / "meg", tp=2, pp=2, ep=2, etp=1, impl=impl)
    assert difference(megatron_pool.logits(root, TOKENS), hf_logits(hf, TOKENS)) < 1e-5


@pytest.mark.parametrize("sizes", [dict(tp=2, ep=2, impl="local"), dict(tp=2, pp=2, impl="transformer_engine")])
def test_olmoe_needs_a_norm_over_all_heads(megatron_pool: MegatronPool, tmp_path: Path, sizes: dict[str, Any]) -> None:
    hf = make_model("olmoe", tmp_path / "hf")
    own_layer = ["megatron_layers.norms_over_heads", "spec"]
    root = by_hand.convert(hf, tmp_path / "meg", **sizes, spec=own_layer)
    assert difference(megatron_pool.logits(root, TOKENS), hf_logits(hf, TOKENS)) < 1e-5
    root = by_hand.convert(hf, tmp_path / "stock", **sizes)
    with pytest.raises(OracleError, match=r"size mismatch.*q_layernorm"):
        megatron_pool.logits(root, TOKENS)


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("mixtral", dict(moe_router_pre_softmax=True)),
        ("mixtral", dict(moe_router_topk=3)),
        ("qwen2-moe", dict(moe_router_pre_softmax=False)),
        ("qwen2-moe", dict(moe_router_score_function="sigmoid")),
        ("qwen3-moe", dict(moe_router_topk_scaling_factor=2.0)),
    ],
)
def test_a_wrong_argument_shows(
    megatron_pool: MegatronPool, tmp_path: Path, family: str, wrong: dict[str, Any]
) -> None:
    hf = make_model(family, tmp_path / "hf")
    root = by_hand.convert(hf, tmp_path / "meg", **wrong)
    assert difference(megatron_pool.logits(root, TOKENS), hf_logits(hf, TOKENS)) > 1e-3


def _swap_experts(model: dict[str, Any]) -> None:
    for fc in ("linear_fc1", "linear_fc2"):
        one, other = (f"decoder.layers.1.mlp.experts.local_experts.{local}.{fc}.weight" for local in (0, 3))
        model[one], model[other] = model[other], model[one]


def _swap_gate_and_up(model: dict[str, Any]) -> None:
    name = "decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight"
    model[name] = model[name].roll(len(model[name]) // 2, 0)


def _swap_router_rows(model: dict[str, Any]) -> None:
    model["decoder.layers.1.mlp.router.weight"][[0, 3]] = model["decoder.layers.1.mlp.router.weight"][[3, 0]]


@pytest.mark.parametrize("change", [_swap_experts, _swap_gate_and_up])
@pytest.mark.parametrize("rank", (0, 1))
def test_a_wrong_expert_shows(
    megatron_pool: MegatronPool,
    tmp_path: Path,
    mixtral: Path,
    change: Callable[[dict[str, Any]], None],
    rank: int,
) -> None:
    root = by_hand.convert(mixtral, tmp_path, ep=2, impl="transformer_engine")
    edit(root, Grid(ep=2), Rank(ep=rank), change)
    assert difference(megatron_pool.logits(root, TOKENS), hf_logits(mixtral, TOKENS)) > 1e-3


def test_wrong_rows_of_the_router_show(megatron_pool: MegatronPool, tmp_path: Path, mixtral: Path) -> None:
    root = by_hand.convert(mixtral, tmp_path, ep=2)
    for rank in (0, 1):
        edit(root, Grid(ep=2), Rank(ep=rank), _swap_router_rows)
    assert difference(megatron_pool.logits(root, TOKENS), hf_logits(mixtral, TOKENS)) > 1e-3


def test_files_of_two_expert_ranks_exchanged_show(megatron_pool: MegatronPool, tmp_path: Path, mixtral: Path) -> None:
    grid = Grid(ep=2)
    root = by_hand.convert(mixtral, tmp_path, ep=2)
    first, second = (checkpoint.rank_file(root / "iter_0000001", grid, Rank(ep=rank)).parent for rank in (0, 1))
    first.rename(tmp_path / "away")
    second.rename(first)
    (tmp_path / "away").rename(second)
    assert difference(megatron_pool.logits(root, TOKENS), hf_logits(mixtral, TOKENS)) > 1e-3


@pytest.mark.parametrize(
    ("grid", "rank", "name"),
    [
        (Grid(ep=2), Rank(ep=1), "decoder.layers.2.mlp.router.weight"),
        (Grid(ep=2), Rank(ep=1), "decoder.layers.2.self_attention.linear_qkv.weight"),
        (Grid(tp=2, etp=1), Rank(tp=1), "decoder.layers.2.mlp.experts.local_experts.5.linear_fc2.weight"),
        (Grid(tp=2, etp=2), Rank(tp=1), "decoder.final_layernorm.weight"),
    ],
)
def test_copies_that_differ_between_files_are_named(
    megatron_pool: MegatronPool, tmp_path: Path, mixtral: Path, grid: Grid, rank: Rank, name: str
) -> None:
    root = by_hand.convert(mixtral, tmp_path, **grid._asdict())
    edit(root, grid, rank, lambda model: model[name].mul_(1.01))
    with pytest.raises(OracleError, match=f"ranks that share {name} hold different values"):
        megatron_pool.logits(root, TOKENS)


@pytest.mark.parametrize(
    ("impl", "overrides"),
    [
        ("local", dict(tensor_model_parallel_size=2, expert_model_parallel_size=2)),
        ("transformer_engine", dict(expert_model_parallel_size=4, params_dtype=torch.bfloat16)),
        ("transformer_engine", dict(pipeline_model_parallel_size=2, expert_model_parallel_size=2, moe_layer_freq=2)),
        (
            "transformer_engine",
            dict(tensor_model_parallel_size=4, expert_tensor_parallel_size=1, moe_grouped_gemm=True),
        ),
        (
            "local",
            dict(
                tensor_model_parallel_size=2,
                pipeline_model_parallel_size=2,
                expert_tensor_parallel_size=1,
                expert_model_parallel_size=2,
                moe_grouped_gemm=True,
            ),
        ),
        (
            "transformer_engine",
            dict(
                expert_model_parallel_size=2,
                moe_shared_expert_intermediate_size=80,
                moe_shared_expert_gate=True,
                moe_router_score_function="sigmoid",
                moe_router_enable_expert_bias=True,
                moe_router_dtype="fp32",
                moe_layer_freq=[0, 1, 1, 0],
                params_dtype=torch.bfloat16,
            ),
        ),
    ],
)
def test_what_megatron_writes_reads_back(
    megatron_pool: MegatronPool, tmp_path: Path, impl: str, overrides: dict[str, Any]
) -> None:
    args = megatron_args(transformer_impl=impl, num_experts=8, moe_ffn_hidden_size=48, **overrides)
    expected = write_checkpoint(megatron_pool, tmp_path, args, seed=3, tokens=TOKENS, iteration=7)
    assert torch.equal(megatron_pool.logits(tmp_path, TOKENS, by_megatron=True), expected)
    folders = {path.name for path in (tmp_path / "iter_0000007").iterdir()}
    assert len(folders) == len(list(Grid.of(args).ranks()))


def test_experts_that_megatron_writes_all_differ(megatron_pool: MegatronPool, tmp_path: Path) -> None:
    args = megatron_args(num_experts=8, moe_ffn_hidden_size=48, expert_model_parallel_size=2)
    write_checkpoint(megatron_pool, tmp_path, args, seed=3, tokens=TOKENS)
    directory, grid = tmp_path / "iter_0000001", Grid(ep=2)
    ranks = [checkpoint.load_trusted(checkpoint.rank_file(directory, grid, rank)) for rank in grid.ranks()]
    key = "decoder.layers.0.mlp.experts.local_experts.{}.linear_fc1.weight"
    experts = [rank["model"][key.format(local)] for rank in ranks for local in range(4)]
    assert len({expert.numpy().tobytes() for expert in experts}) == 8


def test_folder_names_are_read_by_the_args(megatron_pool: MegatronPool, tmp_path: Path, mixtral: Path) -> None:
    root = by_hand.convert(mixtral, tmp_path, ep=2)
    assert (root / "iter_0000001" / "mp_rank_00_001").is_dir()
    with pytest.raises(OracleError, match=r"holds Grid\(tp=1, pp=1, ep=2, etp=1\), not {'pp': 2}"):
        megatron_pool.logits(root, TOKENS, pp=2)


def test_more_ways_for_experts_than_for_the_rest_have_no_folder_names(tmp_path: Path, mixtral: Path) -> None:
    with pytest.raises(OracleError, match="share a file"):
        by_hand.convert(mixtral, tmp_path, tp=1, etp=2)


def test_an_argument_left_out_is_named(megatron_pool: MegatronPool, tmp_path: Path, mixtral: Path) -> None:
    root = by_hand.convert(mixtral, tmp_path)
    path = checkpoint.rank_file(root / "iter_0000001", Grid(), Rank())
    content = checkpoint.load_rank(path)
    del content["args"].moe_router_pre_softmax
    torch.save(content, path)
    with pytest.raises(OracleError, match="args lack moe_router_pre_softmax"):
        megatron_pool.logits(root, TOKENS)

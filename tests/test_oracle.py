"""The oracle judges itself: a right checkpoint agrees with transformers, and each wrong one is told apart."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.oracle import by_hand, checkpoint
from tests.oracle.args import megatron_args
from tests.oracle.checkpoint import Grid, Rank
from tests.oracle.errors import OracleError
from tests.oracle.hf import FAMILIES, hf_logits, make_model, sample_tokens
from tests.oracle.pool import MegatronPool, write_checkpoint
from tests.pairs import latin

TOKENS = sample_tokens()
VOCABULARY = 199
IMPLS = ("local", "transformer_engine")


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours[..., :VOCABULARY] - theirs).abs().max())


def edit(root: Path, change: Callable[[dict[str, Any]], object], tp_rank: int = 0) -> None:
    """Apply `change` to the dict of one rank of a checkpoint with PP 1."""
    path = checkpoint.rank_file(root / "iter_0000001", Grid(), Rank(tp_rank))
    content = checkpoint.load_rank(path)
    change(content)
    torch.save(content, path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama2", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_deterministic_and_every_form_of_a_model_is_the_same_model(family: str, tmp_path: Path) -> None:
    first = make_model(family, tmp_path / "a", dtype="bfloat16")
    again = make_model(family, tmp_path / "b", dtype="bfloat16")
    other = make_model(
        family, tmp_path / "c", dtype="bfloat16", weights="bin", max_shard_size="50KB", legacy_config=True
    )
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert (other / "pytorch_model.bin.index.json").exists() and not list(other.glob("*safetensors*"))
    assert torch.equal(hf_logits(first, TOKENS), hf_logits(other, TOKENS))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_converted_by_hand_agrees_with_transformers(
    megatron_pool: MegatronPool, tmp_path: Path, family: str
) -> None:
    hf = make_model(family, tmp_path / "hf")
    expected = hf_logits(hf, TOKENS)
    grids = ((1, 1), (2, 1), (2, 2), (4, 1), (1, 4))
    for _, (tp, pp), impl in [case for case in latin([*FAMILIES], grids, IMPLS) if case[0] == family]:
        root = by_hand.convert(hf, tmp_path / f"{tp}_{pp}", tp=tp, pp=pp, impl=impl)
        assert difference(megatron_pool.logits(root, TOKENS, tp=tp, pp=pp), expected) < 1e-5


@pytest.mark.parametrize("impl", IMPLS)
def test_tensor_parallel_size_may_exceed_the_query_groups(
    megatron_pool: MegatronPool, tmp_path: Path, impl: str
) -> None:
    hf = make_model("qwen2", tmp_path / "hf", num_key_value_heads=2)
    root = by_hand.convert(hf, tmp_path / "meg", tp=4, impl=impl)
    assert difference(megatron_pool.logits(root, TOKENS), hf_logits(hf, TOKENS)) < 1e-5


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("llama2", dict(layernorm_epsilon=1e-6)),
        ("llama3", dict(rotary_base=10000)),
        ("llama3.1", dict(use_rope_scaling=False)),
        ("llama3.2-tied", dict(rope_scaling_factor=8.0)),
        ("mistral-window", dict(window_size=None)),
        ("mistral-window", dict(window_size=(7, 0))),
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_wrong_argument_shows(
    megatron_pool: MegatronPool, tmp_path: Path, family: str, wrong: dict[str, Any], impl: str
) -> None:
    hf = make_model(family, tmp_path / "hf")
    root = by_hand.convert(hf, tmp_path / "meg", impl=impl, **wrong)
    assert difference(megatron_pool.logits(root, TOKENS), hf_logits(hf, TOKENS)) > 1e-3


def test_swapped_query_and_key_rows_show(megatron_pool: MegatronPool, tmp_path: Path, llama: Path) -> None:
    root = by_hand.convert(llama, tmp_path)

    def swap(content: dict[str, Any]) -> None:
        rows = content["model"]["decoder.layers.1.self_attention.linear_qkv.weight"].view(4, 4, 8, 64)
        rows[:, [1, 2]] = rows[:, [2, 1]]  # of each group's [q, q, k, v]

    edit(root, swap)
    assert difference(megatron_pool.logits(root, TOKENS), hf_logits(llama, TOKENS)) > 1e-3


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "overrides",
    [
        dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
        dict(tensor_model_parallel_size=4, num_query_groups=2, add_bias_linear=True, params_dtype=torch.bfloat16),
        dict(pipeline_model_parallel_size=4, untie_embeddings_and_output_weights=False, qk_layernorm=True),
        dict(pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=1, num_query_groups=None),
        dict(
            num_layers=6,
            pipeline_model_parallel_size=4,
            account_for_embedding_in_pipeline_split=True,
            account_for_loss_in_pipeline_split=True,
        ),
    ],
)
def test_what_megatron_writes_reads_back(
    megatron_pool: MegatronPool, tmp_path: Path, overrides: dict[str, Any], impl: str
) -> None:
    args = megatron_args(transformer_impl=impl, **overrides)
    expected = write_checkpoint(megatron_pool, tmp_path, args, seed=3, tokens=TOKENS, iteration=7)
    assert expected.shape == (*TOKENS.shape, args.padded_vocab_size)
    assert torch.equal(megatron_pool.logits(tmp_path, TOKENS, by_megatron=True), expected)
    assert (tmp_path / "iter_0000007").is_dir()


@pytest.mark.parametrize("impl", IMPLS)
def test_ranks_concatenated_are_the_same_model(megatron_pool: MegatronPool, tmp_path: Path, impl: str) -> None:
    args = megatron_args(transformer_impl=impl, tensor_model_parallel_size=4, add_bias_linear=True)
    expected = write_checkpoint(megatron_pool, tmp_path / "tp4", args, seed=5, tokens=TOKENS)
    directory = tmp_path / "tp4" / "iter_0000001"
    ranks = [checkpoint.load_trusted(checkpoint.rank_file(directory, Grid(tp=4), Rank(rank))) for rank in range(4)]
    state = {key: _concatenated(key, [rank["model"][key] for rank in ranks]) for key in ranks[0]["model"]}
    path = checkpoint.rank_file(tmp_path / "tp1" / "iter_0000001", Grid(), Rank())
    path.parent.mkdir(parents=True)
    whole = megatron_args(transformer_impl=impl, add_bias_linear=True, make_vocab_size_divisible_by=64)
    del whole.exit_signal
    torch.save({"args": whole, "checkpoint_version": 3.0, "iteration": 1, "model": state}, path)
    checkpoint.write_tracker(tmp_path / "tp1", 1)
    torch.testing.assert_close(megatron_pool.logits(tmp_path / "tp1", TOKENS), expected, atol=1e-5, rtol=0)


def _concatenated(key: str, parts: list[Any]) -> Any:
    if "linear_fc1." in key and key.endswith(("c1.weight", "c1.bias")):
        gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat([*gates, *ups])
    if key.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return torch.cat(parts, dim=1)
    if key.endswith(("linear_qkv.weight", "linear_qkv.bias", "word_embeddings.weight", "output_layer.weight")):
        return torch.cat(parts)
    assert all(part is None or torch.equal(part, parts[0]) for part in parts), f"{key} differs between ranks"
    return parts[0]


QKV = "decoder.layers.2.self_attention.linear_qkv.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["model"].pop(QKV), ["Missing key", QKV, "mp_rank_01"]),
        (
            lambda c: c["model"].update({"decoder.extra.weight": torch.ones(1)}),
            ["Unexpected key", "decoder.extra.weight"],
        ),
        (lambda c: c["model"].update({QKV: torch.ones(3, 5)}), ["size mismatch", QKV, "[3, 5]", "[64, 64]"]),
        (lambda c: c["model"].update({QKV: c["model"][QKV].half()}), [QKV, "float16", "params_dtype"]),
        (lambda c: setattr(c["args"], "norm_epsilon", 1e-3), ["norm_epsilon", "0.001", "1e-05"]),
        (lambda c: setattr(c["args"], "tensor_model_parallel_size", 1), ["tensor_model_parallel_size is 1, not 2"]),
        (lambda c: setattr(c["args"], "lr", 1), ["args differ between ranks: lr"]),
        (lambda c: c.pop("iteration"), ["no 'iteration'"]),
        (lambda c: c.update(iteration=2), ["iteration is 2, not 1"]),
    ],
)
def test_what_is_wrong_with_one_rank_is_named(
    megatron_pool: MegatronPool,
    tmp_path: Path,
    llama: Path,
    change: Callable[[dict[str, Any]], object],
    words: list[str],
) -> None:
    root = by_hand.convert(llama, tmp_path, tp=2)
    edit(root, change, tp_rank=1)
    with pytest.raises(OracleError) as error:
        megatron_pool.logits(root, TOKENS)
    assert not [word for word in words if word not in str(error.value)], str(error.value)


def test_transformer_engine_names_need_their_extra_state(
    megatron_pool: MegatronPool, tmp_path: Path, llama: Path
) -> None:
    root = by_hand.convert(llama, tmp_path, impl="transformer_engine")
    edit(root, lambda content: content["model"].pop("decoder.layers.0.mlp.linear_fc2._extra_state"))
    with pytest.raises(OracleError, match=r"Missing key.*layers\.0\.mlp\.linear_fc2\._extra_state"):
        megatron_pool.logits(root, TOKENS)


def test_the_other_implementation_does_not_load(megatron_pool: MegatronPool, tmp_path: Path, llama: Path) -> None:
    root = by_hand.convert(llama, tmp_path)
    with pytest.raises(OracleError, match=r"linear_qkv\.layer_norm_weight"):
        megatron_pool.logits(root, TOKENS, impl="transformer_engine")


def test_an_argument_left_out_is_named(megatron_pool: MegatronPool, tmp_path: Path, llama: Path) -> None:
    root = by_hand.convert(llama, tmp_path)
    edit(root, lambda content: delattr(content["args"], "kv_channels"))
    with pytest.raises(OracleError, match="args lack kv_channels"):
        megatron_pool.logits(root, TOKENS)


def test_a_damaged_file_is_named(megatron_pool: MegatronPool, tmp_path: Path, llama: Path) -> None:
    root = by_hand.convert(llama, tmp_path, tp=2)
    path = checkpoint.rank_file(root / "iter_0000001", Grid(tp=2), Rank(1))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(OracleError, match=r"mp_rank_01/model_optim_rng\.pt"):
        megatron_pool.logits(root, TOKENS)


def test_a_folder_without_one_rank_is_refused(megatron_pool: MegatronPool, tmp_path: Path, llama: Path) -> None:
    root = by_hand.convert(llama, tmp_path, tp=2, pp=2)
    (root / "iter_0000001" / "mp_rank_01_001").rename(tmp_path / "away")
    with pytest.raises(OracleError, match="not a full grid"):
        megatron_pool.logits(root, TOKENS)


def test_a_file_with_another_class_in_it_is_refused(megatron_pool: MegatronPool, tmp_path: Path, llama: Path) -> None:
    root = by_hand.convert(llama, tmp_path)
    edit(root, lambda content: setattr(content["args"], "where", Path("anywhere")))
    with pytest.raises(OracleError, match="WeightsUnpickler error"):
        megatron_pool.logits(root, TOKENS)


@pytest.fixture(scope="module")
def small_pool() -> Iterator[MegatronPool]:
    pool = MegatronPool(size=2, timeout=60)
    yield pool
    pool.close()


def _fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("a mistake of one rank")
    dist.barrier()


def _die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def _rank() -> int:
    return dist.get_rank()


@pytest.mark.xdist_group("megatron")
@pytest.mark.parametrize(
    ("job", "words"),
    [(_fail_on_rank_one, "a mistake of one rank"), (_die_on_rank_one, r"process 1 ended with exit code 3")],
)
def test_a_failing_rank_neither_hangs_nor_ends_the_pool(
    small_pool: MegatronPool, job: Callable[[], None], words: str
) -> None:
    with pytest.raises(OracleError, match=words):
        small_pool.run(job)
    assert small_pool.run(_rank) == [0, 1]


def test_made_up_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="rotary_bass"):
        megatron_args(rotary_bass=5)
    assert isinstance(megatron_args(), Namespace)

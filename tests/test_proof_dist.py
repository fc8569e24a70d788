"""The proof for distributed checkpoints: what the real megatron-core saves comes back to Hugging Face bit by bit, and what we
write it loads at any sizes and computes what transformers computes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_converters.basics.errors import ConversionError
from tests.conversions import different, hf_to_torch_dist, megatron_to_hf
from tests.helpers import hf_tensors
from tests.oracle import checkpoint
from tests.oracle.args import megatron_args
from tests.oracle.checkpoint import Grid, Rank
from tests.oracle.hf import KINDS_OF_TENSORS, MOE_FAMILIES, hf_logits, make_model, sample_tokens
from tests.oracle.pool import MegatronPool, write_checkpoint, write_distributed
from tests.pairs import chessboard, latin

TOKENS = sample_tokens()
VOCABULARY = 199
TOLERANCE = 1e-4

DENSE: dict[str, dict[str, Any]] = {
    "llama, TP2 PP2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "llama with biases, TP4, bf16": {
        "tensor_model_parallel_size": 4,
        "add_bias_linear": True,
        "params_dtype": torch.bfloat16,
    },
    "tied llama, PP4": {"pipeline_model_parallel_size": 4, "untie_embeddings_and_output_weights": False},
    "qwen2, PP2 uneven": {
        "add_qkv_bias": True,
        "pipeline_model_parallel_size": 2,
        "decoder_first_pipeline_num_layers": 1,
    },
    "virtual stages": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "tied qwen3, TP2": {
        "qk_layernorm": True,
        "kv_channels": 32,
        "untie_embeddings_and_output_weights": False,
        "tensor_model_parallel_size": 2,
    },
}


def check(pool: MegatronPool, tmp_path: Path, args: Any, **metadata: Any) -> None:
    """Both formats of one model become the same Hugging Face model, which computes what megatron-core computes."""
    wanted = write_distributed(pool, tmp_path / "torch_dist", args, seed=3, tokens=TOKENS, **metadata)
    assert torch.equal(write_checkpoint(pool, tmp_path / "torch", args, seed=3, tokens=TOKENS), wanted)
    assert torch.equal(pool.distributed_logits(tmp_path / "torch_dist", TOKENS), wanted), (
        "the oracle disagrees with itself"
    )
    megatron_to_hf(tmp_path / "torch", tmp_path / "from_torch")
    back = megatron_to_hf(tmp_path / "torch_dist", tmp_path / "hf")
    assert different(hf_tensors(tmp_path / "from_torch"), hf_tensors(back)) == []
    assert float((hf_logits(back, TOKENS) - wanted[..., :VOCABULARY]).abs().max()) < TOLERANCE


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
@pytest.mark.parametrize("name", DENSE)
def test_dense_model_of_real_megatron_to_hf(megatron_pool: MegatronPool, tmp_path: Path, name: str, impl: str) -> None:
    check(megatron_pool, tmp_path, megatron_args(**DENSE[name], transformer_impl=impl))


@pytest.mark.parametrize("how", [{"non_homogeneous_layers": True}, {"singleton_local_shards": True}], ids=str)
def test_layers_with_keys_of_their_own(megatron_pool: MegatronPool, tmp_path: Path, how: dict[str, bool]) -> None:
    args = megatron_args(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, add_bias_linear=True)
    check(megatron_pool, tmp_path, args, **how)


def test_keys_of_a_wrapped_model(megatron_pool: MegatronPool, tmp_path: Path) -> None:
    """As NeMo 2 saves it, in `weights` and with all keys behind `module.`."""
    args = megatron_args(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    wanted = write_distributed(megatron_pool, tmp_path / "made", args, seed=3, tokens=TOKENS, wrapper="module.")
    (tmp_path / "nemo" / "context").mkdir(parents=True)
    shutil.move(tmp_path / "made" / "iter_0000001", tmp_path / "nemo" / "weights")
    back = megatron_to_hf(tmp_path / "nemo", tmp_path / "hf")
    assert float((hf_logits(back, TOKENS) - wanted[..., :VOCABULARY]).abs().max()) < TOLERANCE


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_a_state_dict_of_real_megatron(megatron_pool: MegatronPool, tmp_path: Path, impl: str) -> None:
    """As `torch_dcp` has it: what megatron-core's `state_dict` gives, saved by torch.distributed.checkpoint."""
    args = megatron_args(transformer_impl=impl, add_bias_linear=True)
    wanted = write_checkpoint(megatron_pool, tmp_path / "torch", args, seed=3, tokens=TOKENS)
    content = checkpoint.load_trusted(checkpoint.rank_file(tmp_path / "torch" / "iter_0000001", Grid(), Rank()))
    dcp.save(content, checkpoint_id=tmp_path / "dcp", no_dist=True)
    back = megatron_to_hf(tmp_path / "dcp", tmp_path / "hf")
    assert float((hf_logits(back, TOKENS) - wanted[..., :VOCABULARY]).abs().max()) < TOLERANCE


@pytest.mark.parametrize("write", [write_checkpoint, write_distributed])
def test_layers_of_prediction_that_are_left_out(
    write: Callable[..., torch.Tensor], megatron_pool: MegatronPool, tmp_path: Path
) -> None:
    """A dense model with multi-token prediction, which its family does not have."""
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    args = megatron_args(**sizes, qk_layernorm=True, mtp_num_layers=1, transformer_impl="transformer_engine")
    wanted = write(megatron_pool, tmp_path / "made", args, seed=3, tokens=TOKENS)
    with pytest.raises(ConversionError, match=r"mtp_num_layers=1: no family .* pass --without-mtp"):
        megatron_to_hf(tmp_path / "made", tmp_path / "hf")
    back = megatron_to_hf(tmp_path / "made", tmp_path / "hf", without_mtp=True)
    assert float((hf_logits(back, TOKENS) - wanted[..., :VOCABULARY]).abs().max()) < TOLERANCE


#: Tensor-, pipeline-, expert- and expert-tensor-parallel sizes. Ranks' files of the `torch` format exist for all of them.
GRIDS = ((1, 1, 1, 1), (2, 1, 2, 2), (2, 1, 2, 1), (1, 2, 2, 1))
EXPERTS: dict[str, dict[str, Any]] = {
    "sequential": {"transformer_impl": "transformer_engine"},
    "grouped": {"transformer_impl": "transformer_engine", "moe_grouped_gemm": True},
    "sequential, local": {"transformer_impl": "local"},
    "stacked, local": {"transformer_impl": "local", "moe_grouped_gemm": True},
    "qwen3, dense layers": {
        "transformer_impl": "transformer_engine",
        "moe_grouped_gemm": True,
        "moe_layer_freq": [0, 1, 1, 0],
        "qk_layernorm": True,
    },
    "qwen2, shared expert": {
        "transformer_impl": "transformer_engine",
        "add_qkv_bias": True,
        "moe_shared_expert_intermediate_size": 32,
        "moe_shared_expert_gate": True,
    },
}


def moe_args(grid: tuple[int, int, int, int], **more: Any) -> Any:
    names = ("tensor_model", "pipeline_model", "expert_model", "expert_tensor")
    sizes = {f"{name}_parallel_size": size for name, size in zip(names, grid, strict=True)}
    return megatron_args(num_experts=8, moe_ffn_hidden_size=48, **sizes, **more)


@pytest.mark.parametrize(("name", "grid"), chessboard(EXPERTS, GRIDS), ids=str)
def test_experts_of_real_megatron_to_hf(
    megatron_pool: MegatronPool, tmp_path: Path, name: str, grid: tuple[int, int, int, int]
) -> None:
    check(megatron_pool, tmp_path, moe_args(grid, **EXPERTS[name]))


@pytest.mark.parametrize("grouped", [False, True])
def test_experts_with_keys_of_their_own(megatron_pool: MegatronPool, tmp_path: Path, grouped: bool) -> None:
    args = moe_args((2, 1, 2, 2), transformer_impl="transformer_engine", moe_grouped_gemm=grouped)
    check(megatron_pool, tmp_path, args, singleton_local_shards=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, torch.Tensor]]:
    """A family's tiny model and the logits that transformers computes from it."""

    @cache
    def make(family: str) -> tuple[Path, torch.Tensor]:
        folder = make_model(family, tmp_path_factory.mktemp("models") / family)
        return folder, hf_logits(folder, TOKENS)

    return make


Models = Callable[[str], tuple[Path, torch.Tensor]]
Cuts = tuple[dict[str, int], tuple[dict[str, int], ...]]
#: Sizes that the chunks are cut for, and sizes at which megatron-core loads them.
CUTS = (
    ({}, ({"tp": 2, "pp": 2}, {"pp": 4})),
    ({"tp": 4, "pp": 1}, ({"tp": 2, "pp": 2},)),
    ({"tp": 2, "pp": 2}, ({"tp": 4}, {})),
)


def check_loads(
    pool: MegatronPool, root: Path, wanted: torch.Tensor, impl: str, sizes: Iterable[dict[str, int]]
) -> None:
    for at in sizes:
        whole = {"tp": 1, "pp": 1, "ep": 1, "etp": 1, **at}
        got = pool.distributed_logits(root, TOKENS, impl=impl, **whole)[..., :VOCABULARY]
        assert float((got - wanted).abs().max()) < TOLERANCE, at


@pytest.mark.parametrize(
    ("family", "cut_and_sizes", "impl"), latin(KINDS_OF_TENSORS, CUTS, ["local", "transformer_engine"]), ids=str
)
def test_megatron_loads_what_we_write(
    megatron_pool: MegatronPool,
    models: Models,
    tmp_path: Path,
    family: str,
    cut_and_sizes: Cuts,
    impl: str,
) -> None:
    folder, wanted = models(family)
    cut, sizes = cut_and_sizes
    root = hf_to_torch_dist(folder, tmp_path / "torch_dist", impl=impl, **cut)
    check_loads(megatron_pool, root, wanted, impl, sizes)
    assert different(hf_tensors(folder), hf_tensors(megatron_to_hf(root, tmp_path / "hf"))) == []


MOE_CUTS = (
    ({}, ({"tp": 2, "ep": 2, "etp": 1}, {"pp": 2, "ep": 2})),
    ({"tp": 2, "ep": 2, "etp": 2}, ({"tp": 2, "pp": 2, "etp": 2}, {"ep": 4})),
    ({"tp": 1, "pp": 2, "ep": 2, "etp": 2}, ({"tp": 2, "ep": 2, "etp": 2},)),
)


MOE_STORED = (("transformer_engine", "grouped"), ("local", "sequential"))


@pytest.mark.parametrize(
    ("family", "cut_and_sizes", "stored"),
    latin([family for family in MOE_FAMILIES if family != "olmoe"], MOE_CUTS, MOE_STORED),
    ids=str,
)
def test_megatron_loads_experts_that_we_write(
    megatron_pool: MegatronPool,
    models: Models,
    tmp_path: Path,
    family: str,
    cut_and_sizes: Cuts,
    stored: tuple[str, str],
) -> None:
    folder, wanted = models(family)
    (cut, sizes), (impl, layout) = cut_and_sizes, stored
    root = hf_to_torch_dist(folder, tmp_path / "torch_dist", impl=impl, expert_layout=layout, **cut)
    check_loads(megatron_pool, root, wanted, impl, sizes)
    assert different(hf_tensors(folder), hf_tensors(megatron_to_hf(root, tmp_path / "hf"))) == []

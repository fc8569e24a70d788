"""The proof for distributed checkpoints: what the real megatron-core saves comes back to Hugging Face bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conversions import different, hf_tensors, megatron_to_hf
from tests.oracle.args import megatron_args
from tests.oracle.hf import hf_logits, sample_tokens
from tests.oracle.pool import MegatronPool, write_checkpoint, write_distributed

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


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_of_real_megatron_to_hf(
    megatron_pool: MegatronPool, tmp_path: Path, name: str, grid: tuple[int, int, int, int]
) -> None:
    check(megatron_pool, tmp_path, moe_args(grid, **EXPERTS[name]))


@pytest.mark.parametrize("grouped", [False, True])
def test_experts_with_keys_of_their_own(megatron_pool: MegatronPool, tmp_path: Path, grouped: bool) -> None:
    args = moe_args((2, 1, 2, 2), transformer_impl="transformer_engine", moe_grouped_gemm=grouped)
    check(megatron_pool, tmp_path, args, singleton_local_shards=True)

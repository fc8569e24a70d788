"""Norms of queries and of keys over all heads together, for layers whose attention is megatron-core's."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig


class NormOverHeads(torch.nn.Module):
    """RMS norm of the heads [S, B, heads / TP, channels] of a tensor-parallel rank over those of all ranks, in float32.

    Each rank has all weights, and gradients of its own heads' alone: with `--qk-layernorm` megatron-core adds up those of every
    `q_layernorm` and `k_layernorm` over the ranks (core/distributed/finalize_model_grads.py).
    """

    def __init__(self, heads: int, channels: int, eps: float) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        self.weight = torch.nn.Parameter(torch.ones(heads * channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normed heads, in the dtype of `x`."""
        own, ranks = x.flatten(2).float(), parallel_state.get_tensor_model_parallel_world_size()
        mean = own.square().mean(-1, keepdim=True)
        if ranks > 1:  # every head is on as many ranks as any other, so that this is the mean over all heads
            mean = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(mean)) / ranks
        first = parallel_state.get_tensor_model_parallel_rank() * self.heads // ranks * x.shape[-1]
        weight = self.weight[first : first + own.shape[-1]].float()
        return (own * torch.rsqrt(mean + self.eps) * weight).type_as(x).view_as(x)


class QueryNorm:
    """Norm of queries, for a spec of attention."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float) -> Any:
        """Norm over all heads, each of `hidden_size` channels."""
        return NormOverHeads(config.num_attention_heads, hidden_size, eps)


class KeyNorm:
    """Norm of keys, for a spec of attention."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float) -> Any:
        """Norm over all query groups, each of `hidden_size` channels."""
        return NormOverHeads(config.num_query_groups, hidden_size, eps)


def norm_over_heads(layer: Any, config: TransformerConfig) -> None:
    """Replace the norms of each head in a layer's `submodules`; raises `ValueError` where there are none, or others."""
    if not config.qk_layernorm or config.normalization != "RMSNorm":
        raise ValueError(
            f"qk_layernorm={config.qk_layernorm}, normalization={config.normalization!r}: norms over all heads need "
            "--qk-layernorm and --normalization RMSNorm"
        )
    attention = layer.self_attention.submodules
    attention.q_layernorm, attention.k_layernorm = QueryNorm, KeyNorm

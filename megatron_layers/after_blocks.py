"""Norms of the outputs of attention and MLP, before these are added to the residual stream.

They are part of the linear that a block ends with, and named as Megatron-Bridge names them: `linear_proj.post_layernorm` and
`linear_fc2.post_layernorm`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from .stock import has_engine, mlp_submodules

Linear: Any = torch.nn.Module


class Normed(Linear):  # type: ignore[misc]
    """Mixin of a row-parallel linear, whose output with its bias is normed by a `norm`."""

    norm: Any = WrappedTorchNorm

    def __init__(self, *args: Any, config: TransformerConfig, **options: Any) -> None:
        """As the linear of megatron-core."""
        super().__init__(*args, config=config, **options)
        self.post_layernorm = self.norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, *args: Any, **options: Any) -> tuple[torch.Tensor, None]:
        """Normed output, and no bias, which is in it."""
        out, bias = super().forward(*args, **options)
        return self.post_layernorm(out if bias is None else out + bias), None


class NormedRowParallelLinear(Normed, RowParallelLinear):  # type: ignore[misc] # megatron is untyped
    """megatron-core's linear with a norm after it."""


def norm_after_blocks(layer: Any, config: TransformerConfig) -> None:
    """Add norms after both blocks to a layer's `submodules`."""
    linear = NormedRowParallelLinear
    if has_engine(config):
        from .engine import NormedTERowParallelLinear as linear
    layer.self_attention.submodules.linear_proj = mlp_submodules(layer).linear_fc2 = linear


def no_norm_before_blocks(layer: Any, config: TransformerConfig) -> None:
    """Take the norms before both blocks away, those that are part of Transformer Engine's linears too."""
    if has_engine(config):
        from .engine import TEColumnParallelLinear

        layer.self_attention.submodules.linear_qkv = mlp_submodules(layer).linear_fc1 = TEColumnParallelLinear
    layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp

"""Jobs of the pool's processes for a layer of `megatron_layers` by itself: what it computes of its parts, and what it refuses."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F

from megatron_converters.live.on_cpu import cuda_is_cpu
from megatron_converters.logits import cpu

_SIZES: dict[str, Any] = dict(num_layers=1, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4)
_ON_CPU: dict[str, Any] = dict(
    use_cpu_initialization=True, bias_dropout_fusion=False, masked_softmax_fusion=False, persist_layer_norm=False
)
_EPSILON = 0.1


def refusal(name: str, options: dict[str, Any]) -> str:
    """Text of the error with which a layer of this configuration is refused; empty if it is built."""
    try:
        layer_of(name, **options)
    except ValueError as error:
        return str(error)
    return ""


def with_norms_after_blocks(name: str, bias: bool) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Output of a local layer, the same by hand of its weights and of megatron-core's blocks, and its parameters' names."""
    layer = layer_of(name, normalization="RMSNorm", add_bias_linear=bias, layernorm_epsilon=_EPSILON)
    generator, weights = torch.Generator().manual_seed(0), dict(layer.named_parameters())
    with torch.no_grad(), cuda_is_cpu():
        for weight in weights.values():
            weight.copy_(torch.randn(weight.shape, generator=generator))
        x = torch.randn(16, 2, 32, generator=generator)
        mask = torch.ones(16, 16).triu(1).bool()[None, None]
        found = layer(hidden_states=x, attention_mask=mask)[0]
        for linear in (layer.self_attention.linear_proj, layer.mlp.linear_fc2):
            linear.post_layernorm = torch.nn.Identity()
        attended = layer.self_attention(_normed(x, weights.get("input_layernorm.weight")), mask)[0]
        joined = x + _normed(attended, weights["self_attention.linear_proj.post_layernorm.weight"])
        transformed = layer.mlp(_normed(joined, weights.get("pre_mlp_layernorm.weight")))[0]
        expected = joined + _normed(transformed, weights["mlp.linear_fc2.post_layernorm.weight"])
    return found, expected, sorted(weights)


def _normed(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return x if weight is None else F.rms_norm(x, x.shape[-1:], weight, _EPSILON)


def layer_of(name: str, **options: Any) -> torch.nn.Module:
    """Layer of the package for a small config, with LayerNorms unless the options say otherwise, in a process of its own."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import build_module

    spec = importlib.import_module(f"megatron_layers.{name}").spec
    cpu.cut(1, 1, 1, 1)
    with cuda_is_cpu():
        config = TransformerConfig(**{**_SIZES, **_ON_CPU, "transformer_impl": "local", **options})
        layer: torch.nn.Module = build_module(spec, config=config).eval()
    return layer

"""Jobs of the pool's processes for live models, and for a parallel block by itself: how it drops out."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_converters.live.on_cpu import cuda_is_cpu
from megatron_converters.logits import cpu
from tests.conversions import different
from tests.helpers import hf_tensors

from .jobs import Shard, shard
from .layer_jobs import layer_of


def dropped_out(probability: float) -> tuple[torch.Tensor, ...]:
    """What a layer adds to its input in training with dropout, and the outputs of attention and MLP with their biases."""
    layer = layer_of("parallel_shared_norm", hidden_dropout=probability, attention_dropout=0.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), cuda_is_cpu():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        x = torch.randn(16, 2, 32, generator=generator)
        mask = torch.ones(16, 16).triu(1).bool()[None, None]
        normed = layer.input_layernorm(x)
        outputs = layer.self_attention(normed, mask), layer.mlp(normed)
        added = layer.train()(hidden_states=x, attention_mask=mask)[0] - x
    return added, *(output + bias for output, bias in outputs)


def bridged(folder: str, tokens: torch.Tensor, sizes: dict[str, int], impl: str = "local") -> tuple[Shard, list[str]]:
    """This rank's logits of a live model that AutoBridge fills, and the names of tensors whose export differs from the files."""
    from megatron_converters.bridge import AutoBridge
    from megatron_converters.logits import gpt

    tp, pp = sizes.get("tp", 1), sizes.get("pp", 1)
    cpu.cut(tp, pp, 1, tp)
    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    provider.transformer_impl = impl
    provider.tensor_model_parallel_size, provider.pipeline_model_parallel_size = tp, pp
    models = [model.eval() for model in provider(wrap_with_ddp=False)]
    exported = dict(bridge.export_hf_weights(models, mode="replicate", show_progress=False))
    return shard(gpt.run(models, tokens)), different(hf_tensors(Path(folder)), exported)

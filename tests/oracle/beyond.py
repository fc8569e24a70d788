"""What no release of Megatron-LM has and Megatron-Bridge's providers of Gemma add to it, on a model of megatron-core.

The arithmetic of caps is that of transformers 5.23 (models/gemma2). All of it is read from the args that a conversion has written.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel


def add(model: GPTModel, args: Namespace) -> None:
    """Add what the args say to a part of a model."""
    score_cap, logit_cap = (getattr(args, f"{name}_logit_softcapping", None) for name in ("attn", "final"))
    bases, factors = (getattr(args, name, None) for name in ("rotary_bases", "rotary_scaled"))
    for layer in model.decoder.layers:
        if score_cap is not None:
            core = layer.self_attention.core_attention
            core.scores = _capped(core.scores, score_cap)
        if bases is not None:
            number = layer.layer_number - 1
            factor = args.rotary_seq_len_interpolation_factor if factors is None else factors[number]
            _rotate(
                layer.self_attention,
                RotaryEmbedding(
                    args.kv_channels,
                    1.0,
                    rotary_base=bases[number],
                    seq_len_interpolation_factor=factor,
                    use_cpu_initialization=True,
                ),
            )
    if logit_cap is not None and model.post_process:
        model.output_layer.register_forward_hook(lambda module, inputs, out: (_cap(out[0], logit_cap), out[1]))


def _rotate(attention: Any, embedding: RotaryEmbedding) -> None:
    """Let an attention rotate by an embedding of its own."""

    def own(module: Any, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return inputs, {**options, "rotary_pos_emb": embedding(inputs[0].shape[0])}

    attention.register_forward_pre_hook(own, with_kwargs=True)


def _cap(values: torch.Tensor, cap: float) -> torch.Tensor:
    return torch.tanh(values / cap) * cap


def _capped(scores: Callable[..., torch.Tensor], cap: float) -> Callable[..., torch.Tensor]:
    return lambda *operands: _cap(scores(*operands), cap)

"""Multipliers of `--use-mup`, which Megatron-LM has from 0.17 on, added to a model of an earlier megatron-core.

Written after Megatron-LM core_v0.17.1, with the lines cited below. The initialisation, which `--use-mup` changes, too, is left out.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel


def set_softmax_scale(args: Namespace) -> None:
    """Set `args.softmax_scale` as megatron/core/transformer/transformer_config.py:1756-1761; nothing else changes it there."""
    if not getattr(args, "use_mup", False) or getattr(args, "softmax_scale", None) is not None:
        return
    base = 1.0 if args.mup_base_head_dim is None else args.mup_base_head_dim**0.5
    args.softmax_scale = base / args.kv_channels**args.mup_attn_scale_power


def scale(model: GPTModel, args: Namespace) -> None:
    """Multiply embeddings and logits of the parts of a model that have them.

    Embeddings: megatron/core/models/common/embeddings/language_model_embedding.py:130-132, after positions are added. Logits:
    megatron/core/models/common/language_module/language_module.py:300-304, called in core/models/gpt/gpt_model.py:682.
    """
    if not getattr(args, "use_mup", False):
        return
    factor = _logit_factor(args)
    if model.pre_process:
        model.embedding.register_forward_hook(lambda module, inputs, out: out * args.mup_embedding_mult)
    if model.post_process:
        model.output_layer.register_forward_hook(lambda module, inputs, out: _scaled(out, factor))


def _scaled(out: tuple[torch.Tensor, Any], factor: float) -> tuple[torch.Tensor, Any]:
    logits, bias = out
    return logits * factor, bias


def _logit_factor(args: Namespace) -> float:
    """Factor as megatron/core/transformer/transformer_config.py:1750-1766: 1 means that it follows from the width."""
    base = getattr(args, "mup_base_hidden_size", None) or args.hidden_size
    if args.mup_output_mult == 1.0 and base != args.hidden_size:
        return float(base / args.hidden_size)
    return float(args.mup_output_mult)

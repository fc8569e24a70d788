"""megatron-core's GPTModel, built from a checkpoint's args and loaded, only in the pool's processes."""

from __future__ import annotations

import copy
import dataclasses
import re
import zlib
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.experts import GroupedMLP
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_converters.logits import gpt

from . import beyond, checkpoint, mup

_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+")
_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+|(?<=\.linear_fc[12]\.weight)\d+")
_LEGACY_GROUPED = (".experts.weight1", ".experts.weight2")
# Norms of Transformer Engine 2 have an `_extra_state`, those of version 1 and of torch do not; both must load.
_NORM_EXTRA_STATE = re.compile(r".*norm\._extra_state")


def build(args: Namespace, impl: str | None = None) -> list[GPTModel]:
    """This rank's parts of the model that `args` describes, in float32, one for each of its virtual pipeline stages.

    They are built as by Megatron-LM's `gpt_builder`. `impl` is the user's `--transformer-impl`; None takes the one in `args`.
    `--use-mup` (0.17 and later) is added to the models of this release, and so is what only Megatron-Bridge's providers have.
    """
    args = copy.copy(args)
    args.transformer_impl = impl or args.transformer_impl
    mup.set_softmax_scale(args)
    models = gpt.build(args, initialise=True, engine=True)
    for model in models:
        _adapt(model)
        mup.scale(model, args)
        beyond.add(model, args)
    return models


def _adapt(model: GPTModel) -> None:
    config = model.config
    for module in model.modules():
        if isinstance(module, GroupedMLP):  # only an assertion in its forward needs bf16
            module.config = dataclasses.replace(config, bf16=True)


def divide_frequencies(models: list[GPTModel], divisors: Sequence[float]) -> None:
    """Divide the frequencies of all rotary embeddings, as LongRoPE does, for which megatron-core has no argument."""
    for model in models:
        for module in model.modules() if divisors else ():
            if isinstance(module, RotaryEmbedding):
                module.inv_freq /= torch.tensor(divisors)


def load(model: GPTModel, state: dict[str, Any], where: str) -> str | None:
    """Load a rank's state strictly; returns a text with every missing, unexpected and misshapen key, or None."""
    state = dict(state)
    expected = model.state_dict()
    for key in filter(_NORM_EXTRA_STATE.fullmatch, expected.keys() - state.keys()):
        state[key] = None
    for key in filter(_NORM_EXTRA_STATE.fullmatch, state.keys() - expected.keys()):
        del state[key]
    try:
        model.load_state_dict(state, strict=True)
    except (RuntimeError, ValueError) as error:
        return f"{where}: {error}"
    return None


def randomise(models: list[GPTModel], seed: int, dtype: torch.dtype) -> None:
    """Set every parameter to random values that `dtype` can hold; copies on several ranks are equal."""
    with torch.no_grad():
        for model in models:
            names = _GlobalNames(model)
            for name, parameter in (*model.named_parameters(), *_expert_biases(model)):
                key = f"{seed} {_shard(name, parameter)} {names.get(name)}"
                generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(_scaled(name, noise).to(checkpoint.stored_dtype(name, dtype)))


def fingerprints(models: list[GPTModel]) -> list[tuple[str, tuple[int, ...], int]]:
    """Name, part of the model and checksum of each parameter; equal parts must have equal checksums."""
    rank = parallel_state.get_pipeline_model_parallel_rank()
    experts = parallel_state.get_expert_model_parallel_rank()
    return [
        (name, (rank, stage, experts * (".experts." in name), _shard(name, value)), zlib.crc32(value.detach().numpy()))
        for stage, model in enumerate(models)
        for name, value in (*model.named_parameters(), *_expert_biases(model))
    ]


def _expert_biases(model: GPTModel) -> list[tuple[str, torch.Tensor]]:
    return [(name, buffer) for name, buffer in model.named_buffers() if name.endswith(".router.expert_bias")]


def _shard(name: str, parameter: torch.Tensor) -> int:
    """Number of this rank's part of a parameter; ranks with the same number hold the same values."""
    if ".experts." in name:
        return int(parallel_state.get_expert_tensor_parallel_rank())
    # megatron-core cuts sinks without marking them (core/transformer/dot_product_attention.py).
    cut = getattr(parameter, "tensor_model_parallel", False) or name.endswith(".softmax_offset")
    return int(parallel_state.get_tensor_model_parallel_rank()) if cut else 0


class _GlobalNames:
    """Names of a rank's parameters, with layers and experts numbered over the whole model."""

    def __init__(self, model: GPTModel):
        self.layers = get_transformer_layer_offset(model.config, model.vp_stage)
        experts = model.config.num_moe_experts or 0
        self.experts = (
            experts // model.config.expert_model_parallel_size * (parallel_state.get_expert_model_parallel_rank())
        )
        self.tied = model.share_embeddings_and_output_weights

    def get(self, name: str) -> str:
        if self.tied and name == "output_layer.weight":
            return "embedding.word_embeddings.weight"
        name = _LAYER.sub(lambda match: str(int(match[0]) + self.layers), name)
        if name.endswith(_LEGACY_GROUPED):  # one tensor holds all of the rank's experts
            return f"{name} from {self.experts}"
        return _EXPERT.sub(lambda match: str(int(match[0]) + self.experts), name)


def _scaled(name: str, noise: torch.Tensor) -> torch.Tensor:
    if name.endswith(("norm.weight", "layer_norm_weight")):
        return 1 + 0.3 * noise
    if name.endswith(("bias", "router.weight", "gate_weight")):
        return 0.3 * noise
    return (0.1 if "linear_qkv" in name else 0.05) * noise

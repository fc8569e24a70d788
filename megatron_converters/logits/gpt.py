"""megatron-core's GPTModel, built from Megatron-LM's args and run on a CPU, in a process that has called `cpu.prepare`."""

from __future__ import annotations

from argparse import Namespace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding
from megatron.core.models.gpt import GPTModel

from ..basics.errors import ConversionError
from ..live import buildable_args
from ..live.on_cpu import cuda_is_cpu
from ..live.provider import ON_CPU, provider_of


def build(
    args: Namespace, initialise: bool = False, engine: bool = False, cut_down_projections: bool = False
) -> list[GPTModel]:
    """This rank's parts of the model that `args` describes, in float32, one for each of its virtual pipeline stages.

    They are built as by Megatron-LM's `gpt_builder` (0.16). Without `initialise` the parameters are uninitialised and lack
    megatron's attributes; a strict load then fills them all. `engine` says that this process has Transformer Engine's layers,
    `cut_down_projections` that rank files of multi-latent attention are those of a release before 0.14.
    Raises `ConversionError` if arguments are missing, or if the model needs those layers and there are none.
    """
    needing = buildable_args.needing_engine(vars(args))
    if needing and not engine:
        raise ConversionError(f"args have {', '.join(needing)}, which needs Transformer Engine")
    provider = provider_of(
        vars(args),
        **ON_CPU,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        perform_initialization=initialise,
        vocab_size=args.padded_vocab_size,
        should_pad_vocab=False,
        cut_down_projections=cut_down_projections,
    )
    provider.finalize()  # which counts the virtual stages of a layout
    vpp = provider.virtual_pipeline_model_parallel_size
    parallel_state.set_virtual_pipeline_model_parallel_world_size(vpp)
    return [provider.provide(vp_stage=number).eval() for number in (range(vpp) if vpp else [None])]


def run(models: list[GPTModel], tokens: torch.Tensor) -> torch.Tensor | None:
    """Run the pipeline for int64 tokens [B, S]; on the last stage, returns float32 [B, S, padded vocabulary / TP]."""
    return [_run(model, tokens) for model in models][-1]


def _run(model: GPTModel, tokens: torch.Tensor) -> torch.Tensor | None:
    batch, length = tokens.shape
    if not model.pre_process:
        hidden = torch.empty(length, batch, model.config.hidden_size)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    with torch.no_grad(), cuda_is_cpu():
        out: torch.Tensor = model(tokens, torch.arange(length).expand(batch, -1), attention_mask=None)
    for embedding in (RotaryEmbedding, YarnRotaryEmbedding):
        embedding.forward.cache_clear()  # else its cache keeps every model of the process alive
    if model.post_process:
        return out
    dist.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return None

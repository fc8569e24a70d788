"""A provider's models as a training program takes them: loaded, in wrappers of half precision and of data parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module

from .building import build
from .log import LOG
from .on_cpu import where_it_runs

Models = list[torch.nn.Module]
Hook = Callable[[Models], Models | None]


def provide(
    provider: Any,
    load: Callable[[Models], None] | None,
    *,
    wrap_with_ddp: bool | None,
    ddp_config: DistributedDataParallelConfig | None,
    overlap_param_gather_with_optimizer_step: bool,
    pre_wrap_hooks: list[Hook],
    post_wrap_hook: Hook | None,
) -> Models:
    """This process's models. `load` fills them; without it they have megatron-core's initial values."""
    models = build(provider, empty=load is not None)
    if provider.fp16 or provider.bf16:
        models = [_in_half_precision(model) for model in models]
    if load is not None:
        load(models)
    for hook in pre_wrap_hooks:
        models = hook(models) or models
    if wrap_with_ddp is None:
        wrap_with_ddp = torch.cuda.is_available()
        if not wrap_with_ddp:
            LOG.info(
                "the model is not wrapped with DistributedDataParallel, since there is no GPU; wrap_with_ddp=True does it"
            )
    if wrap_with_ddp:
        models = _wrapped(models, ddp_config, overlap_param_gather_with_optimizer_step)
    return (post_wrap_hook(models) or models) if post_wrap_hook is not None else models


def _in_half_precision(model: torch.nn.Module) -> torch.nn.Module:
    """Model in megatron-core's wrapper, which would also round buffers that are meant to stay float32."""
    wide = {name: buffer.dtype for name, buffer in model.named_buffers() if buffer.dtype == torch.float32}
    wrapped = Float16Module(model.config, model)
    for name, dtype in wide.items():
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        module._buffers[key] = module._buffers[key].to(dtype)  # type: ignore[union-attr]
    return wrapped  # type: ignore[no-any-return]


def _wrapped(models: Models, config: DistributedDataParallelConfig | None, overlap: bool) -> Models:
    settings = config or DistributedDataParallelConfig()
    with where_it_runs():
        return [
            DistributedDataParallel(
                config=model.config, ddp_config=settings, module=model, disable_bucketing=number > 0 or overlap
            )
            for number, model in enumerate(models)
        ]

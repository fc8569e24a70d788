"""Building of live models: on the meta device where weights will be filled in, so that nothing is initialised in vain."""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext
from typing import Any

import torch

from ..basics.errors import raise_all
from .layer_specs import ENGINE
from .on_cpu import on_cpu
from .process_group import ensure_parallel

#: Buffers that count during training; they begin at 0, and checkpoints do not have them.
_COUNTERS = ("local_tokens_per_expert", "global_tokens_per_expert", "ga_steps")


def device_of_process() -> torch.device:
    """Device of this process's models."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def build(provider: Any, *, empty: bool) -> list[torch.nn.Module]:
    """This process's models, one for each of its virtual stages, in the provider's dtype.

    If `empty`, parameters have the attributes that megatron-core gives them, but no values yet; else its initial ones.
    """
    provider.check()
    config = copy.copy(provider)
    config.finalize()  # which counts the virtual stages of a layout
    ensure_parallel(config)
    if empty and provider.transformer_impl == ENGINE:
        config.init_model_with_meta_device = True
    elif empty:
        config.use_cpu_initialization = True  # megatron-core then leaves the device of weights to the context
        config.perform_initialization = True  # which on the meta device sets attributes and takes no time
    vpp = config.virtual_pipeline_model_parallel_size
    with torch.device("meta") if empty else nullcontext():
        models = [config.provide(vp_stage=number) for number in (range(vpp) if vpp else [None])]
    for model in models:
        if empty:
            _materialise(model)
            for name in ("use_cpu_initialization", "perform_initialization", "init_model_with_meta_device"):
                setattr(model.config, name, getattr(provider, name))
        if not torch.cuda.is_available():
            _run_on_cpu(model)
    return models


def _materialise(model: torch.nn.Module) -> None:
    """Give every tensor on the meta device memory; raises `ConversionError` for one whose values are neither loaded nor known."""
    device, made, faults = device_of_process(), {}, []
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    new = torch.nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
                    new.__dict__.update(parameter.__dict__)
                    made[id(parameter)] = new
                module._parameters[key] = made[id(parameter)]
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                if key in module._non_persistent_buffers_set and key not in _COUNTERS:
                    faults.append(f"{name}.{key}")
                module._buffers[key] = torch.zeros_like(buffer, device=device)
        faults += (
            f"{name}.{key}" for key, value in vars(module).items() if isinstance(value, torch.Tensor) and value.is_meta
        )
    raise_all("megatron-core builds tensors whose values are not known here; please report it:", faults)


def _run_on_cpu(model: torch.nn.Module) -> None:
    """Let the forward pass of a model take place where megatron-core's calls of CUDA mean the CPU."""
    own = threading.local()

    def enter(*_: Any) -> None:
        own.contexts = [*getattr(own, "contexts", ()), on_cpu().__enter__()]

    def leave(*_: Any) -> None:
        own.contexts.pop().__exit__(None, None, None)

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)

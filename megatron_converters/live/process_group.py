"""Process group and megatron-core's parallel state of this process: taken over where they exist, else made as the launcher says."""

from __future__ import annotations

import atexit
import os
import socket
import sys
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from ..basics.errors import ConversionError
from ..sharding.ranks import Rank
from .on_cpu import where_it_runs

_LAUNCHED = ("RANK", "WORLD_SIZE")
_SIZES = (
    ("tensor_model_parallel_size", parallel_state.get_tensor_model_parallel_world_size),
    ("pipeline_model_parallel_size", parallel_state.get_pipeline_model_parallel_world_size),
    ("expert_model_parallel_size", parallel_state.get_expert_model_parallel_world_size),
    ("expert_tensor_parallel_size", parallel_state.get_expert_tensor_parallel_world_size),
    ("context_parallel_size", parallel_state.get_context_parallel_world_size),
)


def ensure_group() -> None:
    """Make the process group that the launcher's environment describes, or a group of this process alone, if there is none.

    A group that is made here ends with the process.
    """
    if dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if all(name in os.environ for name in _LAUNCHED):
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend)
    else:
        _init_alone(backend)
    atexit.register(_leave)


def _init_alone(backend: str) -> None:
    """Group of one process, on a port that the system chooses."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo then need not resolve the host name
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, 1, is_master=True
    )
    dist.init_process_group(backend, store=store, rank=0, world_size=1)


def _leave() -> None:
    """Take the parallel state and the process group down, if they are still there."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def ensure_parallel(config: Any) -> None:
    """Initialise megatron-core's parallel state with the sizes of a config; raises `ConversionError` if it has other ones."""
    ensure_group()
    etp = config.expert_tensor_parallel_size or config.tensor_model_parallel_size
    wanted = {name: getattr(config, name) for name, _ in _SIZES} | {"expert_tensor_parallel_size": etp}
    if not parallel_state.model_parallel_is_initialized():
        _check_world(wanted)
        with where_it_runs():
            parallel_state.initialize_model_parallel(
                wanted["tensor_model_parallel_size"],
                wanted["pipeline_model_parallel_size"],
                context_parallel_size=wanted["context_parallel_size"],
                expert_model_parallel_size=wanted["expert_model_parallel_size"],
                expert_tensor_parallel_size=etp,
                create_gloo_process_groups=False,
            )
    found = {name: size() for name, size in _SIZES}
    differing = [f"{name}={found[name]}, not {wanted[name]}" for name in found if found[name] != wanted[name]]
    if differing:
        raise ConversionError(
            f"megatron-core's parallel state was initialised with {', '.join(differing)} of the provider; set the provider's sizes "
            "to these, or call parallel_state.destroy_model_parallel() first"
        )
    # megatron-core finds the first and the last stage by it; Megatron-LM, too, sets it when it builds a model.
    parallel_state.set_virtual_pipeline_model_parallel_world_size(config.virtual_pipeline_model_parallel_size)


def _check_world(sizes: dict[str, int]) -> None:
    """Raise unless the processes are a multiple of what the sizes take."""
    world = dist.get_world_size()
    tp, pp, ep, etp, cp = (sizes[name] for name, _ in _SIZES)
    for least, what in ((tp * pp * cp, f"tp={tp}, pp={pp}, cp={cp}"), (etp * ep * pp, f"etp={etp}, ep={ep}, pp={pp}")):
        if world % least:
            raise ConversionError(
                f"a world size of {world} cannot be divided into {what}, which takes {least} or a multiple of it; start as many "
                "(torchrun --nproc-per-node), or choose sizes whose product divides the number of processes"
            )


def own_rank() -> Rank:
    """Numbers of this process in megatron-core's groups; all 0 where there are none."""
    if not parallel_state.model_parallel_is_initialized():
        return Rank(0, 0)
    return Rank(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_rank(),
    )

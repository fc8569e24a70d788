"""Preparation of a process to run megatron-core on a CPU, with its arithmetic unchanged (written for 0.16).

Call `prepare()` before megatron is first imported, and build and run models inside `cuda_is_cpu()` of live/on_cpu.py.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..live.on_cpu import PATCHES
from ..sharding.ranks import Parallel, Rank

#: Packages that megatron-core would use but that fail without a GPU; it has code of its own in place of each.
_GPU_PACKAGES = ("apex", "transformer_engine")

_GLOO_TIMEOUT = timedelta(days=30)


def join(rank: int, size: int, folder: Path) -> None:
    """Make this process number `rank` of the `size` processes that share a model; megatron-core uses only its own code."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = (
        "1"  # overrides the argument of every torch.load (torch/serialization.py)
    )
    for package in _GPU_PACKAGES:
        sys.modules[package] = None  # type: ignore[assignment] # `import` then raises ImportError
    prepare()
    init_gloo(rank, size, folder)


def init_gloo(rank: int, size: int, folder: Path) -> None:
    """Join the pool's gloo process group through a file in `folder`. The pool limits the time of jobs, gloo does not."""
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=_GLOO_TIMEOUT)


def prepare() -> None:
    """Prepare this process for megatron-core on a CPU: no compiler, few process groups, no CUDA calls."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # megatron's jit_fuser is torch.compile, which would take minutes
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo then need not resolve the host name
    warnings.filterwarnings("ignore")  # megatron warns about every fusion that a CPU lacks
    PATCHES.enter()  # for as long as the process lives
    _share_groups()


def _share_groups() -> None:
    """Let megatron share one process group for each set of ranks, whatever its purpose, and reuse it for later jobs.

    megatron makes about 17 groups in each process for each set of parallel sizes, most with the same ranks as another one.
    Each group has 5 sockets and 3 threads, one of which wakes every 10 ms even when idle, and nothing frees them. Every process
    creates the same groups in the same order.
    """
    from megatron.core import parallel_state

    original, groups = parallel_state.create_group, {}

    def create_group(ranks: Sequence[int], **options: Any) -> Any:
        key = tuple(ranks)
        if key not in groups:
            groups[key] = original(ranks, **options)
        return groups[key]

    parallel_state.create_group = create_group


def cut(tp: int, pp: int, ep: int, etp: int) -> Rank:
    """Divide the processes into megatron's parallel groups of these sizes, replacing earlier ones; returns this process's rank."""
    from megatron.core import parallel_state

    from ..live.process_group import own_rank

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tp,
        pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        create_gloo_process_groups=False,
    )
    return own_rank()


def replica() -> int:
    """Data-parallel rank of this process: its number among those that compute the same, each with its own weights."""
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_rank())


def use_threads(parallel: Parallel) -> None:
    """Divide the machine's cores among the ranks of a stage; stages work one after the other."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores * parallel.pp // dist.get_world_size()))


def gathered(mine: Any) -> list[Any]:
    """Values that all processes pass in, in rank order, returned on every process."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, mine)
    return values

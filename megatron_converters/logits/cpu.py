"""Let megatron-core run on a CPU, with nothing of its arithmetic replaced (written for 0.16).

Call `prepare()` before megatron is first imported, and build and run models inside `cuda_is_cpu()`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from ..sharding.ranks import Parallel, Rank

#: Packages that megatron-core would use, and that fail where there is no GPU. It has code of its own for each.
_GPU_PACKAGES = ("apex", "transformer_engine")

_NO_LIMIT = timedelta(days=30)


def join(rank: int, size: int, folder: Path) -> None:
    """Make this process number `rank` of `size` that share a model, megatron-core its own code alone."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = (
        "1"  # whatever a caller of torch.load asks for (torch/serialization.py)
    )
    for package in _GPU_PACKAGES:
        sys.modules[package] = None  # type: ignore[assignment] # `import` then raises ImportError
    prepare()
    meet(rank, size, folder)


def meet(rank: int, size: int, folder: Path) -> None:
    """Join the processes of a pool by gloo. They meet in a file of `folder`; the pool, not gloo, limits their time."""
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=_NO_LIMIT)


def prepare() -> None:
    """Make this process fit for megatron-core on a CPU: no compiler, few process groups, no CUDA calls."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # megatron's jit_fuser is torch.compile: minutes of compiling for nothing
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not resolve
    warnings.filterwarnings("ignore")  # megatron warns of every fusion that a CPU lacks
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]

    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.moe import moe_utils

    # Forks the CUDA generator around dropout, which these models run without.
    CudaRNGStatesTracker.fork = lambda self, name="": nullcontext()
    if not hasattr(
        moe_utils, "te_general_gemm"
    ):  # 0.16 asks whether it is None, but sets it with Transformer Engine only
        moe_utils.te_general_gemm = None
    _share_groups()


def _share_groups() -> None:
    """Let megatron have one process group for each set of ranks, whatever it is for and however often it is made anew.

    megatron makes some 17 groups a process for each set of parallel sizes, and most have the same ranks as another.
    Each would be 3 threads, one of which wakes every 10 ms even when idle, and 5 sockets, and nothing frees them. Every process
    asks for the same groups in the same order.
    """
    from megatron.core import parallel_state

    make, made = parallel_state.create_group, {}

    def create_group(ranks: Sequence[int], **options: Any) -> Any:
        key = tuple(ranks)
        if key not in made:
            made[key] = make(ranks, **options)
        return made[key]

    parallel_state.create_group = create_group


def cut(tp: int, pp: int, ep: int, etp: int) -> Rank:
    """Let megatron cut the processes into groups of these sizes, those of an earlier cut forgotten; this process's rank."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tp,
        pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        create_gloo_process_groups=False,
    )
    return Rank(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_rank(),
    )


def replica() -> int:
    """This process's number among those that compute the same, each with weights of its own: data-parallel ranks."""
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_rank())


def use_threads(parallel: Parallel) -> None:
    """Share the machine's cores among the ranks of a stage: stages work one after the other."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores * parallel.pp // dist.get_world_size()))


def gathered(mine: Any) -> list[Any]:
    """What each process gives, in order, on every process."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


class cuda_is_cpu(TorchFunctionMode):
    """Within it `device="cuda"` (megatron's causal masks) and `.cuda()` mean the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        named = dict(kwargs or {})
        if str(named.get("device", "")).startswith("cuda"):
            named["device"] = "cpu"
        return func(*args, **named)

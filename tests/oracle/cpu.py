"""Let megatron-core 0.16 run on a CPU, with nothing of its arithmetic replaced.

Call `prepare()` before megatron is first imported, and run models inside `cuda_is_cpu()`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from . import grouped_gemm_standin, transformer_engine_standin


def prepare() -> None:
    """Make this process fit for megatron-core on a CPU: one thread, no compiler, few groups, stand-ins for CUDA packages."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # megatron's jit_fuser is torch.compile: minutes of compiling for nothing
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not resolve
    warnings.filterwarnings("ignore")  # megatron warns of every fusion that a CPU lacks
    torch.set_num_threads(1)
    transformer_engine_standin.install()
    grouped_gemm_standin.install()
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]

    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    # Forks the CUDA generator around dropout, which these models run without.
    CudaRNGStatesTracker.fork = lambda self, name="": nullcontext()
    _share_groups()


def _share_groups() -> None:
    """Let megatron have one process group for each set of ranks, whatever it is for and however often it is made anew.

    megatron makes some 17 groups a process for each set of parallel sizes, and most have the same ranks as another.
    Each would be 3 threads and 5 sockets that nothing frees. Every process asks for the same ones in the same order.
    """
    from megatron.core import parallel_state

    make, made = parallel_state.create_group, {}

    def create_group(ranks: Sequence[int], **options: Any) -> Any:
        key = tuple(ranks)
        if key not in made:
            made[key] = make(ranks, **options)
        return made[key]

    parallel_state.create_group = create_group


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

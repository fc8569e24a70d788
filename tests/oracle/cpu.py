"""Let the real megatron-core run on a CPU with its Transformer Engine layers, too."""

from __future__ import annotations

import torch

from megatron_converters.logits import cpu

from . import grouped_gemm_standin, transformer_engine_standin


def prepare() -> None:
    """Make this process fit for megatron-core on a CPU: one thread, and stand-ins for CUDA packages."""
    torch.set_num_threads(1)
    transformer_engine_standin.install()
    grouped_gemm_standin.install()
    cpu.prepare()
    torch.cuda.synchronize = lambda device=None: None  # before a distributed checkpoint is written

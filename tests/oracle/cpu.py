"""Preparation of a process to run the real megatron-core on a CPU, including its Transformer Engine layers."""

from __future__ import annotations

import torch

from megatron_converters.logits import cpu

from . import grouped_gemm_standin, transformer_engine_standin


def prepare() -> None:
    """Prepare this process for megatron-core on a CPU: one thread, and stand-ins for CUDA packages."""
    torch.set_num_threads(1)
    transformer_engine_standin.install()
    grouped_gemm_standin.install()
    cpu.prepare()
    torch.cuda.synchronize = lambda device=None: None  # called before a distributed checkpoint is written

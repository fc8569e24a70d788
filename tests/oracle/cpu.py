"""Preparation of a process to run the real megatron-core on a CPU, including its Transformer Engine layers."""

from __future__ import annotations

import os

import torch

from megatron_converters.logits import cpu

from . import fla_standin, grouped_gemm_standin, transformer_engine_standin


def prepare() -> None:
    """Prepare this process for megatron-core on a CPU: one thread, and stand-ins for CUDA packages."""
    torch.set_num_threads(1)
    transformer_engine_standin.install()
    grouped_gemm_standin.install()
    fla_standin.install()
    # megatron-core wants it set where it is to be deterministic, as it must be for gated DeltaNet without fla.
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    cpu.prepare()
    torch.cuda.synchronize = lambda device=None: None  # called before a distributed checkpoint is written

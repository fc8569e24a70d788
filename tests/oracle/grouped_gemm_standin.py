"""A stand-in in plain torch for the CUDA package `grouped_gemm`, which megatron-core's legacy GroupedMLP computes with."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import torch


def gmm(a: torch.Tensor, b: torch.Tensor, batch_sizes: torch.Tensor, trans_b: bool = False) -> torch.Tensor:
    """Rows of `a` [tokens, in], `batch_sizes[e]` of them for each expert, times the expert's `b[e]` [in, out]."""
    if trans_b:
        raise NotImplementedError("the stand-in does not transpose")
    parts = a.split(batch_sizes.tolist())
    return torch.cat([part @ weight for part, weight in zip(parts, b, strict=True)])


def install() -> None:
    """Make `import grouped_gemm` find the stand-in in this process."""
    module = ModuleType("grouped_gemm")
    module.ops = SimpleNamespace(gmm=gmm)  # type: ignore[attr-defined]
    sys.modules["grouped_gemm"] = module

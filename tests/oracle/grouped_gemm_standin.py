"""Stand-in in plain torch for the CUDA package `grouped_gemm`, which megatron-core's legacy GroupedMLP uses."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import torch


def gmm(a: torch.Tensor, b: torch.Tensor, batch_sizes: torch.Tensor, trans_b: bool = False) -> torch.Tensor:
    """Product of `a` [tokens, in] and `b` [experts, in, out]: `batch_sizes[e]` rows in turn, each group times its `b[e]`."""
    if trans_b:
        raise NotImplementedError("the stand-in does not transpose")
    parts = a.split(batch_sizes.tolist())
    return torch.cat([part @ weight for part, weight in zip(parts, b, strict=True)])


def install() -> None:
    """Make `import grouped_gemm` find the stand-in in this process."""
    module = ModuleType("grouped_gemm")
    module.ops = SimpleNamespace(gmm=gmm)  # type: ignore[attr-defined]
    sys.modules["grouped_gemm"] = module

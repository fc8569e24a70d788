"""Stand-in in plain torch for the package `fla` (flash-linear-attention), without which megatron-core builds no gated DeltaNet.

megatron-core's own recurrence in torch is used (`deterministic_mode`), so only the norm of queries and keys is computed here.
transformers would take the stand-in for the real package, so it must not be installed in a process that runs transformers.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch


def l2norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Divide each vector of the last dimension by its length, as `fla.modules.l2norm.l2norm`."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)


def chunk_gated_delta_rule(*_: Any, **__: Any) -> None:
    """Raise: megatron-core calls it only where its deterministic mode is off."""
    raise NotImplementedError("the stand-in has no recurrence")


_MODULES: dict[str, dict[str, Any]] = {
    "fla": {},
    "fla.modules": {},
    "fla.modules.l2norm": {"l2norm": l2norm},
    "fla.ops": {},
    "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": chunk_gated_delta_rule},
}


def install() -> None:
    """Make `import fla` find the stand-in in this process."""
    for name, content in _MODULES.items():
        module = ModuleType(name)
        module.__path__ = []  # makes it a package
        vars(module).update(content)
        sys.modules[name] = module

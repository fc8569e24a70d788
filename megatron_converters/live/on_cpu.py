"""Context in which megatron-core builds and runs models on a CPU, with its arithmetic unchanged (written for 0.16).

Everything that is replaced is put back at the end. The context may be nested, and entered by several threads at once.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode


class _Patch(NamedTuple):
    """Replacement of an attribute of a module, or of a class in it, named `module:attribute` or `module:Class.attribute`."""

    place: str
    value: Any
    #: Whether to set it only where the attribute does not exist.
    missing_only: bool = False


_PATCHES = (
    _Patch("torch.cuda:current_device", lambda: torch.device("cpu")),
    # It forks the CUDA generator around initialisation and dropout, which then draw from torch's generator of the CPU.
    _Patch("megatron.core.tensor_parallel.random:CudaRNGStatesTracker.fork", lambda self, name="": nullcontext()),
    # 0.16 tests whether it is None, but defines it only with Transformer Engine.
    _Patch("megatron.core.transformer.moe.moe_utils:te_general_gemm", None, missing_only=True),
)
_MISSING = object()


class _Patches:
    """Replacements that are in force while anyone needs them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._users = 0
        self._before: list[tuple[Any, str, Any]] = []
        self._stance = ExitStack()

    def enter(self) -> None:
        """Put them in force, if they are not."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                # megatron's fusions are compiled functions; on a CPU that would take minutes and a C++ compiler.
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))
                self._before = [found for patch in _PATCHES if (found := _apply(patch)) is not None]

    def leave(self) -> None:
        """Undo them, if nobody else needs them."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._stance.close()
                for owner, name, value in self._before:
                    if value is _MISSING:
                        delattr(owner, name)
                    else:
                        setattr(owner, name, value)
                self._before = []


def _apply(patch: _Patch) -> tuple[Any, str, Any] | None:
    """Set an attribute; returns its owner, its name and what it was, or None if it stays as it is."""
    module, _, path = patch.place.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for each in classes:
        owner = getattr(owner, each)
    before = vars(owner).get(name, _MISSING)
    if patch.missing_only and before is not _MISSING:
        return None
    setattr(owner, name, patch.value)
    return owner, name, before


#: Those of this process.
PATCHES = _Patches()


class on_cpu:
    """Context in which `device="cuda"`, `.cuda()` and megatron's own calls of CUDA mean the CPU, and nothing is compiled."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> on_cpu:
        PATCHES.enter()
        self._stack.callback(PATCHES.leave)
        self._stack.enter_context(cuda_is_cpu())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def where_it_runs() -> AbstractContextManager[Any]:
    """Context in which models are built and run: `on_cpu` where there is no GPU."""
    return nullcontext() if torch.cuda.is_available() else on_cpu()


class cuda_is_cpu(TorchFunctionMode):
    """Context in which `device="cuda"` (megatron's causal masks) and `.cuda()` mean the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        options = dict(kwargs or {})
        if str(options.get("device", "")).startswith("cuda"):
            options["device"] = "cpu"
        return func(*args, **options)

"""Move language-model checkpoints between Hugging Face and Megatron-LM, on a CPU, without building a model.

`import megatron_converters as mc` gives the functions of `megatron_converters.api`; nothing is imported until one is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import (
        ConversionError,
        Difference,
        Family,
        Forecast,
        HFOptions,
        MegatronOptions,
        PipelineSplit,
        ReadOptions,
        Result,
        TrainingFlags,
        UsageError,
        Verification,
        convert,
        diff,
        inspect,
        plan,
        register_family,
        supported_families,
        training_flags,
        verify,
    )

__version__ = "0.1.0"
__all__ = [
    "ConversionError",
    "Difference",
    "Family",
    "Forecast",
    "HFOptions",
    "MegatronOptions",
    "PipelineSplit",
    "ReadOptions",
    "Result",
    "TrainingFlags",
    "UsageError",
    "Verification",
    "__version__",
    "convert",
    "diff",
    "inspect",
    "plan",
    "register_family",
    "supported_families",
    "training_flags",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

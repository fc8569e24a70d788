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
        MindSporeOptions,
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
    from .tp_pp_converter import (
        SmartConverter,
        TensorParallelConverter,
        convert_llama_7b,
        convert_minicpm4_8b,
        convert_minicpm_3b,
        convert_minicpm_8b,
        smart_convert_hf_to_megatron,
        smart_convert_megatron_to_hf,
    )

__version__ = "0.2.0"
__all__ = [
    "ConversionError",
    "Difference",
    "Family",
    "Forecast",
    "HFOptions",
    "MegatronOptions",
    "MindSporeOptions",
    "PipelineSplit",
    "ReadOptions",
    "Result",
    "SmartConverter",
    "TensorParallelConverter",
    "TrainingFlags",
    "UsageError",
    "Verification",
    "__version__",
    "convert",
    "convert_llama_7b",
    "convert_minicpm4_8b",
    "convert_minicpm_3b",
    "convert_minicpm_8b",
    "diff",
    "inspect",
    "plan",
    "register_family",
    "smart_convert_hf_to_megatron",
    "smart_convert_megatron_to_hf",
    "supported_families",
    "training_flags",
    "verify",
]
#: Names that are of `tp_pp_converter`; the others are of `api`.
_BY_NUMBERS = frozenset(
    """
    SmartConverter TensorParallelConverter convert_llama_7b convert_minicpm4_8b convert_minicpm_3b convert_minicpm_8b
    smart_convert_hf_to_megatron smart_convert_megatron_to_hf
    """.split()
)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "tp_pp_converter" if name in _BY_NUMBERS else "api"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

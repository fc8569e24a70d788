"""`modelconvert`: conversions between Hugging Face and Megatron-LM with the commands and calls of the Model Converter Tool.

A thin layer over `megatron_converters.api`. Nothing is imported until a name is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import ConversionResult, ModelConverterAPI

__all__ = ["ConversionResult", "ModelConverterAPI"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.api"), name)

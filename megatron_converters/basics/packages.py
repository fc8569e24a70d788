"""Check for packages that only some conversions need."""

from __future__ import annotations

import importlib.util

from .errors import ConversionError


def need(module: str, package: str, purpose: str) -> None:
    """Raise `ConversionError` if a module of `package`, needed for this purpose, is not installed.

    Imports nothing but the packages around the module.
    """
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise ConversionError(f"{purpose} needs {package}, which is not installed; run: pip install {package}")

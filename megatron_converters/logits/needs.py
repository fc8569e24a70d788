"""Check for packages that only a comparison of logits needs."""

from __future__ import annotations

import importlib.util

from ..basics.errors import ConversionError


def need(module: str, package: str) -> None:
    """Raise `ConversionError` if a module of `package` is not installed. Imports nothing but the packages around the module."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise ConversionError(f"computing logits needs {package}, which is not installed; run: pip install {package}")

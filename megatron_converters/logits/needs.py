"""Packages that only a comparison of logits needs."""

from __future__ import annotations

import importlib.util

from ..basics.errors import ConversionError


def need(module: str, package: str) -> None:
    """Raise where a module is not installed, naming the package that holds it. Imports no more than what contains it."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise ConversionError(f"computing logits needs {package}, which is not installed; run: pip install {package}")

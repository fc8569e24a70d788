"""The families that can be converted, one table each. A new family is one file here and its name in `registry.py`."""

from __future__ import annotations

from .registry import FAMILIES, register_family

__all__ = ["FAMILIES", "register_family"]

"""JSON values: replacing non-finite floats, and finding differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def finite(value: Any) -> Any:
    """A copy with non-finite floats as strings, since JSON cannot hold them and NaN does not equal itself."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def differences(old: Any, new: Any, place: str, words: Callable[[str, Any, Any], str]) -> list[str]:
    """Differences between two values, each as `words(place, old, new)`; dicts are compared key by key."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}):
            found += differences(old.get(key), new.get(key), f"{place} {key}".strip(), words)
        return found
    return [words(place, old, new)]

"""Values as JSON has them, and where two of them differ."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def finite(value: Any) -> Any:
    """The same with each float that is no finite number as its `str`: JSON has none, and a NaN equals nothing."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def differences(old: Any, new: Any, place: str, words: Callable[[str, Any, Any], str]) -> list[str]:
    """Where two values differ, in `words(place, old, new)`; objects are compared entry by entry."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}):
            found += differences(old.get(key), new.get(key), f"{place} {key}".strip(), words)
        return found
    return [words(place, old, new)]

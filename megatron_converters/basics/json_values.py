"""JSON values: writing large ones, replacing non-finite floats, and finding differences."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from json.encoder import encode_basestring_ascii
from typing import Any


def indented(value: Any, levels: int, margin: str = "\n") -> str:
    """Text of plain values whose keys are strings: objects and lists down to `levels` take a line for each item, deeper ones none.

    So it is still read line by line, and made ten times as fast as with a line for each value. `margin` is the line break and
    indentation of the line on which the value begins.
    """
    if not levels or not value or not isinstance(value, (dict, list)):
        return json.dumps(value)
    inner = f"{margin} "
    if isinstance(value, dict):
        items = [f"{encode_basestring_ascii(key)}: {indented(item, levels - 1, inner)}" for key, item in value.items()]
        return f"{{{inner}{f',{inner}'.join(items)}{margin}}}"
    return f"[{inner}{f',{inner}'.join([indented(item, levels - 1, inner) for item in value])}{margin}]"


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

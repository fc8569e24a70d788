"""Checks of values that a hand-written or damaged configuration may hold."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeGuard

from ..basics.errors import ConversionError

#: More rows or columns than any model's tensor has, so that a damaged size allocates no memory.
TOO_LARGE = 1 << 27
#: More layers than any model has, so that a damaged number starts no endless loop.
TOO_MANY_LAYERS = 1 << 16


def number(value: Any, name: str) -> float:
    """Value of the field `name`, which must be a finite number; a hand-written configuration may hold anything."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        shown = repr(value)
        raise ConversionError(f"{name} is {shown if len(shown) < 80 else shown[:40] + '…'}; it must be a number")
    return float(value)


def check_cap(record: Any, name: str) -> None:
    """Raise unless the field `name` of a record is a number above 0, or None."""
    value = getattr(record, name)
    if value is not None and number(value, name) <= 0:
        raise ConversionError(f"{name} is {value!r}; it must be above 0, or null for no cap")


def whole(value: Any) -> Any:
    """Number, as an int if it is whole: Megatron-LM parses some options with `int`."""
    return int(value) if value is not None and float(value).is_integer() else value


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_sizes(record: Any, names: Iterable[str]) -> None:
    """Raise unless the fields `names` of a record are sizes that a tensor can have."""
    for name in names:
        check_size(getattr(record, name), name)


def check_size(value: Any, name: str, limit: int = TOO_LARGE) -> int:
    """Value of `name`, which must be a size that a model can have, below `limit`; raises `ConversionError`."""
    if not is_whole(value) or value < 1:
        raise ConversionError(f"{name} is {value!r}; it must be a whole number above 0")
    if value >= limit:
        raise ConversionError(f"{name} is {value!r:.40}, which no model has")
    return value


def check_switches(record: Any, names: Iterable[str]) -> None:
    """Raise unless the fields `names` of a record are true or false."""
    for name in names:
        if not isinstance(getattr(record, name), bool):
            raise ConversionError(f"{name} is {getattr(record, name)!r}; it must be true or false")


def check_choice(record: Any, name: str, choices: Iterable[Any]) -> None:
    """Raise unless the field `name` of a record is one of `choices`."""
    if getattr(record, name) not in choices:
        known = ", ".join(repr(choice) for choice in choices if choice)
        raise ConversionError(f"{name} is {getattr(record, name)!r}; known are {known}")

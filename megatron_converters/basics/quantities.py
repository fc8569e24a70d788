"""Quantities as text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection

_UNITS = ("B", "KB", "MB", "GB", "TB", "PB")


def size(nbytes: float) -> str:
    """Bytes in decimal units, to three digits."""
    for unit in _UNITS:
        if nbytes < 999.5 or unit == _UNITS[-1]:
            break
        nbytes /= 1000
    return f"{nbytes:.3g} {unit}" if nbytes < 999.5 else f"{nbytes:.0f} {unit}"


def count(number: int, noun: str) -> str:
    """A number with its noun, plural unless the number is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def few(names: Collection[str], most: int = 5) -> str:
    """Names in one line, by commas: the first `most`, and how many more there are."""
    shown = ", ".join(itertools.islice(names, most))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def duration(seconds: float) -> str:
    """A duration in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def shortest(value: float, is_right: Callable[[float], bool]) -> float | int:
    """Number near `value` with the fewest digits that is right; `value` itself if none is. A whole one is an int."""
    rounded = (float(f"{value:.{digits}g}") for digits in range(1, 18))
    found = next((number for number in rounded if is_right(number)), value)
    return int(found) if found.is_integer() else found

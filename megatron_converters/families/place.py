"""Place in a family file, for messages, and checks of the values there. All raise `ConversionError`."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ..basics.errors import ConversionError, one_line
from ..model.checks import is_whole
from .table import BEYOND

T = TypeVar("T")
_PLACEHOLDERS = ("layer", "expert", BEYOND.strip("{}"))


@dataclass(frozen=True)
class Place:
    """Place within a file, such as `tensors: qkv`; empty for the file itself."""

    file: str
    within: str = ""

    def at(self, key: object) -> Place:
        """Place of a key or a number within this one."""
        return Place(self.file, f"{self.within}{': ' if self.within else ''}{one_line(key)}")

    def fault(self, text: str) -> ConversionError:
        """Error about this place; `text` says what is wrong, and the remedy."""
        return ConversionError(f"{self.file}{f', {self.within}' if self.within else ''}: {text}")


#: Check of a value at a place, which returns what it means.
Check = Callable[[Any, Place], Any]


def text(value: Any, place: Place) -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value:
        raise place.fault(
            f"{one_line(repr(value))} is no text; write a name, in quotes if it looks like something else"
        )
    return value


def texts(value: Any, place: Place) -> tuple[str, ...]:
    """One text, or a list of them."""
    values = value if isinstance(value, list) else [value]
    if not values:
        raise place.fault("the list is empty; write a name")
    return tuple(text(each, place) for each in values)


def scalar(value: Any, place: Place) -> Any:
    """Text, number, true, false or null."""
    if isinstance(value, (list, dict)):
        raise place.fault(
            "a list or mapping is no value of config.json here; write text, a number, true, false or null"
        )
    return value


def number(value: Any, place: Place) -> float:
    """Finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise place.fault(f"{one_line(repr(value))} is no number; write one such as 0.5")
    return value


def whole(value: Any, place: Place) -> int:
    """Whole number."""
    if not is_whole(value):
        raise place.fault(f"{one_line(repr(value))} is no whole number; write one such as 8")
    return value


def switch(value: Any, place: Place) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise place.fault(f"{one_line(repr(value))} is neither true nor false; write one of them")
    return value


def or_null(check: Check) -> Check:
    """Check that lets null pass."""
    return lambda value, place: None if value is None else check(value, place)


def mapping(value: Any, place: Place) -> Mapping[Any, Any]:
    """Mapping."""
    if not isinstance(value, dict):
        raise place.fault(f"{one_line(repr(value))} is no mapping; write lines such as 'key: value' below")
    return value


def listed(value: Any, place: Place) -> list[Any]:
    """List."""
    if not isinstance(value, list):
        raise place.fault(f"{one_line(repr(value))} is no list; write lines that begin with '- '")
    return value


def chosen(value: Any, place: Place, what: str, known: Mapping[str, T]) -> T:
    """What a name stands for."""
    if not isinstance(value, str) or value not in known:
        raise place.fault(f"there is no {what} {one_line(repr(value))}; known are {', '.join(known)}")
    return known[value]


def only(given: Iterable[Any], place: Place, known: Iterable[str], required: Iterable[str] = ()) -> None:
    """Raise for a key that is not known, and for one that is missing."""
    known, given = tuple(known), tuple(given)
    for key in given:
        if key not in known:
            raise place.fault(f"there is no key {one_line(repr(key))} here; known are {', '.join(known)}")
    for key in required:
        if key not in given:
            raise place.fault(f"the key {key!r} is missing; add it")


def template(value: Any, place: Place) -> str:
    """Name of a tensor, with placeholders for numbers."""
    name = text(value, place)
    try:
        fields = [(field, spec, kind) for _, field, spec, kind in string.Formatter().parse(name) if field is not None]
    except ValueError as error:
        raise place.fault(f"the braces of {one_line(name)} do not match ({error}); close each that is opened") from None
    for field, *more in fields:
        if field not in _PLACEHOLDERS or any(more):
            known = ", ".join(f"{{{each}}}" for each in _PLACEHOLDERS)
            raise place.fault(f"{one_line(name)} has {{{field}}} in it; names may have {known} for numbers")
    return name


def templates(value: Any, place: Place) -> tuple[str, ...]:
    """One name of a tensor, or a list of them, each once."""
    names = tuple(template(each, place) for each in texts(value, place))
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise place.fault(f"the name {one_line(twice)} is there twice; write each tensor once")
    return names

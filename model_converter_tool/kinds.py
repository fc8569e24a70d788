"""Kinds of values that options take, from a command line, a batch file or Python. Each returns the value or raises `ValueError`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from megatron_converters.basics.errors import UsageError
from megatron_converters.cli.options.values import DTYPES, byte_size, dtype_word

Kind = Callable[[Any], Any]


def choice(*names: str) -> Kind:
    """One of these names."""

    def check(value: Any) -> str:
        if value not in names:
            raise ValueError(f"is not one of {', '.join(names)}")
        return str(value)

    return check


def dtype(value: Any) -> str:
    """Short name of a type to write, of any name of it."""
    return str(choice(*DTYPES)(dtype_word(value) if isinstance(value, str) else value))


def at_least(least: int) -> Kind:
    """Whole number from `least` on, or the text of one."""

    def check(value: Any) -> int:
        number = int(value) if isinstance(value, str) and value.isdecimal() else value
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"is no whole number from {least} on")
        return number

    return check


def text(value: Any) -> str:
    """Text that is not empty, or a path."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ValueError("is no text")
    return str(os.fspath(value))


def texts(value: Any) -> list[str]:
    """List of texts, or a text with commas between them."""
    found = value.split(",") if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)) or not found or not all(isinstance(each, str) and each for each in found):
        raise ValueError("is neither a text nor a list of texts")
    return list(found)


def switch(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError("is neither true nor false")
    return value


def size(value: Any) -> int:
    """Number of bytes, or the text of one such as 5GB."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError("is no size such as 5GB")
    try:
        return byte_size(str(value))
    except UsageError as error:
        raise ValueError("is no size such as 5GB") from error

"""Values that a pickle can hold but not alter."""

from __future__ import annotations

import pickle
from dataclasses import fields
from typing import Any, NoReturn


class Sealed:
    """Base class of frozen dataclasses that an untrusted pickle can reach.

    The BUILD opcode writes into `__dict__` even of a frozen class, unless it defines `__setstate__`. Without this a
    hostile checkpoint could make a tensor point into another file, or change a dtype for the whole process.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]

    def __setstate__(self, state: object) -> NoReturn:
        raise pickle.UnpicklingError(f"it alters a {type(self).__name__}")

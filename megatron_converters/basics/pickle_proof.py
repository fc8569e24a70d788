"""Values that a pickle can hold but not alter."""

from __future__ import annotations

import pickle
from dataclasses import fields
from typing import Any, NoReturn


class Sealed:
    """Base of frozen dataclasses that appear in what an untrusted pickle builds.

    A pickle's BUILD writes into `__dict__`, frozen or not, unless the class takes its state itself. Without this a
    hostile checkpoint could make a tensor point into another file, or change a dtype for the whole process.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]

    def __setstate__(self, state: object) -> NoReturn:
        raise pickle.UnpicklingError(f"it alters a {type(self).__name__}")

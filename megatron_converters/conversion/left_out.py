"""Stored tensors that a user leaves out of a conversion, by patterns of their names (`--ignore-tensors`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from ..basics.quantities import count, few

Key = TypeVar("Key")
Data = TypeVar("Data")


class LeftOut:
    """Tensors that one of the patterns (`*`, `?`, `[…]`) names, of those that a source has come across."""

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self._patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        #: Patterns by the names of the tensors that are left out.
        self._found: dict[str, str] = {}

    def kept(self, stored: Mapping[Key, Data], name_of: Callable[[Key], str] = str) -> dict[Key, Data]:
        """Tensors that no pattern names; the others count as left out."""
        return {key: data for key, data in stored.items() if not self._names(name_of(key))}

    def _names(self, name: str) -> bool:
        pattern = next((pattern for pattern in self._patterns if fnmatchcase(name, pattern)), None)
        if pattern is not None:
            self._found[name] = pattern
        return pattern is not None

    @property
    def ignored(self) -> list[str]:
        """Lines for the manifest and for lists of what is left out."""
        return [f"{name} (--ignore-tensors)" for name in sorted(self._found)]

    @property
    def notes(self) -> list[str]:
        """Notes for the user: what is left out, and patterns that name nothing here."""
        unused = [pattern for pattern in self._patterns if pattern not in self._found.values()]
        return [
            *([self.remark] if self._found else []),
            *(f"--ignore-tensors {pattern}: no tensor here has such a name" for pattern in unused),
        ]

    @property
    def remark(self) -> str:
        """What is left out, in a sentence; empty if nothing."""
        if not self._found:
            return ""
        return f"{count(len(self._found), 'tensor')} left out, as --ignore-tensors says: {few(sorted(self._found))}"

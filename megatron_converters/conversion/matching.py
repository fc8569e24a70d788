"""Matching of stored tensors with the refs of a model: every ref must be stored, in its shape, and nothing else may be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Generic, Protocol, TypeVar

from ..basics.errors import raise_all
from ..model.slots import Ref
from .left_out import LeftOut


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


Key = TypeVar("Key")
Data = TypeVar("Data", bound=_Shaped)


class Matcher(Generic[Key, Data]):
    """Account of a format's stored tensors by key: `take` those of each ref, then `close`.

    Missing, misshapen and extra tensors are collected and raised together. `heading` begins the message, `required_by` says what
    requires shapes ("the args require"), `shown` turns a key into text, and `why_missing` one that is not stored into what else is
    known of it. `left_out` are tensors that the user leaves out, which `stored` does not have.
    """

    def __init__(
        self,
        stored: Mapping[Key, Data],
        ignored: Collection[Key],
        heading: str,
        required_by: str,
        shown: Callable[[Key], str] = str,
        why_missing: Callable[[Key], str] = lambda _: "",
        left_out: LeftOut | None = None,
    ) -> None:
        self._stored, self._shown, self._why_missing = stored, shown, why_missing
        self._left_out = left_out or LeftOut()
        self._heading, self._required_by = heading, required_by
        self._unused = dict.fromkeys(key for key in stored if key not in ignored)
        self._problems: dict[str, None] = {}

    def take(self, key: Key, ref: Ref | None, shape: tuple[int, ...], view: Data | None = None) -> Data | None:
        """Tensor of a ref, struck off; None, with a problem noted, if it is missing or of another shape.

        `view` is the part of a stored tensor that belongs to the ref, where that is not all of it.
        """
        self._unused.pop(key, None)
        data = self._stored.get(key) if view is None else view
        if data is not None and data.shape == shape:
            return data
        named = self._shown(key) + (f" ({ref})" if ref is not None else "")
        missing = f"is missing{self._why_missing(key)}"
        fault = missing if data is None else f"has shape {list(data.shape)}; {self._required_by} {list(shape)}"
        self.note(f"{named} {fault}")
        return None

    def strike(self, keys: Iterable[Key]) -> None:
        """Strike keys off that need no ref."""
        for key in keys:
            self._unused.pop(key, None)

    def note(self, problem: str) -> None:
        """Note a problem; equal ones count once."""
        self._problems[problem] = None

    def close(self, extra: str) -> None:
        """Raise all problems. `extra` says what a tensor that no ref has taken is not, after its name."""
        lines = [self._left_out.remark]
        if self._unused and not self._problems:  # else names or sizes are others altogether
            lines.append("--ignore-tensors PATTERN leaves out tensors that the model does not need")
        for key in sorted(self._unused, key=self._shown):
            self.note(f"{self._shown(key)} {extra}")
        raise_all(self._heading, self._problems, remedy="\n".join(filter(None, lines)) or None)

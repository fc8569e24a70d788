"""The processes that share one conversion: each fills some of the output files, the first one begins and ends the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol

from ..basics.errors import ConversionError, Stopped


class Word(NamedTuple):
    """What a process says when they meet: its result, or why it failed; `resumable` as in `errors.Stopped`."""

    value: Any = None
    failure: str | None = None
    resumable: bool = False


class Crew(Protocol):
    """`rank` of `size` processes that see the same source and the same target folder."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def exchange(self, word: Word) -> list[Word]:
        """Wait for the others; returns everybody's word, by rank. Raises `Stopped` if one of them is gone."""
        ...

    def close(self) -> None:
        """Leave the crew."""
        ...


class Alone:
    """One process that does it all."""

    rank = 0
    size = 1

    def exchange(self, word: Word) -> list[Word]:
        """Its own word."""
        return [word]

    def close(self) -> None:
        """Nothing."""


ALONE = Alone()


def meet(crew: Crew, value: Any, failure: BaseException | None) -> list[Any]:
    """Everybody's values, by rank; raises in all processes if one of them brings a failure."""
    resumable = isinstance(failure, (Stopped, OSError, KeyboardInterrupt))
    text = None if failure is None else str(failure) or type(failure).__name__
    words = crew.exchange(Word(value, text, resumable))
    if failure is not None:
        raise failure
    for rank, word in enumerate(words):
        if word.failure is not None:
            _raise_other(rank, word)
    return [word.value for word in words]


def _raise_other(rank: int, word: Word) -> NoReturn:
    kind = Stopped if word.resumable else ConversionError
    raise kind(f"process {rank} of the conversion failed: {word.failure}")


def agree(crew: Crew, values: Sequence[Any], what: str) -> None:
    """Raise unless all processes gave the same value."""
    odd = [str(rank) for rank, value in enumerate(values) if value != values[0]]
    if odd:
        raise ConversionError(
            f"process {', '.join(odd)} of {crew.size} sees another {what} than process 0; start all of them with the same "
            "command on the same files"
        )


def share(files: Mapping[str, int], crew: Crew) -> set[str]:
    """The files that fall to a process: the largest first, each to the process with the fewest bytes so far."""
    loads = [0] * crew.size
    mine = set()
    for file, nbytes in sorted(files.items(), key=lambda item: (-item[1], item[0])):
        least = loads.index(min(loads))
        loads[least] += nbytes
        if least == crew.rank:
            mine.add(file)
    return mine

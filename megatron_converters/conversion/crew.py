"""Processes that share one conversion: each fills some of the output files, the first one begins and ends the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ..basics.errors import ConversionError, Stopped


class Report(NamedTuple):
    """Report of one process to the others: its result or its failure.

    `resumable` if the run can go on later, `interrupted` if the user stops it.
    """

    value: Any = None
    failure: str | None = None
    resumable: bool = False
    interrupted: bool = False


class Crew(Protocol):
    """Process `rank` of `size` processes that see the same source and the same target folder."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def exchange(self, report: Report) -> list[Report]:
        """Wait for the others; returns all reports, by rank. Raises `Stopped` if a process is gone."""
        ...

    def check(self) -> None:
        """Raise if another process has failed or is gone, as far as this process knows."""
        ...

    def release(self) -> Crew | None:
        """Crew that shows the result, once all files are filled; None in a process that need not wait for it."""
        ...

    def end_others(self) -> bool:
        """End the other processes, wherever they are; returns whether none is left that writes."""
        ...

    def close(self) -> None:
        """Leave the crew."""
        ...


class Peers:
    """Part of crews whose processes stay together to the end, and cannot end each other."""

    def check(self) -> None:
        """Do nothing: a failure of another shows when reports are exchanged."""

    def release(self: Crew) -> Crew | None:
        """Return the same crew."""
        return self

    def end_others(self) -> bool:
        """Do nothing."""
        return False


class Alone(Peers):
    """Crew of a single process."""

    rank = 0
    size = 1

    def exchange(self, report: Report) -> list[Report]:
        """Return the process's own report."""
        return [report]

    def end_others(self) -> bool:
        """Do nothing: there are none."""
        return True

    def close(self) -> None:
        """Do nothing."""


ALONE = Alone()


def meet(crew: Crew, value: Any, failure: BaseException | None) -> list[Any]:
    """Values of all processes, by rank; raises in every process if one of them has failed."""
    interrupted = isinstance(failure, KeyboardInterrupt)
    resumable = interrupted or isinstance(failure, (Stopped, OSError))
    text = None if failure is None else str(failure) or type(failure).__name__
    reports = crew.exchange(Report(value, text, resumable, interrupted))
    if failure is not None:
        raise failure
    for rank, report in enumerate(reports):
        if report.failure is not None:
            raise failure_of(rank, report)
    return [report.value for report in reports]


def failure_of(rank: int, report: Report) -> ConversionError:
    """Error that a failed process means for the others."""
    kind = Stopped if report.resumable else ConversionError
    return kind(f"process {rank} of the conversion failed: {report.failure}")


def agree(crew: Crew, values: Sequence[Any], what: str) -> None:
    """Raise unless all processes have the same value; `what` names it in the message."""
    differing = [str(rank) for rank, value in enumerate(values) if value != values[0]]
    if differing:
        raise ConversionError(
            f"process {', '.join(differing)} of {crew.size} sees another {what} than process 0; start all processes with the same "
            "command on the same files"
        )


def share(files: Mapping[str, int], crew: Crew) -> set[str]:
    """Files that this process fills. The largest file is dealt out first, each to the process with the fewest bytes so far."""
    assigned = [0] * crew.size
    own = set()
    for file, nbytes in sorted(files.items(), key=lambda item: (-item[1], item[0])):
        least = assigned.index(min(assigned))
        assigned[least] += nbytes
        if least == crew.rank:
            own.add(file)
    return own

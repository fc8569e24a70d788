"""The processes that share one conversion: each fills some of the output files, the first one begins and ends the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Crew(Protocol):
    """`rank` of `size` processes that see the same source and the same target folder."""

    rank: int
    size: int

    def meet(self, failure: BaseException | None = None) -> None:
        """Wait for the others; raises in all of them if any brings a failure, or is gone."""
        ...


class Alone:
    """One process that does it all."""

    rank = 0
    size = 1

    def meet(self, failure: BaseException | None = None) -> None:
        """Raise the failure, if there is one."""
        if failure is not None:
            raise failure


ALONE = Alone()


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

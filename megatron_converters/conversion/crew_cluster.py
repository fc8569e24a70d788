"""Processes started by torchrun or srun on machines that share a folder: torch.distributed joins them, with gloo."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import NamedTuple

from ..basics.errors import ConversionError, Stopped, UsageError
from .crew import ALONE, Crew, Word

#: Longest wait for the others to start.
_RENDEZVOUS = timedelta(minutes=10)
#: Longest wait for the others to finish their share. A process that dies is noticed at once, by its connections.
_SHARE = timedelta(days=2)


class _Place(NamedTuple):
    rank: int
    size: int


def _place(environment: Mapping[str, str]) -> _Place | None:
    """This process's rank and the number of processes, as torchrun or srun say; None where neither started it.

    `SLURM_STEP_NUM_TASKS` is set by srun alone; sbatch sets `SLURM_NTASKS` for its own script, too.
    """
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if rank in environment and size in environment:
            if not (environment[rank].isdecimal() and environment[size].isdecimal()):
                raise UsageError(f"{rank}={environment[rank]} and {size}={environment[size]} must be numbers")
            place = _Place(int(environment[rank]), int(environment[size]))
            if place.rank >= place.size:
                raise UsageError(f"{rank}={place.rank} must be below {size}={place.size}; unset both to run alone")
            return place
    return None


def crew_of_environment() -> Crew:
    """The crew that torchrun or srun has started; alone where there is none."""
    place = _place(os.environ)
    if place is None or place.size == 1:
        return ALONE
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UsageError(
            f"this is process {place.rank} of {place.size}, but {' and '.join(missing)} are not set; set them to the first "
            "node's name and a free port, as scripts/slurm does"
        )
    return _Cluster(place)


class _Cluster:
    """A crew joined by torch.distributed."""

    def __init__(self, place: _Place) -> None:
        self.rank, self.size = place
        import torch.distributed as dist

        self._dist = dist
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
                rank=self.rank,
                world_size=self.size,
                timeout=_RENDEZVOUS,
            )
            self._group = dist.new_group(backend="gloo", timeout=_SHARE)
        except (RuntimeError, ValueError) as error:
            raise ConversionError(
                f"process {self.rank} of {self.size} has not met the others at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']}: {error}"
            ) from error

    def exchange(self, word: Word) -> list[Word]:
        words: list[Word | None] = [None] * self.size
        try:
            self._dist.all_gather_object(words, word, group=self._group)
        except RuntimeError as error:
            raise Stopped(f"another process of the conversion is gone ({str(error).splitlines()[0]})") from error
        return [said or Word() for said in words]

    def close(self) -> None:
        """End the connections, which would abort the process where they live until its end."""
        self._dist.destroy_process_group()

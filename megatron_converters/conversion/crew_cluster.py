"""Crew of processes that torchrun or srun started on machines that share a folder, connected by torch.distributed (gloo)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

from ..basics.errors import ConversionError, Stopped, UsageError
from ..basics.packages import need
from .crew import ALONE, Crew, Peers, Report

#: Longest wait for the other processes to start.
_RENDEZVOUS_TIMEOUT = timedelta(minutes=10)
#: Longest wait for the other processes to finish their files. A process that dies is noticed at once, by its connections.
_SHARE_TIMEOUT = timedelta(days=2)


class _Process(NamedTuple):
    """Rank of this process, and number of processes."""

    rank: int
    size: int


def _process(environment: Mapping[str, str]) -> _Process | None:
    """Rank of this process and number of processes, as torchrun or srun set them; None where neither started it.

    Only srun sets `SLURM_STEP_NUM_TASKS`; sbatch sets `SLURM_NTASKS` for its own script, too.
    """
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if rank in environment and size in environment:
            if not (environment[rank].isdecimal() and environment[size].isdecimal()):
                raise UsageError(
                    f"{rank}={environment[rank]} and {size}={environment[size]} must be numbers; unset both to run alone"
                )
            process = _Process(int(environment[rank]), int(environment[size]))
            if process.rank >= process.size:
                raise UsageError(f"{rank}={process.rank} must be below {size}={process.size}; unset both to run alone")
            return process
    return None


def is_first_process() -> bool:
    """Whether this process is the first of those that torchrun or srun started, or the only one."""
    with suppress(UsageError):
        process = _process(os.environ)
        return process is None or process.rank == 0
    return True


def crew_of_environment() -> Crew:
    """Crew that torchrun or srun started; a crew of one where neither did."""
    process = _process(os.environ)
    if process is None or process.size == 1:
        return ALONE
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UsageError(
            f"this is process {process.rank} of {process.size} without {' and '.join(missing)}; set MASTER_ADDR to the first "
            "node's name and MASTER_PORT to a free port, as scripts/slurm does"
        )
    return _Cluster(process)


class _Cluster(Peers):
    """Crew connected by torch.distributed. torchrun and srun end the processes of a job that has lost one."""

    def __init__(self, process: _Process) -> None:
        self.rank, self.size = process
        need("torch", "torch", "a conversion on several machines")
        import torch.distributed as dist

        self._dist = dist
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
                rank=self.rank,
                world_size=self.size,
                timeout=_RENDEZVOUS_TIMEOUT,
            )
            self._group = dist.new_group(backend="gloo", timeout=_SHARE_TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise ConversionError(
                f"process {self.rank} of {self.size} could not connect to the others at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']}: {error}"
            ) from error

    def exchange(self, report: Report) -> list[Report]:
        if report.interrupted:  # the others may be busy for long; they find that this one is gone
            return [report]
        reports: list[Report | None] = [None] * self.size
        try:
            self._dist.all_gather_object(reports, report, group=self._group)
        except RuntimeError as error:
            raise Stopped(f"another process of the conversion is gone ({str(error).splitlines()[0]})") from error
        return [received or Report() for received in reports]

    def close(self) -> None:
        """Close the connections; any still open when the process ends would abort it."""
        self._dist.destroy_process_group()

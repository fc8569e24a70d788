"""Crew of the processes of a live model that write its files, which meet through the store of their heartbeat."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

from ..conversion.crew import Peers, Report
from .heartbeat import Heartbeat, LostProcess


class Writers(Peers):
    """Process `process` among those in `writers`, in the order of these."""

    def __init__(self, heartbeat: Heartbeat, writers: Sequence[int], process: int) -> None:
        self._heartbeat, self._writers = heartbeat, tuple(writers)
        self._process = process
        self._meetings = 0

    @property
    def rank(self) -> int:
        """Number of this process among them."""
        return self._writers.index(self._process)

    @property
    def size(self) -> int:
        """Number of writers."""
        return len(self._writers)

    def exchange(self, report: Report) -> list[Report]:
        """Wait for the others; returns all reports. Raises `LostProcess` if a process is gone, unless this one has failed."""
        self._meetings += 1
        name = f"meeting {self._meetings}"
        self._heartbeat.put(f"{name} {self._process}", pickle.dumps(report))
        if report.failure is not None:  # the others may be waiting for weights of this process
            self._heartbeat.give_up(report.failure)
        try:
            found = [self._heartbeat.wait_for(f"{name} {writer}") for writer in self._writers]
        except LostProcess:
            if report.failure is not None:
                return [report]
            raise
        return [pickle.loads(data) for data in found]  # noqa: S301 - from a process of this run

    def close(self) -> None:
        """Do nothing: the heartbeat ends by itself."""

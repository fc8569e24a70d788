"""Seconds and memory of a process by phase, measured by itself: what the scripts that `live.py` runs share.

Needs Linux, and the standard library alone, since these scripts run in different environments.
"""

from __future__ import annotations

import json
import os
import select
import struct
import time
from pathlib import Path
from typing import NamedTuple

_SAMPLE_SECONDS = 0.01
_PEAKS = struct.Struct("dd")


class Memory(NamedTuple):
    """Memory of a process in MiB: its own (RssAnon), and with the pages of mapped files (VmRSS)."""

    anonymous: float
    resident: float

    def or_more(self, other: Memory) -> Memory:
        """Return the larger of both, field by field."""
        return Memory(max(self.anonymous, other.anonymous), max(self.resident, other.resident))


class Watch:
    """Phases of this process, the first of which began when the process started.

    Make it before anything large is imported: it forks a process that samples the memory of this one. A thread would have to wait
    for any code that holds the interpreter.
    """

    def __init__(self) -> None:
        self._phases: dict[str, dict[str, float]] = {}
        self._begun = 0.0
        self._questions, self._answers = _start_sampling()

    def done(self, phase: str) -> None:
        """End a phase; the next one begins."""
        now = _age()
        peak = self._peak()
        self._phases[phase] = {
            "seconds": round(now - self._begun, 6),
            "anonymous_mib": round(_memory(os.getpid()).anonymous),
            "peak_anonymous_mib": round(peak.anonymous),
            "peak_resident_mib": round(peak.resident),
        }
        self._begun = now

    def report(self) -> str:
        """All phases as JSON, with the seconds from the start of the process to the end of the last one, and peaks over all."""
        phases = self._phases.values()
        times = os.times()
        totals = {"wall_seconds": round(self._begun, 6), "cpu_seconds": round(times.user + times.system, 2)}
        peaks = {name: max(phase[name] for phase in phases) for name in ("peak_anonymous_mib", "peak_resident_mib")}
        return json.dumps({**totals, **peaks, "phases": self._phases})

    def _peak(self) -> Memory:
        """Peak of the memory since the last call."""
        os.write(self._questions, b"?")
        return Memory(*_PEAKS.unpack(os.read(self._answers, _PEAKS.size)))


def _age() -> float:
    """Seconds since this process started; the kernel says when in steps of 10 ms."""
    started = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def _memory(pid: int) -> Memory:
    """Memory of a process now."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return Memory(*(int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "VmRSS")))


def _start_sampling() -> tuple[int, int]:
    """Fork the process that samples; returns the pipes for questions to it and for its answers."""
    watched = os.getpid()
    questions, ask = os.pipe()
    answers, answer = os.pipe()
    if os.fork():
        os.close(questions)
        os.close(answer)
        return ask, answers
    os.close(ask)
    os.close(answers)
    try:
        _sample(watched, questions, answer)
    finally:
        os._exit(0)


def _sample(pid: int, questions: int, answer: int) -> None:
    """Answer each question with the peak since the one before, until the process that asks ends."""
    peak = Memory(0, 0)
    while True:
        asked = select.select([questions], [], [], _SAMPLE_SECONDS)[0]
        if asked and not os.read(questions, 1):
            return
        peak = peak.or_more(_memory(pid))
        if asked:
            os.write(answer, _PEAKS.pack(*peak))
            peak = Memory(0, 0)

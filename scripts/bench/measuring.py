"""Measurement of commands: wall and CPU seconds and memory, and what comes before each run so that none pays for another.

Needs Linux. On a virtual machine the first touch of memory that the guest has not used lately takes up to 1 s a GiB, which would
fall on whoever comes first, so memory is touched before each run.
"""

from __future__ import annotations

import mmap
import os
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_SAMPLE_SECONDS = 0.02
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20
#: Program that gets as many bytes of memory as its argument says, and gives them back.
_TOUCH = (
    "import mmap, sys; mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)"
)


class Measured(NamedTuple):
    """Measurements of one run: wall and CPU (user and system) seconds, and the peaks in MiB of the memory of all its processes.

    Anonymous memory is the processes' own; total memory also counts pages of mapped files, which the kernel reclaims.
    """

    wall: float
    cpu: float
    anonymous: float
    total: float


def run_unmeasured(command: list[str]) -> None:
    """Run a command in the root of this checkout without measuring it; exits if it fails."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed with {done.returncode}: {done.stderr}")


def measure(command: list[str]) -> Measured:
    """Run a command in the root of this checkout, and sample the memory of its processes; exits if it fails."""
    with tempfile.TemporaryFile() as errors:
        before = _cpu_of_children()
        start = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
        anonymous, total = _peaks(process.pid)
        process.wait()
        wall = time.monotonic() - start
        cpu = _cpu_of_children() - before
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{' '.join(command)} failed with {process.returncode}: {errors.read().decode()}")
    return Measured(wall, cpu, anonymous, total)


def _cpu_of_children() -> float:
    """CPU seconds of all processes that this one has waited for, and of those that these have waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _peaks(pid: int) -> tuple[float, float]:
    """Peaks of anonymous and of total memory in MiB, of a process and those that it starts, until it ends."""
    anonymous = total = 0.0
    ended = os.pidfd_open(pid)
    try:
        while not select.select([ended], [], [], _SAMPLE_SECONDS)[0]:
            sampled = [_memory(member) for member in _family(pid)]
            anonymous = max(anonymous, sum(own for own, _ in sampled))
            total = max(total, sum(resident for _, resident in sampled))
    finally:
        os.close(ended)
    return anonymous, total


def _family(pid: int) -> Iterator[int]:
    """A process and all that it started, which run now."""
    yield pid
    with suppress(FileNotFoundError, ProcessLookupError):  # it ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            for child in _words(f"/proc/{pid}/task/{thread}/children"):
                yield from _family(int(child))


def _memory(pid: int) -> tuple[float, float]:
    """Anonymous memory (RssAnon) and total memory (VmRSS) of a process in MiB; 0 if it has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        pages = _words(f"/proc/{pid}/statm")  # a third of the time that its `status` takes
        resident, of_files = int(pages[1]) * _PAGE_MIB, int(pages[2]) * _PAGE_MIB
        return resident - of_files, resident
    return 0.0, 0.0


def _words(path: str) -> list[bytes]:
    """Words of a file, faster than by a `Path`: fifty times a second adds up."""
    with open(path, "rb", buffering=0) as file:
        return file.read().split()


def settle(folder: Path, reads: Iterable[Path], touch: int) -> None:
    """Flush what earlier runs left, bring what the next one reads into the page cache, and touch so many bytes of memory."""
    subprocess.run(["sync", "-f", str(folder)], check=True)
    for path in reads:
        _read(path)
    touch = min(touch, _available() // 2)
    if touch:
        subprocess.run([sys.executable, "-S", "-c", _TOUCH, str(touch)], check=True)


def _read(path: Path) -> None:
    buffer = mmap.mmap(-1, 1 << 20)
    for file in files_of(path):
        if file.stat().st_blocks * 512 < file.stat().st_size // 2:
            continue  # a sparse file, of which commands read the beginning alone
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def _available() -> int:
    """Bytes of memory that are available without swapping."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def files_of(path: Path) -> list[Path]:
    """A file itself, or all files under a folder."""
    return [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files under a folder."""
    return sum(file.stat().st_size for file in files_of(path))


def remove(folder: Path) -> None:
    """Remove a folder if it is there."""
    if folder.exists():
        shutil.rmtree(folder)

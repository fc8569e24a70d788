"""Whether a model fits in float32 into the memory that this process can have."""

from __future__ import annotations

from pathlib import Path

from ..basics.errors import ConversionError
from . import cgroup

_MEMINFO = Path("/proc/meminfo")
#: What a process with torch and megatron-core or transformers needs before it holds a model (measured: 0.4 to 0.6 GB).
_PROCESS_BYTES = 600 * 10**6
#: How often logits are in memory at once, on their way from the processes and until they are compared.
_COPIES_OF_LOGITS = 6
_FLOAT32_BYTES = 4


def check(what: str, parameters: int, processes: int, logits: int) -> None:
    """Raise where this many parameters and logits in float32, held by so many processes, exceed the memory that is free.

    Linux alone says how much that is; elsewhere nothing is checked.
    """
    free = available()
    needed = (parameters + _COPIES_OF_LOGITS * logits) * _FLOAT32_BYTES + processes * _PROCESS_BYTES
    if free is not None and needed > free:
        raise ConversionError(
            f"{what} needs about {_gigabytes(needed)} ({parameters:,} parameters and {logits:,} logits in float32 in "
            f"{processes} process{'es' if processes > 1 else ''}), but {_gigabytes(free)} are free here; use fewer and shorter "
            "sequences, or a machine with more memory"
        )


def available() -> int | None:
    """Bytes that this process can have without swapping: the least of what the machine and its control groups have left.

    None where the system says neither.
    """
    return min((number for number in (_machine(), cgroup.free()) if number is not None), default=None)


def _machine() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kibibytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kibibytes[0]) * 1024 if kibibytes else None


def _gigabytes(count: int) -> str:
    return f"{count / 10**9:.1f} GB"

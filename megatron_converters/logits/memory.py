"""Check that a model in float32 fits into the memory that is free for this process."""

from __future__ import annotations

from pathlib import Path

from ..basics.errors import ConversionError
from . import cgroup

_MEMINFO = Path("/proc/meminfo")
#: Bytes that a process with torch and megatron-core or transformers needs without a model (measured: 0.4 to 0.6 GB).
_PROCESS_BYTES = 600 * 10**6
#: Copies of the logits in memory at once, while they are sent from the processes and compared.
_COPIES_OF_LOGITS = 6
_FLOAT32_BYTES = 4


def check(what: str, parameters: int, processes: int, logits: int) -> None:
    """Raise `ConversionError` if these numbers of float32 parameters, float32 logits and processes exceed the free memory.

    `what` names the model in the message. Only Linux reports free memory; elsewhere nothing is checked.
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
    """Bytes available without swapping: the smaller of what the machine and the control groups have left.

    None if the system reports neither.
    """
    return min((number for number in (_machine_available(), cgroup.free()) if number is not None), default=None)


def _machine_available() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kibibytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kibibytes[0]) * 1024 if kibibytes else None


def _gigabytes(count: int) -> str:
    return f"{count / 10**9:.1f} GB"

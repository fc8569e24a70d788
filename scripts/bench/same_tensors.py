"""Comparison of two folders of safetensors bit for bit, by the standard library alone.

python same_tensors.py FOLDER OTHER
"""

from __future__ import annotations

import json
import mmap
import struct
import sys
from pathlib import Path
from typing import Any, NamedTuple

_CHUNK = 1 << 22  # slices are copies


class Stored(NamedTuple):
    """Tensor in a mapped file: its entry of the header, and where its bytes begin and end."""

    entry: dict[str, Any]
    file: mmap.mmap
    begin: int
    end: int

    def same(self, other: Stored) -> bool:
        """Whether dtype, shape and bytes are the same."""
        if any(self.entry[key] != other.entry[key] for key in ("dtype", "shape")):
            return False
        starts = range(0, self.end - self.begin, _CHUNK)
        return all(self.chunk(start) == other.chunk(start) for start in starts)

    def chunk(self, start: int) -> bytes:
        """Up to `_CHUNK` bytes of the tensor, from its byte `start` on."""
        return self.file[self.begin + start : min(self.begin + start + _CHUNK, self.end)]


def tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder's safetensors files by name."""
    found: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + struct.unpack("<Q", mapped[:8])[0]
        for name, entry in json.loads(mapped[8:start]).items():
            if name == "__metadata__":
                continue
            if name in found:
                sys.exit(f"{folder} has {name} twice")
            found[name] = Stored(entry, mapped, *(start + offset for offset in entry["data_offsets"]))
    return found


def check_same(folder: Path, other: Path) -> int:
    """Exit naming what differs, unless both folders have the same tensors; returns how many."""
    ours, theirs = tensors(folder), tensors(other)
    if not ours:
        sys.exit(f"{folder} has no tensors")
    if ours.keys() != theirs.keys():
        sys.exit(f"only one of {folder} and {other} has {', '.join(sorted(ours.keys() ^ theirs.keys()))}")
    unequal = [name for name, stored in ours.items() if not stored.same(theirs[name])]
    if unequal:
        sys.exit(f"{folder} and {other} differ in {', '.join(unequal)}")
    return len(ours)


if __name__ == "__main__":
    print(f"{check_same(Path(sys.argv[1]), Path(sys.argv[2]))} tensors are the same")

"""What a source has beside the weights, and whether its files are still as they were."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..sharding.ranks import Parallel
from .capacity_bins import CapacityBins


@dataclass
class Origin:
    """What travels beside the weights: configuration, tokenizer and training arguments of the source, where it has them."""

    described: str
    hf_config: dict[str, Any] | None = None
    generation_config: dict[str, Any] | None = None
    tokenizer: str | None = None
    margs: argparse.Namespace | None = None
    iteration: int | None = None
    parallel: Parallel | None = None
    capacity_bins: CapacityBins | None = None
    notes: list[str] = field(default_factory=list)
    #: Tensors of the source that are left out, and why.
    ignored: list[str] = field(default_factory=list)
    #: The source's files by path: bytes, and time of change in nanoseconds. None for what came as messages.
    identity: dict[str, list[int]] | None = None


def identity_of(folder: Path, paths: Iterable[str | Path]) -> dict[str, list[int]]:
    """Each file's bytes and time of change, by its path within `folder`."""
    found = {}
    for path in sorted({Path(path) for path in paths}):
        status = path.stat()
        inside = path.relative_to(folder) if path.is_relative_to(folder) else path
        found[str(inside)] = [status.st_size, status.st_mtime_ns]
    return found


def changed_files(origin: Origin) -> list[str]:
    """The source's files that are no longer as they were when it was opened."""
    folder, changed = Path(origin.described), []
    for name, identity in (origin.identity or {}).items():
        try:
            now = identity_of(folder, [folder / name])[name]
        except OSError:
            now = []
        if now != identity:
            changed.append(name)
    return changed

"""Assets of a source beside its weights, and changes of its files since it was opened."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..basics.quantities import count, size
from ..sharding.ranks import Parallel
from ..storage.hub_cache import place_around
from ..storage.tensor import StoredTensor
from .capacity_bins import CapacityBins

#: Keys of marks: the model's type, the beginning of names of its text part, and the form of its experts.
MODEL, TEXT, EXPERTS = "model_type", "text", "experts"


@dataclass(frozen=True)
class Carried:
    """What a model of images and text has beside its text part, carried as it is: tensors by name, and small files by name.

    `marks` say how names of the text part are written.
    """

    tensors: Mapping[str, StoredTensor]
    marks: Mapping[str, str]
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(data.nbytes for data in self.tensors.values())

    @property
    def summary(self) -> str:
        """Number and size of the tensors, in words."""
        return f"{count(len(self.tensors), 'tensor')} ({size(self.nbytes)}) beside the text part of {self.marks[MODEL]}"

    @property
    def note(self) -> str:
        """What becomes of the tensors, for the user."""
        return f"{self.summary}: carried as they are"


@dataclass
class Origin:
    """Assets beside the weights: configuration, tokenizer and training arguments of the source, where it has them."""

    described: str
    hf_config: dict[str, Any] | None = None
    generation_config: dict[str, Any] | None = None
    tokenizer: str | None = None
    margs: argparse.Namespace | None = None
    iteration: int | None = None
    parallel: Parallel | None = None
    capacity_bins: CapacityBins | None = None
    #: Where a checkpoint has its model's multipliers: a value of `--mup`.
    mup: str | None = None
    #: Format of a Megatron-LM checkpoint, by its name as an option (`--ckpt-format`); None for other sources.
    checkpoint_format: str | None = None
    #: Files of the model's own code, by name.
    code_files: dict[str, Path] = field(default_factory=dict)
    #: What a model of images and text has beside its text part.
    carried: Carried | None = None
    notes: list[str] = field(default_factory=list)
    #: Warnings among the notes that a user should read before the conversion, too.
    urgent: list[str] = field(default_factory=list)
    #: Tensors of the source that are left out, and why.
    ignored: list[str] = field(default_factory=list)
    #: Path of the file of each tensor that is taken from another folder than the source, by its name there.
    backfilled: dict[str, str] = field(default_factory=dict)
    #: Where the optimizer's float32 originals of the weights are, which are not read, in words; no text if there are none.
    float32_originals: str = ""
    #: [bytes, modification time in nanoseconds] of the source's files by path. None for a source that came as messages.
    identity: dict[str, list[int]] | None = None

    def say_first(self, notes: Iterable[str]) -> None:
        """Put notes before the others, warnings among the urgent ones, too; what is noted already is not repeated."""
        new = [note for note in notes if note not in self.notes]
        self.notes[:0] = new
        self.urgent[:0] = [note for note in new if note.startswith("warning: ")]

    @property
    def hub(self) -> str | None:
        """Name of the model on the Hub, with its commit, if its files lie in a cache of huggingface_hub."""
        place = place_around(folder_of(self.described))
        return None if place is None else str(place)

    def tell_at_once(self, line: str) -> None:
        """Add a note that a user should read before the conversion, too."""
        self.notes.append(line)
        self.urgent.append(line)


def folder_of(source: str | Path) -> Path:
    """Folder of a source, which is a folder itself or a single file."""
    path = Path(source)
    return path.parent if path.is_file() else path


def file_identities(source: Path, paths: Iterable[str | Path]) -> dict[str, list[int]]:
    """[bytes, modification time in nanoseconds] of each file, by its path within the source's folder; absolute outside of it."""
    folder = folder_of(source)
    found = {}
    for path in sorted({Path(path) for path in paths}):
        status = path.stat()
        relative = path.relative_to(folder) if path.is_relative_to(folder) else path.absolute()
        found[str(relative)] = [status.st_size, status.st_mtime_ns]
    return found


def changed_files(origin: Origin) -> list[str]:
    """Files of the source that have changed since it was opened."""
    folder, changed = folder_of(origin.described), []
    for name, identity in (origin.identity or {}).items():
        try:
            now = file_identities(folder, [folder / name])[name]
        except OSError:
            now = []
        if now != identity:
            changed.append(name)
    return changed

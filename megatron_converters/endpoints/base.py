"""What every endpoint offers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..capacity_bins import CapacityBins
from ..dtypes import DType
from ..errors import ConversionError
from ..outline import Fill, Outline
from ..parallel import Parallel
from ..plan import Piece, Sources
from ..slots import Ref
from ..spec import ModelSpec
from ..staging import Staging


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


class Source(Protocol):
    """A model to read."""

    spec: ModelSpec
    origin: Origin

    def dtype_of(self, ref: Ref) -> DType:
        """The dtype in which the source holds a tensor."""
        ...

    def read(self, ref: Ref) -> Sources:
        """Where the tensor's elements lie."""
        ...

    def close(self) -> None:
        """Called after the last read; raises if anything was left unread."""
        ...


class Target(Protocol):
    """Files to write. `prepare` first, which touches nothing; `assets`, all fills, `clear` and `show` follow in this order."""

    save_dir: Path

    def prepare(self, spec: ModelSpec, origin: Origin, dtype_of: Callable[[Ref], DType]) -> Outline:
        """Check that the model can be written, and say to the byte which files will be."""
        ...

    def shown(self) -> Path | None:
        """The folder of a complete output at the final place; None where there is none, or it is to be replaced."""
        ...

    def refuse_existing(self) -> None:
        """Raise if there is something at the final place that may not be replaced."""
        ...

    def assets(self, folder: Path) -> None:
        """Write the small files into the folder where the others are being filled."""
        ...

    def fills(self, ref: Ref) -> Iterator[Fill]:
        """Where one tensor of the model goes."""
        ...

    def clear(self, staging: Staging) -> None:
        """Take away what the complete files replace, as far as they will not do so themselves."""
        ...

    def show(self, staging: Staging) -> list[str]:
        """Move the complete files to their final place, what makes them a model to readers last; returns what to tell the user.

        Goes on where a run that was killed meanwhile has stopped.
        """
        ...


def wanted_dtype(source: Source, override: DType | None) -> Callable[[Ref], DType]:
    """The dtype to write: the source's, unless `override` asks for another. Raises where weights are no floats.

    A router that is wider than the model is meant to be; it stays so.
    """

    def dtype_of(ref: Ref) -> DType:
        stored = source.dtype_of(ref)
        if not stored.floating:
            raise ConversionError(
                f"{ref} is stored as {stored}, which is no plain floating-point type; convert it first"
            )
        kept = ref.slot.keeps_precision and stored.itemsize > source.spec.dtype.itemsize
        return stored if override is None or kept else override

    return dtype_of


def first_dtype(pieces: tuple[Piece, ...]) -> DType:
    """The dtype of a slot held as these pieces (their agreement is checked when they are planned)."""
    return pieces[0].data.dtype

"""What every endpoint offers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from ..assets.origin import Origin
from ..basics.dtypes import DType
from ..basics.errors import ConversionError
from ..model.slots import Ref
from ..model.spec import ModelSpec
from .composing import Piece, Sources
from .outline import Fill, Outline
from .staging import Staging


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

    @property
    def output(self) -> Path:
        """The folder that will hold the files and the manifest; known once the target is prepared."""
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

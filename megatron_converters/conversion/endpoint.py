"""Source and target, as every format offers them."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from ..assets.origin import Origin
from ..basics.dtypes import DType
from ..basics.errors import ConversionError
from ..model.slots import Precision, Ref, refs
from ..model.spec import ModelSpec
from .composing import Piece, Sources
from .outline import Fill, Outline
from .staging import Staging


class Source(Protocol):
    """Model to read, one tensor at a time."""

    spec: ModelSpec
    origin: Origin

    def dtype_of(self, ref: Ref) -> DType:
        """Dtype in which the source holds a tensor."""
        ...

    def read(self, ref: Ref) -> Sources:
        """Pieces that hold a tensor's elements."""
        ...

    def close(self) -> None:
        """End reading; raises `ConversionError` if anything was left unread."""
        ...


class Target(Protocol):
    """Files to write. `prepare`, which touches nothing, comes first; then `assets`, all fills, `clear`, `show`, in this order."""

    save_dir: Path

    def prepare(self, spec: ModelSpec, origin: Origin, dtype_of: Callable[[Ref], DType]) -> Outline:
        """Check that the model can be written; returns the files to the byte."""
        ...

    @property
    def output(self) -> Path:
        """Folder of the files, or the one file, known once the target is prepared."""
        ...

    @property
    def manifest(self) -> Path:
        """Manifest at its final place, beside the files, known once the target is prepared."""
        ...

    @property
    def marker(self) -> str | None:
        """Name of the small file that makes the others a model; None if small files cannot be replaced alone, or all are to be."""
        ...

    def shown(self) -> Path | None:
        """Complete output at the final place; None where there is none, or where it is to be replaced."""
        ...

    def refuse_existing(self) -> None:
        """Raise if something at the final place may not be replaced."""
        ...

    def assets(self, folder: Path) -> None:
        """Write the small files (configuration, tokenizer, flags) into `folder`, beside the files being filled."""
        ...

    def fills(self, ref: Ref) -> Iterator[Fill]:
        """Places in the files where one tensor goes."""
        ...

    def clear(self, staging: Staging) -> None:
        """Remove older files that the complete ones would not overwrite."""
        ...

    def show(self, staging: Staging) -> list[str]:
        """Move the complete files to their final place, last the file that makes them a model; returns lines for the user.

        Can be repeated after a kill.
        """
        ...


def wanted_dtype(source: Source, override: DType | None) -> Callable[[Ref], DType]:
    """Dtype to write each tensor in: the source's, or `override`. Raises `ConversionError` where weights are no floats.

    A router wider than the model stays so: rounding it would change which experts are chosen.
    """

    def dtype_of(ref: Ref) -> DType:
        stored = source.dtype_of(ref)
        if not stored.floating:
            raise ConversionError(
                f"{ref} is stored as {stored}, which is no plain floating-point type; convert it first"
            )
        kept = ref.slot.precision is not Precision.MODEL and stored.itemsize > source.spec.dtype.itemsize
        return stored if override is None or kept else override

    return dtype_of


def main_dtype(spec: ModelSpec, dtype_of: Callable[[Ref], DType]) -> DType:
    """Dtype of a model whose tensors are of several: that of most bytes, `spec.dtype` where that is one of two as large.

    Slots with a precision of their own, such as routers, do not count.
    """
    return _dtypes(spec, dtype_of)[0]


def with_main_dtype(spec: ModelSpec, dtype_of: Callable[[Ref], DType]) -> tuple[ModelSpec, list[str]]:
    """Spec of the dtype of most bytes (`main_dtype`), and a note on slots of another, if there are any."""
    main, stored = _dtypes(spec, dtype_of)
    others = {name: dtype for name, dtype in stored if dtype != main}
    named = ", ".join(f"{name} {dtype}" for name, dtype in others.items())
    note = (
        f"tensors are of several dtypes: the model is taken for {main}, which most bytes are; stored otherwise: {named}"
    )
    return dataclasses.replace(spec, dtype=main), [note] if others else []


def _dtypes(spec: ModelSpec, dtype_of: Callable[[Ref], DType]) -> tuple[DType, list[tuple[str, DType]]]:
    """Dtype of most bytes, and each slot's name with each dtype that it has, in the order of the refs."""
    nbytes: Counter[DType] = Counter()
    stored: dict[tuple[str, DType], None] = {}
    for ref in refs(spec):
        if ref.slot.precision is Precision.MODEL:
            dtype = dtype_of(ref)
            nbytes[dtype] += math.prod(ref.shape(spec)) * dtype.itemsize
            stored[ref.slot.name, dtype] = None
    return max(nbytes, key=lambda dtype: (nbytes[dtype], dtype == spec.dtype)), list(stored)


def first_dtype(pieces: tuple[Piece, ...]) -> DType:
    """Dtype of a slot held as these pieces; that they agree is checked when they are planned."""
    return pieces[0].data.dtype

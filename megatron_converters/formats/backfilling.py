"""Layers of multi-token prediction that training ran without, taken from the Hugging Face folder that the training began with."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from ..assets.origin import file_identities, folder_of
from ..basics.dtypes import DType
from ..basics.errors import ConversionError, UsageError, raise_all
from ..basics.quantities import count
from ..conversion.composing import Piece, Sources
from ..conversion.endpoint import Source
from ..families.config_json import differences
from ..model.slots import MTP, Ref, refs
from .huggingface.source import HFSource

#: Properties in which both folders may differ: they matter to training, or are limits, or are what is taken from the other.
_ASIDE = (
    *("initializer_range", "attention_dropout", "moe_aux_loss_coeff", "max_position_embeddings"),
    *("dtype", "mtp_num_layers"),
)


class Backfilled:
    """Source with the layers of multi-token prediction of another folder, and all else of its own."""

    def __init__(self, source: Source, other: HFSource, folder: Path) -> None:
        """Raise `ConversionError` unless the source lacks these layers, and the folder has them, of the same model."""
        self._source, self._other, self._folder = source, other, folder
        layers, name = len(other.spec.mtp), source.origin.described
        if source.spec.mtp:
            raise UsageError(
                f"--backfill-from {folder}: {name} has its own {count(len(source.spec.mtp), 'layer')} of multi-token prediction, "
                "so that nothing is missing; leave it out"
            )
        if not layers:
            raise ConversionError(
                f"--backfill-from {folder}: it has no layers of multi-token prediction, the only tensors that are taken from it; "
                "give the folder that the training began with, or leave it out"
            )
        self.spec = source.spec.replaced(mtp_num_layers=layers)
        names = [each for each in dict.fromkeys((*self.spec.values, *other.spec.values)) if each not in _ASIDE]
        raise_all(
            f"--backfill-from {folder} is another model than {name}, which has:",
            differences(self.spec, other.spec, names),
            remedy="give the folder that the training began with",
        )
        self.origin = source.origin
        pieces = [piece for ref in refs(self.spec) if ref.stack == MTP for piece in other.read(ref).pieces]
        taken = {name.tensor: self._path(name.file) for piece in pieces for name in piece.names}
        self.origin.backfilled = dict(sorted(taken.items()))
        if self.origin.identity is not None:
            files = [folder / path for path in other.origin.identity or ()]
            self.origin.identity |= file_identities(folder_of(name), files)
        self.origin.notes += [
            f"{count(len(taken), 'tensor')} of {count(layers, 'layer')} of multi-token prediction: taken from {folder}, as "
            "--backfill-from says, since the source was trained without; they are as they were before this training"
        ]

    @property
    def two_dtypes(self) -> str:
        """In words, that the layers are of another dtype than the model; empty if they are not."""
        own, theirs = self._source.spec.dtype, self._other.spec.dtype
        if own == theirs:
            return ""
        return f"--backfill-from {self._folder}: its weights are {theirs}, and those of {self.origin.described} {own}"

    def dtype_of(self, ref: Ref) -> DType:
        """Dtype of a ref where it is stored."""
        return self._holder(ref).dtype_of(ref)

    def read(self, ref: Ref) -> Sources:
        """Pieces of a ref; those of the other folder have its path in their names."""
        sources = self._holder(ref).read(ref)
        if ref.stack != MTP:
            return sources
        return Sources(tuple(self._named(piece) for piece in sources.pieces))

    def close(self) -> None:
        """End reading of both."""
        self._source.close()
        self._other.close()

    def _holder(self, ref: Ref) -> Source:
        return self._other if ref.stack == MTP else self._source

    def _path(self, file: str) -> str:
        return os.path.join(self._folder, file)

    def _named(self, piece: Piece) -> Piece:
        return dataclasses.replace(piece, name=piece.name._replace(file=self._path(piece.name.file)))


def refuse_two_dtypes(source: Source) -> None:
    """Raise `UsageError` for a source of two dtypes, which a dtype to write would make one."""
    if isinstance(source, Backfilled) and source.two_dtypes:
        raise UsageError(f"{source.two_dtypes}; say with --dtype in which type all are to be written")

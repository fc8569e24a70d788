"""Source that takes layers of multi-token prediction from another model: those that a training run has dropped."""

from __future__ import annotations

import dataclasses

from ..assets.origin import Origin, folder_of
from ..basics.dtypes import DType
from ..basics.errors import ConversionError
from ..basics.quantities import count
from ..conversion.composing import Sources
from ..conversion.endpoint import Source
from ..families.config_json import differences
from ..model.slots import MTP, Ref, refs
from ..model.spec import ModelSpec

#: Properties in which the two models may differ: they matter in training alone, or say how tensors are stored.
_MAY_DIFFER = ("dtype", "mtp_num_layers", "initializer_range", "attention_dropout", "moe_aux_loss_coeff")


class Backfilled:
    """Model of one source with the layers of multi-token prediction of another."""

    def __init__(self, source: Source, other: Source) -> None:
        self._source, self._other = source, other
        self.spec = _with_layers(source, other)
        self.origin = _with_files(source.origin, other.origin)
        taken = {piece.name for ref in refs(self.spec) if ref.stack == MTP for piece in other.read(ref).pieces}
        self.origin.notes.append(
            f"{count(len(self.spec.mtp), 'layer')} of multi-token prediction: {count(len(taken), 'tensor')} taken from "
            f"{other.origin.described}, as --backfill-from says, since the trained model has none; the manifest lists each"
        )

    def dtype_of(self, ref: Ref) -> DType:
        """Dtype in which the source that holds a ref has it."""
        return self._holder(ref).dtype_of(ref)

    def read(self, ref: Ref) -> Sources:
        """Pieces of a ref; those of the other source are named by its folder, too."""
        found = self._holder(ref).read(ref)
        if ref.stack != MTP:
            return found
        folder = folder_of(self._other.origin.described)
        pieces = tuple(
            dataclasses.replace(piece, name=piece.name._replace(file=f"{folder}/{piece.name.file}"))
            for piece in found.pieces
        )
        return Sources(pieces)

    def close(self) -> None:
        """End reading of both."""
        self._source.close()
        self._other.close()

    def _holder(self, ref: Ref) -> Source:
        return self._other if ref.stack == MTP else self._source


def _with_layers(source: Source, other: Source) -> ModelSpec:
    """Spec with the other's layers; raises `ConversionError` unless they are missing, there, and of the same model."""
    named = f"--backfill-from {other.origin.described}"
    if source.spec.mtp:
        raise ConversionError(
            f"{named}: {source.origin.described} has layers of multi-token prediction of its own; leave the option out, or "
            "replace them by passing --without-mtp, too"
        )
    if not other.spec.mtp:
        raise ConversionError(
            f"{named}: it has no layers of multi-token prediction; name the folder of a model that has"
        )
    compared = [name for name in (*source.spec.values, *other.spec.values) if name not in _MAY_DIFFER]
    found = differences(other.spec, source.spec, compared)
    if found:
        raise ConversionError(f"{named}: it is another model than {source.origin.described} ({'; '.join(found)})")
    return source.spec.replaced(mtp_num_layers=len(other.spec.mtp))


def _with_files(origin: Origin, other: Origin) -> Origin:
    """Origin whose files are those of both."""
    if origin.identity is None:
        return origin
    folder = folder_of(other.described).absolute()
    more = {str(folder / name): identity for name, identity in (other.identity or {}).items()}
    return dataclasses.replace(origin, identity={**origin.identity, **more})

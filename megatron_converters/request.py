"""A conversion as it is asked for, and the source and target that it means. Command lines and the API meet here."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import NamedTuple

from .basics.dtypes import DType, dtype_named
from .basics.errors import UsageError
from .basics.folders import new_folder
from .conversion.endpoint import Source, Target
from .formats.hub import located
from .formats.huggingface.options import HFOptions
from .formats.kinds import HF, MEGATRON, MINDSPORE, TARGETS
from .formats.megatron.options import MegatronOptions
from .formats.mindspore.options import MindSporeOptions
from .formats.reading import AS_FOUND, ReadOptions, open_source, refuse_unused
from .formats.writing import TargetOptions, open_target

#: Options of each format that can be written.
_OPTIONS: dict[str, type[TargetOptions]] = {HF: HFOptions, MEGATRON: MegatronOptions, MINDSPORE: MindSporeOptions}


class Job(NamedTuple):
    """Opened source and target of a conversion; `dtype` is None where the source's is kept."""

    source_format: str
    source: Source
    target_format: str
    target: Target
    dtype: DType | None


@dataclass(frozen=True)
class Request:
    """Conversion of the folder `src` into the folder `dst`.

    `to` is "hf", "megatron" or "mindspore"; where it is None, a checkpoint becomes a Hugging Face folder unless `megatron` options
    are given, and everything else a checkpoint. `dtype` is a name such as "bf16". Options of a format that is not written are
    refused. `notes` are the user's, on how the source was found.
    """

    src: str | os.PathLike[str]
    dst: str | os.PathLike[str]
    to: str | None = None
    dtype: str | None = None
    overwrite: bool = False
    read: ReadOptions = AS_FOUND
    megatron: MegatronOptions | None = None
    hf: HFOptions | None = None
    mindspore: MindSporeOptions | None = None
    notes: tuple[str, ...] = ()

    def located(self) -> Request:
        """The same request of the folder that `src` means, so that several processes read one commit of a model on the Hub."""
        found = located(self.src, download=self.read.download)
        return dataclasses.replace(self, src=found.folder, notes=(*self.notes, *found.notes))

    def open(self) -> Job:
        """Open both sides; nothing is written. Raises `ConversionError` where the request or the source is not sound."""
        dst = os.path.realpath(new_folder(self.dst))
        if os.path.realpath(new_folder(self.src)) == dst:
            raise UsageError(f"{self.dst} is the source itself; choose another folder to write to")
        bins = self.megatron is not None and self.megatron.load_capacity_bins
        read = dataclasses.replace(self.read, capacity_bins=bins or self.read.capacity_bins)
        source_format, source = open_source(self.src, read)
        refuse_unused([source_format], self.read)
        described = os.path.realpath(source.origin.described)
        if described == dst:
            raise UsageError(f"{self.dst} is the source itself; choose another folder to write to")
        source.origin.say_first(self.notes)
        chosen = target_format(source_format, self.to, self.megatron is not None)
        options = self._options(chosen)
        held = source.origin.mup
        if chosen != MEGATRON and self.read.mup not in (None, held):
            raise UsageError(
                f"--mup {self.read.mup}: the args of {self.src} say that it has its multipliers by {held!r}; leave it out"
            )
        overwrite = self.overwrite or options.overwrite
        if overwrite and os.path.dirname(described) == dst:
            raise UsageError(
                f"{self.src} lies in {self.dst}, where --overwrite could replace it; choose another folder to write to"
            )
        if self.read.download and chosen != MEGATRON:
            from .assets.tokenizer import fetch_tokenizer

            named = options.tokenizer or source.origin.tokenizer
            source.origin.notes += fetch_tokenizer(named, explicit=options.tokenizer is not None)
        target = open_target(self.dst, dataclasses.replace(options, overwrite=overwrite))
        dtype = None if self.dtype is None else dtype_named(self.dtype)
        if self.read.backfill_from is not None and dtype is None:
            from .formats.backfilling import refuse_two_dtypes

            refuse_two_dtypes(source)
        _warn_of_widening(source, dtype)
        return Job(source_format, source, chosen, target, dtype)

    def _options(self, chosen: str) -> TargetOptions:
        if chosen not in TARGETS:
            raise UsageError(f"to={chosen!r}: the formats that can be written are {', '.join(TARGETS)}")
        given = {HF: self.hf, MEGATRON: self.megatron, MINDSPORE: self.mindspore}
        other = next((name for name, options in given.items() if name != chosen and options is not None), None)
        if other is not None:
            raise UsageError(
                f"options for writing {TARGETS[other]} are given, but this writes {TARGETS[chosen]}; leave them out, or pass "
                f"to={other!r}"
            )
        return given[chosen] or _OPTIONS[chosen]()


def _warn_of_widening(source: Source, dtype: DType | None) -> None:
    """Warn that rounded weights are written in a wider type although their originals lie beside them."""
    origin, stored = source.origin, source.spec.dtype
    if origin.float32_originals and dtype is not None and dtype.itemsize > stored.itemsize:
        origin.tell_at_once(
            f"warning: the stored {stored} weights are widened to {dtype}, which does not restore what rounding has lost; the "
            f"optimizer's float32 originals ({origin.float32_originals}) are not read"
        )


def target_format(source_format: str, to: str | None, asks_for_checkpoint: bool) -> str:
    """Format to write: `to`, or the one that a source of this format is usually converted to."""
    return to or (HF if source_format == MEGATRON and not asks_for_checkpoint else MEGATRON)

"""What every endpoint offers, and the loop that joins two of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..capacity_bins import CapacityBins
from ..dtypes import DType
from ..errors import ConversionError
from ..execute import Executor
from ..parallel import Parallel
from ..plan import Piece, Sources
from ..progress import Progress
from ..slots import Ref, refs
from ..spec import ModelSpec


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
    """A model to write. After `prepare`, each ref is written once; then `commit`, or `abort` after any failure."""

    def prepare(self, spec: ModelSpec, origin: Origin, dtype_of: Callable[[Ref], DType]) -> int:
        """Check that the model can be written and lay out the files; returns the bytes to be filled."""
        ...

    def write(self, ref: Ref, sources: Sources, executor: Executor) -> None:
        """Write one tensor of the model."""
        ...

    def commit(self) -> list[str]:
        """Make the result complete and visible, as the last step; returns what to tell the user."""
        ...

    def abort(self) -> None:
        """Remove what was written, so that nothing looks complete."""
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


def convert(source: Source, target: Target, override: DType | None, progress: Progress) -> list[str]:
    """Write every tensor of `source` to `target`; all or nothing. Returns what to tell the user."""
    executor: Executor | None = None
    try:
        spec = source.spec
        total = target.prepare(spec, source.origin, wanted_dtype(source, override))
        progress.start(total)
        executor = Executor(progress)
        for ref in refs(spec):
            sources = source.read(ref)
            executor.planner.check_cover(ref, spec, sources)
            for replica in sources.replicas:
                executor.compare(replica, sources.pieces, str(ref))
            target.write(ref, sources, executor)
        executor.finish()
        source.close()
        return target.commit()
    except BaseException as error:
        if executor is not None:
            executor.cancel()
        target.abort()
        if isinstance(error, OSError):
            raise ConversionError(f"cannot write {error.filename or 'the output'}: {error.strerror}") from error
        raise
    finally:
        progress.stop()


def first_dtype(pieces: tuple[Piece, ...]) -> DType:
    """The dtype of a slot held as these pieces (their agreement is checked when they are planned)."""
    return pieces[0].data.dtype

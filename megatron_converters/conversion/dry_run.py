"""Dry run of a conversion: what it would write and need, without filling any file."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..basics.dtypes import DType
from ..basics.errors import ConversionError
from ..model.slots import refs
from .accounting import Accounts, check_beside
from .composing import Piece, Planner, StoredName
from .computing import Computation
from .copying import default_lanes
from .endpoint import Source, Target, wanted_dtype
from .gathering import CHUNK_BYTES
from .journal import Journal, describe_run, is_output_of, refuse_other
from .outline import Fill, Outline
from .staging import Staging, check_place, free_space
from .supplement import awaits_tokenizer

#: Bytes of memory for Python, numpy and the plan itself (measured by scripts/bench), and for a lane's buffers.
_BASE_BYTES = 48 << 20
_LANE_BYTES = 3 * CHUNK_BYTES
#: Further bytes of a lane that decodes or computes: elements as float32 and as numbers of their places.
_COMPUTED_BYTES = 12 * CHUNK_BYTES
#: Bytes of memory for torch, which is imported only to cast.
_TORCH_BYTES = 200 << 20
_AWAITS_TOKENIZER = "all weights are finished; the command writes the tokenizer beside them, and nothing else"


@dataclass
class FilePlan:
    """Plan of one output file: `nbytes` is its size, `tensor_bytes` that of its tensors; `padding_rows` repeat another row."""

    tensors: int
    nbytes: int
    tensor_bytes: int
    padding_rows: int = 0


@dataclass
class Forecast:
    """Result of `plan`. Sizes are in bytes.

    `seconds_least` and `seconds_most` are what the conversion is estimated to take, `rate_least` and `rate_most` the bytes per
    second with which samples were flushed to the disk; all are None if not measured.
    """

    files: dict[str, FilePlan]
    nbytes: int
    free: int
    memory: int
    source_tensors: int
    target_tensors: int
    casts: dict[str, int]
    padding_rows: int
    #: Bytes of tensors, without padding, that are written again because several ranks hold them.
    copies: int
    ignored: list[str]
    notes: list[str]
    #: Files finished by an interrupted run of the same conversion, and bytes left to write.
    finished: list[str]
    left: int
    #: Whether the same conversion is already complete.
    complete: bool = False
    #: Reason why the conversion would fail: something at the final place, or another run.
    obstacle: str | None = None
    rate_least: float | None = None
    rate_most: float | None = None
    seconds_least: float | None = None
    seconds_most: float | None = None
    dtypes: dict[str, int] = field(default_factory=dict)
    #: Number of tensors, or parts of them, that are not only copied or cast, by what is computed.
    computed: dict[str, int] = field(default_factory=dict)
    #: Path of the file of each tensor that is taken from another folder than the source (`--backfill-from`), by its name there.
    backfilled: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All fields as plain values."""
        return dataclasses.asdict(self)


def forecast(source: Source, target: Target, dtype: DType | None, workers: int = 1) -> Forecast:
    """Plan the whole conversion and check that each tensor is covered once; writes nothing."""
    outline = target.prepare(source.spec, source.origin, wanted_dtype(source, dtype))
    check_beside(source.origin, outline)
    files = {file: FilePlan(0, layout.nbytes, outline.tensor_bytes(file)) for file, layout in outline.files.items()}
    read: set[StoredName] = set()
    casts: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    computed: Counter[str] = Counter()
    planner, accounts, copies = Planner(), Accounts(source.spec, outline), 0
    for ref in refs(source.spec):
        sources = source.read(ref)
        planner.check_cover(ref, source.spec, sources)
        for piece in filter(lambda piece: piece.has_tensor, (*sources.pieces, *sources.replicas)):
            read.update((piece.name,) if piece.is_stored else piece.names)
        is_stored = all(piece.is_stored for piece in sources.pieces)
        fills = list(target.fills(ref))
        accounts.add(ref, fills)
        fills = [fill for fill in fills if fill.constant is None]
        if not fills:
            continue
        copies += sum(map(_unpadded_bytes, fills)) - math.prod(ref.shape(source.spec)) * fills[0].dtype.itemsize
        for fill in fills:
            files[fill.file].padding_rows += fill.padding
            dtypes[str(fill.dtype)] += 1
            if fill.value is not None or not is_stored:
                computed.update(_computed(fill, sources.pieces))
            if sources.dtype != fill.dtype and any(_casts(fill, sources.pieces)):
                casts[f"{sources.dtype} to {fill.dtype}"] += 1
    accounts.close()
    for file, layout in outline.files.items():
        files[file].tensors = len(layout.regions)
    state = _output_state(source, target, outline)
    return Forecast(
        files=files,
        nbytes=outline.nbytes,
        free=free_space(target.save_dir),
        memory=workers
        * (
            _BASE_BYTES
            + default_lanes() * (_LANE_BYTES + (_COMPUTED_BYTES if computed else 0))
            + (_TORCH_BYTES if casts else 0)
        ),
        source_tensors=len(read) + (0 if source.origin.carried is None else len(source.origin.carried.tensors)),
        target_tensors=sum(plan.tensors for plan in files.values()),
        casts=dict(casts),
        padding_rows=sum(plan.padding_rows for plan in files.values()),
        copies=copies,
        ignored=source.origin.ignored,
        notes=[*source.origin.notes, *outline.notes, *state.notes],
        finished=state.finished,
        left=0 if state.complete else sum(plan.nbytes for file, plan in files.items() if file not in state.finished),
        complete=state.complete,
        obstacle=state.obstacle,
        dtypes=dict(dtypes),
        computed=dict(computed),
        backfilled=source.origin.backfilled,
    )


def _computed(fill: Fill, pieces: Sequence[Piece]) -> set[str]:
    """What is computed for a fill that pieces of a ref go to, in words."""
    steps = (Computation.of(piece, fill.dtype, fill.value).described() for piece in pieces)
    return {", ".join(found) for found in steps if found}


def _casts(fill: Fill, pieces: Sequence[Piece]) -> Iterator[bool]:
    """Whether each piece of a ref is cast for a fill."""
    return (Computation.of(piece, fill.dtype, fill.value).is_cast for piece in pieces)


def _unpadded_bytes(fill: Fill) -> int:
    """Size of a fill without its padding, in bytes."""
    rows, *cols = fill.shape
    return (rows - fill.padding) * math.prod(cols) * fill.dtype.itemsize


@dataclass(frozen=True)
class _OutputState:
    """State of the place where the conversion would write, left by earlier runs or by others."""

    finished: list[str] = field(default_factory=list)
    complete: bool = False
    obstacle: str | None = None
    notes: tuple[str, ...] = ()


def _output_state(source: Source, target: Target, outline: Outline) -> _OutputState:
    run = describe_run(outline, source.origin)
    if awaits_tokenizer(target, run, source.origin):
        return _OutputState(list(outline.files), notes=(_AWAITS_TOKENIZER,))
    if target.shown() is not None and is_output_of(target.manifest, run):
        return _OutputState(complete=True)
    staging = Staging(target.save_dir, outline.name)
    journal = Journal(staging.state)
    old, finished = journal.run(), journal.finished_in(staging.files)
    try:
        check_place(target.save_dir)
        if old is not None and finished:
            refuse_other(staging, old, run, len(finished))
        if not journal.complete:
            target.refuse_existing()
    except ConversionError as error:
        return _OutputState(obstacle=str(error))
    return _OutputState(list(finished), obstacle=staging.in_use())

"""Comparison of two models tensor by tensor, whatever their formats: what `verify` and `diff` report.

Both sides are read as whole slots, a megabyte at a time from mapped files, in a few threads. Bits are compared as unsigned
integers; values are computed only for chunks that differ, or where norms are requested. Rows of vocabulary padding belong to no
slot, so they are never read.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..assets.origin import Origin
from ..basics.casting import values
from ..basics.dtypes import BY_NAME, DType
from ..basics.errors import ConversionError, UsageError
from ..basics.json_values import differences
from ..conversion.composing import Mask, Piece, Planner, Sources
from ..conversion.copying import default_lanes
from ..conversion.endpoint import Source
from ..conversion.gathering import gather_chunks
from ..conversion.progress import Progress
from ..families.config_json import wrapper_in
from ..model.layouts import RowMap, interned
from ..model.slots import SLOTS, Ref, Scope, refs
from ..model.spec import ModelSpec
from ..model.values import Affine, inverse
from ..storage.tensor import StoredTensor, release_mappings
from .measure import Measure, Place, Tally

#: Names of the two sides.
NAMES = ("A", "B")
_SCOPES, _SLOTS = list(Scope), list(SLOTS)


@dataclass(frozen=True)
class Rules:
    """Rules for what counts as different: other bits, or values more than `tolerance` apart if that is above 0.

    Tensors of two dtypes are compared as float32 (float64 if either is); two dtypes are themselves a difference unless
    `ignore_dtype`. With `as_cast` they are compared as a cast from A to B makes them: A is rounded to B's dtype, as a conversion
    does, and must then have B's bits. `norms` computes the norms of all tensors, which takes longer.
    """

    tolerance: float = 0.0
    ignore_dtype: bool = False
    norms: bool = False
    as_cast: bool = False

    def __post_init__(self) -> None:
        """Refuse rules that exclude each other."""
        if self.as_cast and (self.tolerance or self.ignore_dtype):
            raise UsageError(
                "--as-cast compares bits, once A is rounded to B's dtypes; leave out --tolerance and --ignore-dtype, or --as-cast"
            )


@dataclass(frozen=True)
class Finding:
    """One difference found in a tensor; `measure` is set if elements differ."""

    kind: str
    text: str
    measure: Measure | None = None

    def lines(self) -> Iterator[str]:
        """Lines of text: the finding, then where each side stores the first element that differs."""
        yield self.text
        if self.measure is not None:
            yield from (f"  {place}" for place in self.measure.places)


@dataclass(frozen=True)
class Compared:
    """Tensor of either model and its differences. `measure` is None where only one side has it or the shapes differ.

    `cast` names the dtypes of both sides where they differ, such as "float32 to bfloat16".
    """

    ref: Ref
    findings: tuple[Finding, ...]
    measure: Measure | None = None
    cast: str | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "tensor": str(self.ref),
            "findings": [
                {"kind": found.kind, "text": found.text, **({} if found.measure is None else found.measure.to_json())}
                for found in self.findings
            ],
        }


@dataclass(frozen=True)
class Comparison:
    """Result in the order of slots. `padding` counts each side's rows of vocabulary padding, which are not compared.

    `beside` are lines on differences of what models of images and text have beside their text parts.
    """

    spec: list[str]
    tensors: list[Compared]
    padding: tuple[int, int]
    nbytes: int
    beside: tuple[str, ...] = ()

    @property
    def different(self) -> list[Compared]:
        """Tensors with findings."""
        return [tensor for tensor in self.tensors if tensor.findings]

    def alike(self) -> dict[str, list[str]]:
        """Findings about whole tensors, such as another dtype: text to names of the tensors that share it."""
        found: dict[str, list[str]] = {}
        for tensor in self.different:
            for finding in tensor.findings:
                if finding.measure is None:
                    found.setdefault(finding.text, []).append(str(tensor.ref))
        return found

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.spec and not self.different and not self.beside

    @property
    def casts(self) -> dict[str, int]:
        """Number of tensors of two dtypes, by these."""
        return dict(Counter(tensor.cast for tensor in self.tensors if tensor.cast is not None))

    @property
    def only_casts(self) -> bool:
        """Whether a cast may explain all differences: they are in elements of tensors that have one shape and two dtypes."""
        kinds = {found.kind for tensor in self.different for found in tensor.findings}
        cast = all(tensor.cast is not None and tensor.measure is not None for tensor in self.different)
        return not self.spec and not self.beside and bool(kinds) and cast and kinds <= {"dtype", "values"}


def compare(one: Source, other: Source, rules: Rules, progress: Progress) -> Comparison:
    """Compare every tensor that both models have, and each model's own copies; list the tensors that only one has."""
    try:
        return _Comparer((one, other), rules, progress).run()
    finally:
        release_mappings()


def spec_differences(one: Source, other: Source) -> list[str]:
    """Fields in which the models differ, except the dtype, which is compared tensor by tensor.

    The family, and biases that its files lack, are compared only where both sides record them; Megatron-LM's arguments do not.
    """
    left, right = one.spec, other.spec
    if one.origin.hf_config is None or other.origin.hf_config is None:
        right = dataclasses.replace(right, family=left.family, absent_biases=left.absent_biases)
    return model_differences(left, right)


def model_differences(one: ModelSpec, other: ModelSpec, sides: tuple[str, str] = ("A", "B")) -> list[str]:
    """Fields in which two specs differ, except the dtype, as `name: A has this, B has that`."""
    same_dtype = dataclasses.replace(other, dtype=one.dtype)
    return differences(one.to_dict(), same_dtype.to_dict(), "", lambda name, *values: _differing(name, sides, values))


def difference_text(name: str, one: Any, other: Any) -> str:
    """Text of a setting that differs."""
    return _differing(name, ("A", "B"), (one, other))


def _differing(name: str, sides: tuple[str, str], values: tuple[Any, ...]) -> str:
    has = (f"{side} has {value}" for side, value in zip(sides, values, strict=True))
    return f"{name}: {', '.join(has)}"


def ordered(found: Iterable[Ref]) -> list[Ref]:
    """Refs of two models in the order that `refs` has for one."""

    def place(ref: Ref) -> tuple[int, ...]:
        return _SCOPES.index(ref.slot.scope), ref.layer or 0, _SLOTS.index(ref.slot.name), ref.expert or 0

    return sorted(found, key=place)


@dataclass
class _Comparer:
    sides: tuple[Source, Source]
    rules: Rules
    progress: Progress
    _planner: Planner = field(default_factory=Planner)
    _planner_lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> Comparison:
        known = [set(refs(side.spec)) for side in self.sides]
        sizes = [_read_sizes(side, own, known[0] & known[1]) for side, own in zip(self.sides, known, strict=True)]
        nbytes = sizes[0][0] + sizes[1][0]
        self.progress.start(nbytes)
        pool = ThreadPoolExecutor(default_lanes())
        try:
            tensors = list(pool.map(lambda ref: self._compare(ref, known), ordered(known[0] | known[1])))
        finally:
            self._stop.set()  # matters only after an interrupt or a failure
            pool.shutdown(cancel_futures=True)
            self.progress.stop()
        beside, more = _compare_beside(*(side.origin for side in self.sides))
        return Comparison(spec_differences(*self.sides), tensors, (sizes[0][1], sizes[1][1]), nbytes + more, beside)

    def _compare(self, ref: Ref, known: Sequence[Collection[Ref]]) -> Compared:
        read = {name: side.read(ref) for name, side, own in zip(NAMES, self.sides, known, strict=True) if ref in own}
        faults = {name: self._fault(ref, name, sources) for name, sources in read.items()}
        findings = [fault for fault in faults.values() if fault is not None]
        measure = cast = None
        if len(read) == 1:
            findings.append(Finding("only one", f"only {next(iter(read))} has it"))
        elif not findings:
            findings, measure = self._compare_sides(ref, *(read[name] for name in NAMES))
            one, other = (read[name].dtype for name in NAMES)
            cast = None if one == other else f"{one} to {other}"
        for name, sources in read.items():
            for replica in sources.replicas if faults[name] is None else ():
                labels = (name, f"{name}, copy")
                found, _ = self._compare_pieces("copy", labels, replica.rows, replica.col, sources.pieces, (replica,))
                findings += found
        return Compared(ref, tuple(findings), measure, cast)

    def _fault(self, ref: Ref, name: str, sources: Sources) -> Finding | None:
        """Reason why the pieces of one side do not make up a tensor; None if they do."""
        by_dtype = {piece.data.dtype: piece.name for piece in reversed(sources.pieces)}
        if len(by_dtype) > 1:
            listed = "; ".join(f"{name} is {dtype}" for dtype, name in sorted(by_dtype.items(), key=str))
            return Finding("dtype", f"the parts of {name} are of {len(by_dtype)} dtypes: {listed}")
        side = self.sides[NAMES.index(name)]
        try:
            with self._planner_lock:
                self._planner.check_cover(ref, side.spec, sources)
        except ConversionError as error:
            return Finding("parts", f"{name}: {error}")
        return None

    def _compare_sides(self, ref: Ref, one: Sources, other: Sources) -> tuple[list[Finding], Measure | None]:
        shapes = [ref.shape(side.spec) for side in self.sides]
        findings, rows = [], min(shape[0] for shape in shapes)
        if shapes[0] != shapes[1]:
            findings.append(Finding("shape", f"A has shape {list(shapes[0])}, B {list(shapes[1])}"))
            if not ref.slot.vocab or shapes[0][1:] != shapes[1][1:]:  # the tokens of both still have the same rows
                return findings, None
        wanted = interned(np.arange(rows, dtype=np.int64))
        found, measure = self._compare_pieces("values", NAMES, wanted, 0, one.pieces, other.pieces)
        return findings + found, measure

    def _compare_pieces(
        self,
        kind: str,
        labels: tuple[str, str],
        rows: RowMap,
        col: int,
        left: Sequence[Piece],
        right: Sequence[Piece],
    ) -> tuple[list[Finding], Measure | None]:
        """Compare two sets of pieces over `rows` of the slot, from column `col` to the end of the last piece.

        Elements that are stored after a computation are compared as the right side stores them, since that is what a conversion
        to there writes; or as the left side does, where fewer differ. The measure is None where the left side cannot be cast.
        """
        cols = max(piece.col + piece.cols for piece in right) - col
        dtypes = left[0].data.dtype, right[0].data.dtype
        # For a copy, count only its own bytes: the pieces it is compared with are counted in the comparison of both sides.
        itemsize = sum(dtype.itemsize for dtype in (dtypes if kind == "values" else dtypes[1:]))
        as_cast = self.rules.as_cast and kind == "values" and dtypes[0] != dtypes[1]
        pair = _Pair((left, right), rows, col, cols, dtypes[1] if as_cast else _common_dtype(*dtypes), kind)
        as_right, as_left = _stored_as(right, rows), _stored_as(left, rows)
        try:
            tally = self._tally(pair, as_right, lambda count: self.progress(count * itemsize))
        except ConversionError as error:
            if not as_cast:
                raise
            return [Finding("range", f"{labels[0]} cannot be cast to {dtypes[1]}: {error}")], None
        if tally.differing and as_left.value != as_right.value:
            with suppress(ConversionError):  # values that a conversion to the left would refuse
                other = self._tally(pair, as_left, lambda _: None)
                tally = min(tally, other, key=lambda tally: tally.differing)
        first = tally.first
        sides = zip(labels, (left, right), strict=True)
        measure = tally.measure(() if first is None else (_place(label, pieces, *first) for label, pieces in sides))
        findings = []
        if dtypes[0] != dtypes[1] and not (as_cast or self.rules.ignore_dtype):
            findings.append(Finding("dtype", f"{labels[0]} is {dtypes[0]}, {labels[1]} is {dtypes[1]}"))
        if measure.differing and as_cast and self._is_cast_of_right(pair._replace(dtype=dtypes[0]), as_left):
            findings.append(
                Finding("reversed", f"A is B rounded to {dtypes[0]}, and B is not A as {dtypes[1]}; give B first")
            )
        elif measure.differing:
            findings.append(Finding(kind, _finding_text(kind, labels[0], right[0], measure), measure))
        return findings, measure

    def _is_cast_of_right(self, pair: _Pair, as_left: _StoredAs) -> bool:
        """Whether the right side, rounded to the left one's dtype, which `pair` has, is the left side."""
        if pair.dtype.itemsize > pair.sides[1][0].data.dtype.itemsize:
            return False  # a wider left side that the right one makes up would have been equal the other way round, too
        with suppress(ConversionError):  # values beyond the range of the left side
            return not self._tally(pair, as_left, lambda _: None).differing
        return False

    def _tally(self, pair: _Pair, stored: _StoredAs, progress: Callable[[int], None]) -> Tally:
        """Count the differences between both sides in values as `stored`; `progress` is told the elements compared of each."""
        # Casts make NaN of several kinds: torch's own does, on different processors and in different places of one tensor.
        cast = self.rules.as_cast and any(side[0].data.dtype != pair.dtype for side in pair.sides)
        tally = Tally(self.rules.tolerance, self.rules.norms, any_nan=cast)
        shape = pair.rows.size, pair.cols
        with self._planner_lock:
            gathers = [self._planner.compose(pair.rows, pair.col, pair.cols, side, *stored) for side in pair.sides]
        streams = [gather_chunks(found, shape, pair.dtype, pair.what, pair.rows) for found in gathers]
        for (start, one), (_, other) in zip(*streams, strict=True):
            if self._stop.is_set():
                break
            progress(tally.add(pair.rows[start : start + one.shape[0]], pair.col, one, other, pair.dtype))
        return tally


def _compare_beside(one: Origin, other: Origin) -> tuple[tuple[str, ...], int]:
    """Differences of what models of images and text have beside their text parts, and bytes that are read for them."""
    if all(wrapper_in(origin.hf_config) is None for origin in (one, other)):
        return (), 0
    from .carried import carried_bytes, carried_differences

    return tuple(carried_differences(one, other)), carried_bytes(one, other)


class _Pair(NamedTuple):
    """Pieces of two sides, of which `rows` of a slot and `cols` of its columns from `col` on are to be compared in `dtype`."""

    sides: tuple[Sequence[Piece], Sequence[Piece]]
    rows: RowMap
    col: int
    cols: int
    dtype: DType
    what: str


class _StoredAs(NamedTuple):
    """Function from a slot's elements to what pieces store, of all rows or of those where `only` is true; None for none."""

    value: Affine | None
    only: Mask | None = None


def _stored_as(pieces: Sequence[Piece], rows: RowMap) -> _StoredAs:
    """Function from elements to what the pieces store; none where pieces differ in more than whether they are computed."""
    values = {piece.value for piece in pieces}
    computed = [value for value in values if value is not None]
    if len(computed) != 1:
        return _StoredAs(None)
    if len(values) == 1:
        return _StoredAs(inverse(computed[0]))
    held = np.concatenate([piece.rows for piece in pieces if piece.value is not None])
    return _StoredAs(inverse(computed[0]), np.isin(rows, held[held >= 0]))


def _finding_text(kind: str, name: str, copy: Piece, measure: Measure) -> str:
    return str(measure) if kind == "values" else f"{name} has a copy in {copy.name} that differs: {measure}"


def _read_sizes(side: Source, own: Iterable[Ref], common: Collection[Ref]) -> tuple[int, int]:
    """Bytes that will be read from one side, and rows of padding, which will not."""
    nbytes = padding = 0
    for ref in own:
        sources = side.read(ref)
        for piece in (*(sources.pieces if ref in common else ()), *sources.replicas):
            nbytes += int(np.count_nonzero(piece.rows >= 0)) * piece.cols * piece.data.dtype.itemsize
        padding += sum(int(np.count_nonzero(piece.rows < 0)) for piece in sources.pieces)
    return nbytes, padding


def _common_dtype(one: DType, other: DType) -> DType:
    """Dtype in which both are compared."""
    if one == other:
        return one
    return BY_NAME["float64" if "float64" in (one.name, other.name) else "float32"]


def _place(side: str, pieces: Sequence[Piece], row: int, col: int) -> Place:
    """Place where an element of a slot is stored; one of the pieces must hold it."""
    piece = next(p for p in pieces if p.col <= col < p.col + p.cols and bool((p.rows == row).any()))
    data, at = piece.data, (int(np.flatnonzero(piece.rows == row)[0]), col - piece.col)
    byte = None
    if isinstance(data, StoredTensor):
        byte = data.offset + data.dtype.itemsize * sum(n * step for n, step in zip(at, data.strides, strict=False))
    stored = piece.elements(slice(at[0], at[0] + 1), slice(at[1], at[1] + 1))
    return Place(side, str(piece.name), *at, byte, float(values(stored, data.dtype)[0, 0]))

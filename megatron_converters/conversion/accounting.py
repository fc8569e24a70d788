"""Target coverage check, run before a byte is written: every element of every slot and every byte of every stored tensor.

`Planner.check_cover` checks the source side. Together they show that each element lands exactly where a rank expects it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ..assets.origin import Origin
from ..basics.errors import raise_all
from ..families.config_json import wrapper_in
from ..model.slots import Ref, refs
from ..model.spec import ModelSpec
from .composing import as_matrix, coverage
from .outline import Fill, Outline

#: Maximum number of fills named in a message.
_SHOWN_FILLS = 4
_TARGET_FAULT = "the output would not hold the model; this is a fault of this program, please report it:"


def check_target(spec: ModelSpec, outline: Outline, fills: Callable[[Ref], Iterable[Fill]]) -> None:
    """Check that the fills write the whole model into the outline's files; raises `ConversionError` with file and tensor."""
    accounts = Accounts(spec, outline)
    for ref in refs(spec):
        accounts.add(ref, list(fills(ref)))
    accounts.close()


def check_beside(origin: Origin, outline: Outline) -> None:
    """Check that an output has all that a source has beside a text part; raises `ConversionError`."""
    if origin.carried is None and wrapper_in(origin.hf_config) is None:
        return
    from ..assets.side_file import check_carried

    check_carried(origin, itertools.chain.from_iterable(each.items() for each in outline.extra_tensors.values()))


class Accounts:
    """Running account of a model's fills: `add` those of each ref, then `close`."""

    def __init__(self, spec: ModelSpec, outline: Outline) -> None:
        self._outline = outline
        self._coverage = Coverage(spec)
        self._problems: list[str] = []
        #: Filled byte ranges (start, stop) by file and tensor.
        self._filled: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for file, tensors in outline.extra_tensors.items():
            self._filled.update({(file, name): [(0, data.nbytes)] for name, data in tensors.items()})

    def add(self, ref: Ref, fills: Sequence[Fill]) -> None:
        """Count all fills of one ref."""
        self._problems += self._coverage.faults(ref, fills)
        for fill in fills:
            if fill.constant is not None:
                continue
            stop = fill.start + math.prod(fill.shape) * fill.dtype.itemsize
            self._filled.setdefault((fill.file, fill.name), []).append((fill.start, stop))

    def close(self) -> None:
        """Raise all problems, including stored tensors whose bytes are not filled exactly once."""
        for file, layout in self._outline.files.items():
            for name, (_, nbytes) in layout.regions.items():
                spans = self._filled.pop((file, name), [])
                if spans != [(0, nbytes)]:
                    self._problems += (f"{file}: {name}: {fault}" for fault in gaps_and_overlaps(spans, nbytes))
        self._problems += (
            f"{file}: {name} would be filled, but the file has no such tensor" for file, name in self._filled
        )
        raise_all(_TARGET_FAULT, self._problems)


class Coverage:
    """Check that fills hold every element of a slot, all equally often. Results are cached, since layers repeat."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        #: Row maps of correct fills, by their ids; holding the maps keeps the ids valid.
        self._correct: dict[Any, Any] = {}

    def faults(self, ref: Ref, fills: Sequence[Fill]) -> Iterator[str]:
        """Problems of all fills of one ref; several ranks may hold copies of it."""
        shape = ref.matrix(self._spec)
        key = shape, *((id(fill.rows), fill.col, fill.shape, fill.padding) for fill in fills)
        if key in self._correct:
            return
        found = [f"{fill.file}: {fill.name}: {ref}: {fault}" for fill in fills for fault in _out_of_slot(fill, shape)]
        if not found:
            found = [f"{ref}: {fault}" for fault in _uneven_counts(fills, shape)]
        yield from found
        if not found:
            self._correct[key] = [fill.rows for fill in fills]


def _out_of_slot(fill: Fill, shape: tuple[int, int]) -> Iterator[str]:
    """Problems with rows or columns of a fill that are neither the slot's nor padding; `shape` is the slot's."""
    rows, cols = shape
    count, width = as_matrix(fill.shape)
    if fill.rows.size != count:
        yield f"its row map has {fill.rows.size} rows, but its shape has {count}"
    inner, padding = np.split(fill.rows, [fill.rows.size - fill.padding])
    invalid = np.flatnonzero((inner < 0) | (inner >= rows))
    if invalid.size:
        yield (
            f"its row {invalid[0]} would be row {inner[invalid[0]]} of the slot's {rows} "
            f"({invalid.size} of {count} rows are affected)"
        )
    if (padding != rows - 1).any():
        yield f"its {fill.padding} rows of padding do not all repeat the slot's last row, {rows - 1}"
    if fill.col < 0 or fill.col + width > cols:
        yield f"it would hold columns {fill.col} to {fill.col + width - 1} of the slot's {cols}"


def _uneven_counts(fills: Sequence[Fill], shape: tuple[int, int]) -> Iterator[str]:
    """The first element that is not written, or not as often as others; padding does not count."""
    parts = [(fill.rows[: fill.rows.size - fill.padding], fill.col, as_matrix(fill.shape)[1]) for fill in fills]
    ranges = list(coverage(shape, parts))
    most = max(int(counts.max(initial=0)) for _, _, counts in ranges)
    for left, right, counts in ranges:
        wrong = np.flatnonzero((counts != most) | (counts == 0))
        if wrong.size:
            yield (
                f"row {wrong[0]}, columns {left} to {right - 1}, would be written {counts[wrong[0]]} times, others "
                f"{most} times ({wrong.size} of {shape[0]} rows are affected) by {_fill_names(fills)}"
            )
            return


def _fill_names(fills: Sequence[Fill]) -> str:
    shown = [f"{fill.file}: {fill.name}" for fill in fills[:_SHOWN_FILLS]]
    return ", ".join(shown) + (", …" if len(fills) > _SHOWN_FILLS else "") if shown else "nothing"


def gaps_and_overlaps(spans: Sequence[tuple[int, int]], nbytes: int) -> Iterator[str]:
    """Problems with byte ranges of a tensor of `nbytes` that are filled twice, or not at all."""
    for (_, end), (start, _) in pairwise([(0, 0), *sorted(spans), (nbytes, nbytes)]):
        if start > end:
            yield f"bytes {end} to {start - 1} of {nbytes} would not be filled"
        elif start < end:
            yield f"bytes {start} to {end - 1} of {nbytes} would be filled twice, or lie beyond the tensor"

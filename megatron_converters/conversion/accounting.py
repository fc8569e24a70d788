"""Counting what a target will write, before a byte is written: every element of a slot, and every byte of a file's tensors.

The source side is counted by `Planner.check_cover`; both together say that each element lands exactly where a rank expects it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ..basics.errors import raise_all
from ..model.slots import Ref, refs
from ..model.spec import ModelSpec
from .composing import as_matrix, coverage
from .outline import Fill, Outline

_SHOWN_FILLS = 4
_FAULTY = "the output would not be the model; this is a fault of this program, please report it:"


def check_target(spec: ModelSpec, outline: Outline, fills: Callable[[Ref], Iterable[Fill]]) -> None:
    """Raise `ConversionError`, which names file and tensor, unless these fills write the whole model into the outline's files."""
    accounts = Accounts(spec, outline)
    for ref in refs(spec):
        accounts.add(ref, list(fills(ref)))
    accounts.close()


class Accounts:
    """Fills of a whole model, counted as they come: `add` those of each tensor, then `close`."""

    def __init__(self, spec: ModelSpec, outline: Outline) -> None:
        self._outline = outline
        self._coverage = Coverage(spec)
        self._problems: list[str] = []
        #: By file and tensor, the stretches that are filled: first byte and end.
        self._filled: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for file, tensors in outline.given.items():
            self._filled.update({(file, name): [(0, data.nbytes)] for name, data in tensors.items()})

    def add(self, ref: Ref, fills: Sequence[Fill]) -> None:
        """Count all fills of one tensor of the model."""
        self._problems += self._coverage.faults(ref, fills)
        for fill in fills:
            stop = fill.start + math.prod(fill.shape) * fill.dtype.itemsize
            self._filled.setdefault((fill.file, fill.name), []).append((fill.start, stop))

    def close(self) -> None:
        """Raise what was found wrong, and which tensors of files are not filled, each byte once."""
        for file, layout in self._outline.files.items():
            for name, (_, nbytes) in layout.regions.items():
                spans = self._filled.pop((file, name), [])
                if spans != [(0, nbytes)]:
                    self._problems += (f"{file}: {name}: {fault}" for fault in _untiled(spans, nbytes))
        self._problems += (f"{file}: {name} would be filled, but has no place there" for file, name in self._filled)
        raise_all(_FAULTY, self._problems)


class Coverage:
    """Whether fills hold all elements of slots, each as often as any other. Layers repeat, so what is right is kept."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        #: By the identity of row maps, which are held so that their identity stays.
        self._right: dict[Any, Any] = {}

    def faults(self, ref: Ref, fills: Sequence[Fill]) -> Iterator[str]:
        """What is wrong with all fills of one tensor, of which several ranks may hold copies."""
        shape = ref.slot.matrix(self._spec)
        key = shape, *((id(fill.rows), fill.col, fill.shape, fill.padding) for fill in fills)
        if key in self._right:
            return
        found = [f"{fill.file}: {fill.name}: {ref}: {fault}" for fill in fills for fault in _misfit(fill, shape)]
        if not found:
            found = [f"{ref}: {fault}" for fault in _uneven(fills, shape)]
        yield from found
        if not found:
            self._right[key] = [fill.rows for fill in fills]


def _misfit(fill: Fill, shape: tuple[int, int]) -> Iterator[str]:
    """Rows or columns of a fill that the slot does not have and that are no padding."""
    rows, cols = shape
    count, width = as_matrix(fill.shape)
    if fill.rows.size != count:
        yield f"{fill.rows.size} rows are to fill {count}"
    own, padding = np.split(fill.rows, [fill.rows.size - fill.padding])
    strange = np.flatnonzero((own < 0) | (own >= rows))
    if strange.size:
        yield f"its row {strange[0]} would be row {own[strange[0]]} of {rows} ({strange.size} of {count} rows are affected)"
    if (padding != rows - 1).any():
        yield f"{fill.padding} rows of padding do not repeat row {rows - 1}, the last"
    if fill.col < 0 or fill.col + width > cols:
        yield f"it would hold columns {fill.col} to {fill.col + width - 1} of {cols}"


def _uneven(fills: Sequence[Fill], shape: tuple[int, int]) -> Iterator[str]:
    """Elements that are not written, or not as often as others; padding apart."""
    parts = [(fill.rows[: fill.rows.size - fill.padding], fill.col, as_matrix(fill.shape)[1]) for fill in fills]
    ranges = list(coverage(shape, parts))
    often = max(int(counts.max(initial=0)) for _, _, counts in ranges)
    for left, right, counts in ranges:
        wrong = np.flatnonzero((counts != often) | (counts == 0))
        if wrong.size:
            yield (
                f"row {wrong[0]}, columns {left} to {right - 1}, would be written {counts[wrong[0]]} times, others "
                f"{often} times ({wrong.size} of {shape[0]} rows are affected) by {_listed(fills)}"
            )
            return


def _listed(fills: Sequence[Fill]) -> str:
    shown = [f"{fill.file}: {fill.name}" for fill in fills[:_SHOWN_FILLS]]
    return ", ".join(shown) + (", …" if len(fills) > _SHOWN_FILLS else "") if shown else "nothing"


def _untiled(spans: Sequence[tuple[int, int]], nbytes: int) -> Iterator[str]:
    """Stretches of a tensor of `nbytes` that are filled twice, or not at all."""
    for (_, end), (start, _) in pairwise([(0, 0), *sorted(spans), (nbytes, nbytes)]):
        if start > end:
            yield f"bytes {end} to {start - 1} of {nbytes} would not be filled"
        elif start < end:
            yield f"bytes {start} to {end - 1} of {nbytes} would be filled twice, or lie beyond it"

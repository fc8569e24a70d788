"""Layouts of slots as parts: each is one list of paired views, equal in shape, of a slot and of its parts.

`for a, b in layout.pairs(slot, parts, spec)`: `a[...] = b` packs, `b[...] = a` unpacks. Everything else, such as the slot
row of each part's row (`row_maps`), is derived by running the pairs on row numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ..basics.errors import ConversionError
from .slots import Slot
from .spec import ModelSpec

Array = npt.NDArray[Any]
RowMap = npt.NDArray[np.int64]
Pairs = Iterator[tuple[Array, Array]]


@dataclass(frozen=True)
class Layout:
    """Layout of a slot: `part_rows(spec, slot_rows)` gives the rows of each part, `pairs(slot, parts, spec)` the views."""

    name: str
    part_rows: Callable[[ModelSpec, int], tuple[int, ...]]
    pairs: Callable[[Array, Sequence[Array], ModelSpec], Pairs]


def _same(slot: Array, parts: Sequence[Array], _: ModelSpec) -> Pairs:
    yield slot, parts[0]


def _gated(slot: Array, parts: Sequence[Array], _: ModelSpec) -> Pairs:
    gate, up = parts
    half = slot.shape[0] // 2
    yield slot[:half], gate
    yield slot[half:], up


def _grouped_qkv(slot: Array, parts: Sequence[Array], spec: ModelSpec) -> Pairs:
    """Per query group: its query heads, then its key head, then its value head."""
    query, key, value = parts
    groups, dim, rest = spec.num_query_groups, spec.kv_channels, slot.shape[1:]
    heads = spec.num_attention_heads // groups
    packed = slot.reshape(groups, heads + 2, dim, *rest)
    yield packed[:, :heads], query.reshape(groups, heads, dim, *rest)
    yield packed[:, heads], key.reshape(groups, dim, *rest)
    yield packed[:, heads + 1], value.reshape(groups, dim, *rest)


def _grouped_interleaved_qkv(slot: Array, parts: Sequence[Array], spec: ModelSpec) -> Pairs:
    """As `_grouped_qkv`, with query and key heads whose rotary pairs are neighbours in the parts, half a head apart in the slot."""
    query, key, value = parts
    groups, dim, rest = spec.num_query_groups, spec.kv_channels, slot.shape[1:]
    heads = spec.num_attention_heads // groups
    packed = slot.reshape(groups, heads + 2, 2, dim // 2, *rest)
    yield packed[:, :heads], query.reshape(groups, heads, dim // 2, 2, *rest).swapaxes(2, 3)
    yield packed[:, heads], key.reshape(groups, dim // 2, 2, *rest).swapaxes(1, 2)
    yield packed[:, heads + 1], value.reshape(groups, 2, dim // 2, *rest)


def _qkv_rows(spec: ModelSpec, _: int) -> tuple[int, ...]:
    key = spec.num_query_groups * spec.kv_channels
    return spec.num_attention_heads * spec.kv_channels, key, key


SAME = Layout("same", lambda _, rows: (rows,), _same)
GATED = Layout("gated", lambda _, rows: (rows // 2, rows // 2), _gated)
GROUPED_QKV = Layout("grouped qkv", _qkv_rows, _grouped_qkv)
GROUPED_INTERLEAVED_QKV = Layout("grouped qkv, interleaved rotary pairs", _qkv_rows, _grouped_interleaved_qkv)


def runs(rows: RowMap) -> Iterator[tuple[int, int, int]]:
    """Runs of consecutive rows as (position, first row, length); positions that hold -1 are in none."""
    # -1 before row 0 looks consecutive, but is not.
    breaks = np.flatnonzero((np.diff(rows) != 1) | (rows[:-1] < 0)) + 1
    bounds = [0, *breaks.tolist(), rows.size]
    for start, stop in pairwise(bounds):
        if start < stop and rows[start] >= 0:
            yield start, int(rows[start]), stop - start


@lru_cache(maxsize=512)
def _shared_array(data: bytes) -> RowMap:
    return np.frombuffer(data, np.int64)


def interned(rows: RowMap) -> RowMap:
    """Read-only array shared by all equal row maps, so that plans that repeat from layer to layer are made once."""
    return _shared_array(rows.tobytes())


@lru_cache(maxsize=256)
def row_maps(layout: Layout, slot: Slot, spec: ModelSpec) -> tuple[RowMap, ...]:
    """Row maps of the parts: for each row of a part, the row of the slot. Cached, so that equal maps are one object."""
    rows = slot.rows(spec)
    parts = [np.full(count, -1, np.int64) for count in layout.part_rows(spec, rows)]
    for whole, part in layout.pairs(np.arange(rows, dtype=np.int64), parts, spec):
        part[...] = whole
    if not np.array_equal(np.sort(np.concatenate(parts)), np.arange(rows)):
        raise ConversionError(
            f"layout {layout.name!r} does not cover each of the {rows} rows of {slot.name} exactly once"
        )
    for part in parts:
        part.flags.writeable = False  # cached, so shared by all callers
    return tuple(parts)

"""Layouts of slots as parts: each is one list of paired views, equal in shape, of a slot and of its parts.

`for a, b in layout.pairs(slot, parts, kind)`: `a[...] = b` packs, `b[...] = a` unpacks. Everything else, such as the slot
row of each part's row (`row_maps`), is derived by running the pairs on row numbers. Layouts compose: `joined` and `rotary`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..basics.errors import ConversionError
from .layers import Attention, GatedDelta, Latent, Layer
from .slots import SLOTS, Slot
from .spec import ModelSpec

Array = npt.NDArray[Any]
RowMap = npt.NDArray[np.int64]
Pairs = Iterator[tuple[Array, Array]]


@dataclass(frozen=True)
class Kind:
    """Slot of one kind of layer, whose sizes decide a layout."""

    slot: Slot
    spec: ModelSpec
    layer: Layer

    @property
    def rows(self) -> int:
        """Rows of the slot."""
        return self.slot.size(self.spec, self.layer).rows

    @property
    def blocks(self) -> tuple[int, ...]:
        """Rows of each of the slot's blocks."""
        return tuple(block.rows for block in self.slot.size(self.spec, self.layer).blocks)

    @property
    def attention(self) -> Attention:
        """The layer's attention with query groups; raises `TypeError` where it has another mixer."""
        if not isinstance(self.layer.mixer, Attention):
            raise TypeError(f"{self.slot.name} has no query groups in {self.layer}")
        return self.layer.mixer

    @property
    def latent(self) -> Latent:
        """The layer's multi-latent attention; raises `TypeError` where it has another mixer."""
        if not isinstance(self.layer.mixer, Latent):
            raise TypeError(f"{self.slot.name} has no latents in {self.layer}")
        return self.layer.mixer

    @property
    def delta(self) -> GatedDelta:
        """The layer's gated DeltaNet; raises `TypeError` where it has another mixer."""
        if not isinstance(self.layer.mixer, GatedDelta):
            raise TypeError(f"{self.slot.name} has no gated DeltaNet in {self.layer}")
        return self.layer.mixer


@dataclass(frozen=True)
class Layout:
    """Layout of a slot: `part_rows(kind)` gives the rows of each part, `pairs(slot, parts, kind)` the views."""

    name: str
    part_rows: Callable[[Kind], tuple[int, ...]]
    pairs: Callable[[Array, Sequence[Array], Kind], Pairs]

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Pickle a layout that has a name of its own by that name: functions within it need not be importable."""
        name = next((name for name, known in NAMED.items() if known.layout is self), None)
        return (type(self), (self.name, self.part_rows, self.pairs)) if name is None else (_named, (name,))


def _split(whole: Array, sizes: Sequence[int]) -> list[Array]:
    """Views of consecutive rows of `whole`."""
    return [whole[start:stop] for start, stop in pairwise((0, *accumulate(sizes)))]


def _same(slot: Array, parts: Sequence[Array], _: Kind) -> Pairs:
    yield slot, parts[0]


def _after_two_rows(slot: Array, parts: Sequence[Array], _: Kind) -> Pairs:
    """The part begins with two rows that are none of the slot's."""
    yield slot, parts[0][2:]


def _two_more_rows(kind: Kind) -> tuple[int, ...]:
    return (kind.rows + 2,)


def _blocks(slot: Array, parts: Sequence[Array], kind: Kind) -> Pairs:
    yield from zip(_split(slot, kind.blocks), parts, strict=True)


def _alternating(slot: Array, parts: Sequence[Array], kind: Kind) -> Pairs:
    """Rows of the two blocks in turn: the first of gate, the first of up, the second of gate, …"""
    for number, block in enumerate(_split(slot, kind.blocks)):
        yield block, parts[0][number :: len(kind.blocks)]


def _grouped_qkv(slot: Array, parts: Sequence[Array], kind: Kind) -> Pairs:
    """Per query group: its query heads, then its key head, then its value head."""
    query, key, value = parts
    groups, dim, rest = kind.attention.num_query_groups, kind.attention.kv_channels, slot.shape[1:]
    heads = kind.attention.num_attention_heads // groups
    packed = slot.reshape(groups, heads + 2, dim, *rest)
    yield packed[:, :heads], query.reshape(groups, heads, dim, *rest)
    yield packed[:, heads], key.reshape(groups, dim, *rest)
    yield packed[:, heads + 1], value.reshape(groups, dim, *rest)


def _grouped_gated_qkv(slot: Array, parts: Sequence[Array], kind: Kind) -> Pairs:
    """Per query group: its query heads, their gates, its key head, its value head. Parts have each query head with its gate."""
    query, key, value = parts
    groups, dim, rest = kind.attention.num_query_groups, kind.attention.kv_channels, slot.shape[1:]
    heads = kind.attention.num_attention_heads // groups
    packed = slot.reshape(groups, 2 * heads + 2, dim, *rest)
    queries = query.reshape(groups, heads, 2, dim, *rest)
    yield packed[:, :heads], queries[:, :, 0]
    yield packed[:, heads : 2 * heads], queries[:, :, 1]
    yield packed[:, 2 * heads], key.reshape(groups, dim, *rest)
    yield packed[:, 2 * heads + 1], value.reshape(groups, dim, *rest)


def _delta_by_key_head(slot: Array, parts: Sequence[Array], kind: Kind) -> Pairs:
    """Parts have, for each key head, its query, key, values and gates z; and its betas and alphas (Qwen3-Next)."""
    qkvz, ba = parts
    delta, rest = kind.delta, slot.shape[1:]
    heads, dim = delta.linear_num_key_heads, delta.linear_key_head_dim
    ratio = delta.linear_num_value_heads // heads
    values = ratio * delta.linear_value_head_dim
    query, key, value, z, beta, alpha = (
        block.reshape(heads, block.shape[0] // heads, *rest) for block in _split(slot, kind.blocks)
    )
    packed, gates = qkvz.reshape(heads, 2 * dim + 2 * values, *rest), ba.reshape(heads, 2 * ratio, *rest)
    yield query, packed[:, :dim]
    yield key, packed[:, dim : 2 * dim]
    yield value, packed[:, 2 * dim : 2 * dim + values]
    yield z, packed[:, 2 * dim + values :]
    yield beta, gates[:, :ratio]
    yield alpha, gates[:, ratio:]


def _delta_by_use(slot: Array, parts: Sequence[Array], kind: Kind) -> Pairs:
    """Parts are queries, keys and values in one; gates z; betas; and alphas (Qwen3.5)."""
    yield from zip(_split(slot, _delta_uses(kind)), parts, strict=True)


def _query_halves(slot: Array, parts: Sequence[Array], kind: Kind) -> Pairs:
    """Per head of multi-latent attention: rows without positions, then rotated rows, whose pairs are half of these apart."""
    latent = kind.latent
    heads, plain = latent.num_attention_heads, latent.qk_head_dim
    packed, part = (rows.reshape(heads, rows.shape[0] // heads, *rows.shape[1:]) for rows in (slot, parts[0]))
    yield packed[:, :plain], part[:, :plain]
    yield from _halves(packed[:, plain:], part[:, plain:])


def _key_halves(slot: Array, parts: Sequence[Array], kind: Kind) -> Pairs:
    """Rows of the latent, then rotated rows that all heads share, whose pairs are half of these apart."""
    rank = kind.latent.kv_lora_rank
    yield slot[:rank], parts[0][:rank]
    yield from _halves(slot[None, rank:], parts[0][None, rank:])


def _halves(slot: Array, part: Array) -> Pairs:
    """Rotated rows along the second axis: pairs are neighbours in the slot, and half the rows apart in the part."""
    half = slot.shape[1] // 2
    yield slot[:, 0::2], part[:, :half]
    yield slot[:, 1::2], part[:, half:]


def _qkv_rows(kind: Kind) -> tuple[int, ...]:
    attention = kind.attention
    key = attention.num_query_groups * attention.kv_channels
    query = attention.num_attention_heads * attention.kv_channels
    return (2 if attention.attention_output_gate else 1) * query, key, key


def _delta_rows(kind: Kind) -> tuple[int, ...]:
    delta = kind.delta
    return 2 * delta.keys + 2 * delta.values, 2 * delta.linear_num_value_heads


def _delta_uses(kind: Kind) -> tuple[int, ...]:
    query, key, value, *gates = kind.blocks
    return query + key + value, *gates


SAME = Layout("same", lambda kind: (kind.rows,), _same)
#: Two rows that nothing reads, then the slot (OPT's positions).
AFTER_TWO_ROWS = Layout("after two rows", _two_more_rows, _after_two_rows)
#: One part for each block of the slot: gate and up, for example.
BLOCKS = Layout("blocks", lambda kind: kind.blocks, _blocks)
GATED = Layout("gated", lambda kind: kind.blocks, _blocks)
#: Gate and up row by row in one part; up alone where there is no gate.
ALTERNATING = Layout("alternating", lambda kind: (kind.rows,), _alternating)
GROUPED_QKV = Layout("grouped qkv", _qkv_rows, _grouped_qkv)
GROUPED_GATED_QKV = Layout("grouped qkv with gates", _qkv_rows, _grouped_gated_qkv)
LATENT_QUERY_HALVES = Layout("latent query, rotary halves", lambda kind: (kind.rows,), _query_halves)
LATENT_KEY_HALVES = Layout("latent key, rotary halves", lambda kind: (kind.rows,), _key_halves)
DELTA_BY_KEY_HEAD = Layout("gated DeltaNet by key head", _delta_rows, _delta_by_key_head)
DELTA_BY_USE = Layout("gated DeltaNet by use", _delta_uses, _delta_by_use)


@cache
def joined(layout: Layout) -> Layout:
    """All parts of a layout, one after the other, as a single part."""

    def pairs(slot: Array, parts: Sequence[Array], kind: Kind) -> Pairs:
        return layout.pairs(slot, _split(parts[0], layout.part_rows(kind)), kind)

    return Layout(f"joined {layout.name}", lambda kind: (sum(layout.part_rows(kind)),), pairs)


@cache
def interleaved(layout: Layout) -> Layout:
    """Grouped layout whose parts have queries and keys with neighbouring rotary pairs.

    In the slot the two of a pair are half a rotation apart, unless its rotary embeddings are interleaved, too. Only the part of
    a head that rotates (`rotary_percent`) is reordered. A grouped layout's first two pairs are those of queries and keys.
    """

    def pairs(slot: Array, parts: Sequence[Array], kind: Kind) -> Pairs:
        rope = kind.attention.rope
        for number, (whole, part) in enumerate(layout.pairs(slot, parts, kind)):
            if number >= _ROTATED or rope is None or rope.rotary_interleaved:
                yield whole, part
                continue
            axis = whole.ndim - len(slot.shape[1:]) - 1  # the rows of a head
            rotated = int(whole.shape[axis] * rope.rotary_percent)
            before, after = whole.shape[:axis], whole.shape[axis + 1 :]
            yield (
                _along(whole, axis, 0, rotated).reshape(*before, 2, rotated // 2, *after),
                _along(part, axis, 0, rotated).reshape(*before, rotated // 2, 2, *after).swapaxes(axis, axis + 1),
            )
            yield tuple(_along(one, axis, rotated, whole.shape[axis]) for one in (whole, part))  # type: ignore[misc]

    return Layout(f"{layout.name}, interleaved rotary pairs", layout.part_rows, pairs)


_ROTATED = 2
GROUPED_INTERLEAVED_QKV = interleaved(GROUPED_QKV)


class NamedLayout(NamedTuple):
    """Layout with a name of its own: how many parts it has, by each slot that it is for."""

    layout: Layout
    parts: Mapping[str, int]


_QKV_SLOTS, _GATED_SLOTS = ("qkv", "qkv_bias"), ("fc1", "fc1_bias", "expert_fc1", "expert_fc1_bias", "shared_fc1")


def _for(layout: Layout, slots: Iterable[str], parts: int) -> NamedLayout:
    return NamedLayout(layout, dict.fromkeys(slots, parts))


_WITH_PARTS = {
    "gated": _for(GATED, _GATED_SLOTS, 2),
    "grouped_qkv": _for(GROUPED_QKV, _QKV_SLOTS, 3),
    "grouped_gated_qkv": _for(GROUPED_GATED_QKV, _QKV_SLOTS, 3),
    "interleaved_grouped_qkv": _for(GROUPED_INTERLEAVED_QKV, _QKV_SLOTS, 3),
    "delta_by_key_head": _for(DELTA_BY_KEY_HEAD, ("delta_in",), 2),
    "delta_by_use": _for(DELTA_BY_USE, ("delta_in",), 4),
    "latent_query_halves": _for(LATENT_QUERY_HALVES, ("q_up", "q_whole"), 1),
    "latent_key_halves": _for(LATENT_KEY_HALVES, ("kv_down",), 1),
}
#: Every layout that a table which is no Python can name.
NAMED: Mapping[str, NamedLayout] = {
    "same": _for(SAME, SLOTS, 1),
    **_WITH_PARTS,
    **{f"joined_{name}": _for(joined(known.layout), known.parts, 1) for name, known in _WITH_PARTS.items()},
    "after_two_rows": _for(AFTER_TWO_ROWS, ("position_embeddings",), 1),
    "alternating": _for(ALTERNATING, _GATED_SLOTS, 1),
    "blocks": NamedLayout(BLOCKS, {"delta_in": 6, "delta_conv": 3}),
}


def _named(name: str) -> Layout:
    return NAMED[name].layout


def _along(array: Array, axis: int, start: int, stop: int) -> Array:
    """View of a range along one axis."""
    return array[(slice(None),) * axis + (slice(start, stop),)]


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
def row_maps(layout: Layout, slot: Slot, spec: ModelSpec, layer: Layer) -> tuple[RowMap, ...]:
    """Row maps of the parts: for each row of a part, the row of the slot, or -1. Cached, so that equal maps are one object."""
    kind = Kind(slot, spec, layer)
    parts = [np.full(count, -1, np.int64) for count in layout.part_rows(kind)]
    for whole, part in layout.pairs(np.arange(kind.rows, dtype=np.int64), parts, kind):
        part[...] = whole
    held = np.concatenate(parts)
    if not np.array_equal(np.sort(held[held >= 0]), np.arange(kind.rows)):
        raise ConversionError(
            f"layout {layout.name!r} does not cover each of the {kind.rows} rows of {slot.name} exactly once"
        )
    return tuple(map(interned, parts))

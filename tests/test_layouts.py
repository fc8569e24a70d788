"""Layouts and runs against rows written out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_converters.basics.errors import ConversionError
from megatron_converters.model.layouts import (
    ALTERNATING,
    GATED,
    GROUPED_INTERLEAVED_QKV,
    GROUPED_QKV,
    SAME,
    Kind,
    Layout,
    RowMap,
    interned,
    row_maps,
    runs,
)
from megatron_converters.model.slots import SLOTS
from megatron_converters.model.spec import ModelSpec
from tests.tiny import tiny_spec

# Query row "q1b" is row b of query head 1; with 2 groups, heads 0 and 1 share key and value head 0.
Q = ["q0a", "q0b", "q1a", "q1b", "q2a", "q2b", "q3a", "q3b"]
K = ["k0a", "k0b", "k1a", "k1b"]
V = ["v0a", "v0b", "v1a", "v1b"]
PACKED = [
    *("q0a", "q0b", "q1a", "q1b", "k0a", "k0b", "v0a", "v0b"),
    *("q2a", "q2b", "q3a", "q3b", "k1a", "k1b", "v1a", "v1b"),
]


def maps_of(layout: Layout, slot: str, spec: ModelSpec) -> tuple[RowMap, ...]:
    """Row maps of a slot in a model's layers, which are all of one kind."""
    (kind,) = spec.kinds
    return row_maps(layout, SLOTS[slot], spec, kind)


def packed(layout: Layout, slot: str, *parts: list[str], **fields: Any) -> list[str]:
    """The slot's rows when the parts' rows are put where `row_maps` says."""
    maps = maps_of(layout, slot, tiny_spec(**fields))
    assert [rows.size for rows in maps] == [len(part) for part in parts]
    result = ["?"] * sum(map(len, parts))
    for rows, part in zip(maps, parts, strict=True):
        for row, value in zip(rows.tolist(), part, strict=True):
            result[row] = value
    return result


def test_grouped_qkv_puts_each_group_s_queries_before_its_key_and_value() -> None:
    assert packed(GROUPED_QKV, "qkv", Q, K, V) == PACKED
    assert packed(GROUPED_QKV, "qkv_bias", Q, K, V, qkv_bias=True) == PACKED


def test_grouped_qkv_with_a_group_for_each_head_and_with_one_group() -> None:
    values = [f"v{head}{row}" for head in range(4) for row in "ab"]
    keys = [value.replace("v", "k") for value in values]
    assert packed(GROUPED_QKV, "qkv", Q, keys, values, num_query_groups=4) == [
        *("q0a", "q0b", "k0a", "k0b", "v0a", "v0b", "q1a", "q1b", "k1a", "k1b", "v1a", "v1b"),
        *("q2a", "q2b", "k2a", "k2b", "v2a", "v2b", "q3a", "q3b", "k3a", "k3b", "v3a", "v3b"),
    ]
    assert packed(GROUPED_QKV, "qkv", Q, K[:2], V[:2], num_query_groups=1) == [*Q, "k0a", "k0b", "v0a", "v0b"]


def test_grouped_interleaved_qkv_takes_rotary_pairs_apart_in_queries_and_keys_alone() -> None:
    """Meta's head of dimension 4 has rows x0 y0 x1 y1, Hugging Face's and Megatron's x0 x1 y0 y1."""
    heads = [[f"{name}{row}" for row in ("x0", "y0", "x1", "y1")] for name in ("q0", "q1", "k0", "v0")]
    rows = packed(
        GROUPED_INTERLEAVED_QKV,
        "qkv",
        [*heads[0], *heads[1]],
        heads[2],
        heads[3],
        num_attention_heads=2,
        num_query_groups=1,
        kv_channels=4,
    )
    assert rows == [
        *("q0x0", "q0x1", "q0y0", "q0y1", "q1x0", "q1x1", "q1y0", "q1y1"),
        *("k0x0", "k0x1", "k0y0", "k0y1", "v0x0", "v0y0", "v0x1", "v0y1"),
    ]


def test_gated_puts_gate_above_up() -> None:
    gate, up = ["g0", "g1", "g2", "g3"], ["u0", "u1", "u2", "u3"]
    assert packed(GATED, "fc1", gate, up) == ["g0", "g1", "g2", "g3", "u0", "u1", "u2", "u3"]
    assert packed(GATED, "fc1_bias", gate, up, mlp_bias=True) == [*gate, *up]


def test_same_is_the_slot() -> None:
    (rows,) = maps_of(SAME, "fc2", tiny_spec())
    assert rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_pairs_pack_and_unpack_matrices_and_vectors() -> None:
    spec = tiny_spec()
    kind = Kind(SLOTS["qkv"], spec, spec.layer(0))
    for columns in ((), (3,)):
        parts = [np.arange(rows * int(np.prod(columns)) or rows).reshape(rows, *columns) for rows in (8, 4, 4)]
        parts = [part + 100 * number for number, part in enumerate(parts)]
        slot = np.full((16, *columns), -1)
        for whole, part in GROUPED_QKV.pairs(slot, parts, kind):
            whole[...] = part
        named = dict(zip([*Q, *K, *V], [row for part in parts for row in part], strict=True))
        assert all(np.array_equal(row, named[name]) for row, name in zip(slot, PACKED, strict=True))
        back = [np.zeros_like(part) for part in parts]
        for whole, part in GROUPED_QKV.pairs(slot, back, kind):
            part[...] = whole
        assert all(np.array_equal(one, other) for one, other in zip(back, parts, strict=True))


@pytest.mark.parametrize(
    ("rows", "pair"),
    [
        (8, lambda slot, parts, _: iter([(slot[:4], parts[0][:4])])),  # half is never set
        (8, lambda slot, parts, _: iter([(slot[:1], parts[0])])),  # one row everywhere
        (7, lambda slot, parts, _: iter([(slot[:7], parts[0])])),  # a row of the slot is left out
    ],
)
def test_a_layout_that_is_no_permutation_is_refused(rows: int, pair: Any) -> None:
    layout = Layout("broken", lambda _: (rows,), pair)
    with pytest.raises(ConversionError, match=r"'broken' does not cover each of the 8 rows of fc2 exactly once"):
        maps_of(layout, "fc2", tiny_spec())


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], []),
        ([5], [(0, 5, 1)]),
        ([-1], []),
        ([-1, -1, -1], []),
        ([0, 1, 2], [(0, 0, 3)]),
        ([-1, 0, 1], [(1, 0, 2)]),  # -1 before row 0 is padding, not the row before
        ([-1, -1, 0], [(2, 0, 1)]),
        ([3, 4, -1, 5, 6], [(0, 3, 2), (3, 5, 2)]),
        ([2, 1, 0], [(0, 2, 1), (1, 1, 1), (2, 0, 1)]),
        ([7, 7, 8], [(0, 7, 1), (1, 7, 2)]),
        ([4, 5, -1], [(0, 4, 2)]),
        ([0, -1, 0, 1], [(0, 0, 1), (2, 0, 2)]),
    ],
)
def test_runs(rows: list[int], expected: list[tuple[int, int, int]]) -> None:
    assert list(runs(np.array(rows, np.int64))) == expected


def test_equal_row_maps_are_one_object_that_cannot_be_changed() -> None:
    one, other = interned(np.array([3, -1, 4])), interned(np.array([3, -1, 4]))
    assert one is other
    assert one.tolist() == [3, -1, 4]
    with pytest.raises(ValueError, match="read-only"):
        one[0] = 0
    spec = tiny_spec()
    assert maps_of(GATED, "fc1", spec) is maps_of(GATED, "fc1", tiny_spec())
    with pytest.raises(ValueError, match="read-only"):
        maps_of(GATED, "fc1", spec)[0][0] = 1


def test_alternating_rows_are_gate_and_up_in_turn() -> None:
    (rows,) = row_maps(ALTERNATING, SLOTS["fc1"], tiny_spec(ffn_hidden_size=3), tiny_spec(ffn_hidden_size=3).kinds[0])
    assert rows.tolist() == [0, 3, 1, 4, 2, 5]

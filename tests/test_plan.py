"""Covering a slot once and composing pieces with targets, on rows written out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_converters.basics.errors import ConversionError
from megatron_converters.conversion.composing import Planner, Sources, as_matrix
from megatron_converters.model.slots import SLOTS, Ref
from tests.tiny import piece, tiny_spec

FC2 = Ref(SLOTS["fc2"], 1)  # 8 rows, 4 columns
ALL = range(8)


def part(rows: Any, col: int = 0, cols: int = 4, dtype: str = "int64") -> Any:
    return piece(np.zeros((len(rows), cols), np.int64), rows, col, dtype)


def check(*pieces: Any) -> None:
    Planner().check_cover(FC2, tiny_spec(), Sources(pieces))


@pytest.mark.parametrize(
    "pieces",
    [
        [part(ALL)],
        [part([7, 6, 5, 4, 3, 2, 1, 0])],
        [part([0, 2, 4, 6]), part([1, 3, 5, 7])],
        [part(ALL, 0, 1), part(ALL, 1, 3)],
        [part([0, 1, 2, 3, -1, -1]), part([4, 5, 6, 7]), part([-1, -1])],
        [part([0, 1, 2, 3], 0, 4), part([4, 5, 6, 7], 0, 2), part([7, 6, 5, 4], 2, 2)],  # a grid of uneven tiles
    ],
)
def test_what_covers_a_slot_once_is_accepted(pieces: list[Any]) -> None:
    check(*pieces)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([part([0, 1, 2, 3, 4, 5, 6])], "row 7, columns 0 to 3, is stored 0 times"),
        ([part([1, 2, 3, 4, 5, 6, 7, -1])], "row 0, columns 0 to 3, is stored 0 times"),
        ([part(ALL), part([3])], r"row 3, columns 0 to 3, is stored 2 times instead of once \(1 of 8 rows"),
        ([part([0, 1, 2, 3, 4, 5, 6, 6])], r"row 6.* 2 times .*\(2 of 8 rows are affected\)"),
        ([part(ALL), part(ALL)], r"row 0.* 2 times .*\(8 of 8"),
        ([part(ALL, 0, 2)], "columns 2 to 3, is stored 0 times"),
        ([part(ALL, 1, 3)], "columns 0 to 0, is stored 0 times"),
        ([part(ALL, 0, 3), part(ALL, 2, 2)], "columns 2 to 2, is stored 2 times"),
        ([part(ALL, 0, 1), part(ALL, 2, 2)], "columns 1 to 1, is stored 0 times"),
        ([part(ALL, 0, 4), part([5], 1, 1)], "row 5, columns 1 to 1, is stored 2 times"),
        ([part(ALL, 0, 5)], "columns 0 to 5 are stored, but the tensor has 4"),
        ([part(ALL, -1, 4)], "columns -1 to 4 are stored"),
        ([part([*ALL, 8])], "row 8 is stored, but the tensor has 8"),
        ([], "no parts"),
        ([part([0, 1, 2, 3]), part([4, 5, 6, 7], dtype="float64")], r"2 dtypes \(float64, int64\)"),
    ],
)
def test_what_does_not_cover_a_slot_once_is_refused(pieces: list[Any], message: str) -> None:
    with pytest.raises(ConversionError, match=rf"^layer 1 fc2: .*{message}"):
        check(*pieces)


def test_every_single_row_that_is_lost_or_doubled_is_found() -> None:
    for row in ALL:
        rest = [other for other in ALL if other != row]
        for rows in (rest, [*ALL, row], [*rest, (row + 1) % 8]):
            with pytest.raises(ConversionError):
                check(part(rows))


def test_the_cover_is_checked_anew_for_other_rows_and_other_columns() -> None:
    """Results are kept by the identity of the row maps; nothing may pass as something checked before."""
    planner, spec = Planner(), tiny_spec()
    good = part(ALL)
    planner.check_cover(FC2, spec, Sources((good,)))
    narrow = piece(np.zeros((8, 3), np.int64), ALL)
    for pieces in ((narrow,), (good, good), (part([0] * 8),)):
        with pytest.raises(ConversionError):
            planner.check_cover(FC2, spec, Sources(pieces))
    with pytest.raises(ConversionError):
        planner.check_cover(Ref(SLOTS["proj"], 0), spec, Sources((good,)))  # 8 columns
    for _ in range(200):  # ids are used again once their arrays are gone
        planner.check_cover(FC2, spec, Sources((part(list(ALL)),)))
        with pytest.raises(ConversionError):
            planner.check_cover(FC2, spec, Sources((part([0, 1, 2, 3, 4, 5, 6, 6]),)))


def composed(rows: list[int], col: int, cols: int, *pieces: Any) -> list[tuple[list[int], slice, slice, bool]]:
    gathers = Planner().compose(np.array(rows), col, cols, pieces)
    return [(gather.rows.tolist(), gather.source_cols, gather.target_cols, gather.whole_width) for gather in gathers]


def test_rows_are_looked_up_in_the_source() -> None:
    assert composed([4, 6, 0], 0, 4, part([6, 5, 4])) == [([2, 0, -1], slice(0, 4), slice(0, 4), True)]
    assert composed([-1, 0, -1], 0, 4, part([-1, 0])) == [([-1, 1, -1], slice(0, 4), slice(0, 4), True)]


def test_pieces_that_give_nothing_are_left_out() -> None:
    assert composed([4, 6, 0], 0, 4, part([1, 2, 3])) == []
    assert composed([0, 1], 0, 2, part([0, 1], 2, 2)) == []
    assert composed([0, 1], 0, 2, part([-1, -1])) == []
    assert composed([-1, -1], 0, 2, part([0, 1])) == []
    assert composed([0, 1], 0, 4, part([1000000])) == []


def test_columns_are_cut_to_what_both_have() -> None:
    assert composed([0], 2, 4, part([0], 0, 4)) == [([0], slice(2, 4), slice(0, 2), False)]
    assert composed([0], 2, 2, part([0], 0, 8)) == [([0], slice(2, 4), slice(0, 2), False)]
    assert composed([0], 0, 8, part([0], 2, 2)) == [([0], slice(0, 2), slice(2, 4), False)]
    assert composed([0], 2, 2, part([0], 2, 2)) == [([0], slice(0, 2), slice(0, 2), True)]


def test_look_ups_are_kept_by_identity_and_never_mixed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_converters.conversion.composing._MAX_LOOKUPS", 3)
    planner = Planner()
    source = part([3, 2, 1, 0])
    wanted = np.array([0, 1])
    (first,) = planner.compose(wanted, 0, 4, [source])
    (again,) = planner.compose(wanted, 0, 4, [source])
    assert first.rows is again.rows
    for turn in range(50):
        rows = [turn % 4, (turn + 1) % 4]
        (gather,) = planner.compose(np.array(rows), 0, 4, [source])
        assert gather.rows.tolist() == [3 - row for row in rows]


def test_a_vector_is_a_matrix_of_one_column() -> None:
    assert (as_matrix((3,)), as_matrix((3, 2))) == ((3, 1), (3, 2))

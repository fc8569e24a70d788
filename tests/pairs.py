"""Fewer cases than a full product of parameters, without losing what the product can catch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")


def latin(rows: Sequence[A], columns: Sequence[B], symbols: Sequence[C]) -> list[tuple[A, B, C]]:
    """Every row with every column, and in each such cell one symbol, in turn, as in a Latin square.

    Every pair of a row and a symbol and of a column and a symbol occurs, too. That suffices where a fault can lie in what one
    parameter does or in how two of them meet: how a family's tensors are cut at a size, what a layout calls a family's tensors,
    how a layout's tensors are cut at a size. Names, cuts and values are separate stages of a conversion: a fault that shows only
    where three parameters meet would have to be in all of them.
    """
    assert len(symbols) <= min(len(rows), len(columns)), "some pair would not occur"
    cells = ((row, column) for row in range(len(rows)) for column in range(len(columns)))
    return [(rows[row], columns[column], symbols[(row + column) % len(symbols)]) for row, column in cells]


def chessboard(rows: Iterable[A], columns: Iterable[B], shift: int = 0) -> list[tuple[A, B]]:
    """Every row with every second column, as the fields of one colour lie on a chessboard; `shift` 1 gives those of the other.

    For costly tests whose pairs have been seen whole, and whose rows and columns are what may break.
    """
    cells = itertools.product(enumerate(rows), enumerate(columns))
    return [(row, column) for (i, row), (j, column) in cells if (i + j + shift) % 2 == 0]

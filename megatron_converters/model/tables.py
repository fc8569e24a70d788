"""Entry of a format's table: how the format names and stores a slot."""

from __future__ import annotations

from dataclasses import dataclass

from .layouts import Layout
from .values import Affine


@dataclass(frozen=True)
class Entry:
    """Names of a slot's parts in a format, in the order of the layout; `{layer}` and `{expert}` stand for numbers.

    `transposed` parts are stored as their transposed matrices, `swapped` ones with the halves of their columns the other way round.
    `value` turns stored values into those of the slot. `stacked` parts hold those of all experts along a first axis, so that their
    names have no number of one. Rows of a part with `unit_rows` are divided by their lengths as they are read, and stored as they
    are. `fused` names the single tensor, in the slot's own layout, that may be there instead: [experts, rows, columns] for all
    experts of an expert slot, the whole slot otherwise. A slot with a `constant` has no tensor, since all of its elements are that.
    """

    layout: Layout
    names: tuple[str, ...]
    fused: str | None = None
    transposed: bool = False
    swapped: bool = False
    stacked: bool = False
    value: Affine | None = None
    unit_rows: bool = False
    constant: float | None = None

"""Short forms of entries and rules that the tables of many families use."""

from __future__ import annotations

from typing import Any

from ..model.layouts import SAME, Layout
from ..model.tables import Entry
from .rules import Implied, Rule


def tensor(slot: str, *names: str, layout: Layout = SAME, **more: Any) -> dict[str, Entry]:
    """Entry of a slot whose parts have these full names."""
    return {slot: Entry(layout, names, **more)}


def linear(slot: str, *modules: str, layout: Layout = SAME, bias: bool = True, **more: Any) -> dict[str, Entry]:
    """Weight of modules, and their bias in the slot `<slot>_bias`, if `bias`."""
    weights = tensor(slot, *(f"{module}.weight" for module in modules), layout=layout, **more)
    biases = tensor(f"{slot}_bias", *(f"{module}.bias" for module in modules), layout=layout)
    return weights | biases if bias else weights


def constant(slot: str, value: float) -> dict[str, Entry]:
    """Entry of a slot that files leave out, since all of its elements are `value`."""
    return {slot: Entry(SAME, (), constant=value)}


def implied(**values: Any) -> tuple[Rule, ...]:
    """Properties that the architecture decides."""
    return tuple(Implied(name, value) for name, value in values.items())

"""Short forms of entries and rules that the tables of many families use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..model.layers import is_whole
from ..model.layouts import SAME, Layout
from ..model.tables import Entry
from .rules import Config, Implied, Rule


def tensor(slot: str, *names: str, layout: Layout = SAME, **more: Any) -> dict[str, Entry]:
    """Entry of a slot whose parts have these full names."""
    return {slot: Entry(layout, names, **more)}


def linear(slot: str, *modules: str, layout: Layout = SAME, bias: bool = True, **more: Any) -> dict[str, Entry]:
    """Weight of modules, and their bias in the slot `<slot>_bias`, if `bias`."""
    weights = tensor(slot, *(f"{module}.weight" for module in modules), layout=layout, **more)
    biases = tensor(f"{slot}_bias", *(f"{module}.bias" for module in modules), layout=layout)
    return weights | biases if bias else weights


def implied(**values: Any) -> tuple[Rule, ...]:
    """Properties that the architecture decides."""
    return tuple(Implied(name, value) for name, value in values.items())


def quotient(dividend: str, divisor: str) -> Callable[[Config], int | None]:
    """Whole quotient of two config keys; None, which `ModelSpec` refuses, where they are no numbers."""

    def divide(config: Config) -> int | None:
        one, other = config.get(dividend), config.get(divisor)
        return one // other if is_whole(one) and is_whole(other) and other > 0 else None

    return divide

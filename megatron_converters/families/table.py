"""Family table: tensors (slot → Hugging Face names and layout), and rules for config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..model.layouts import Layout
from ..model.slots import SLOTS, Scope
from .rules import Rule


@dataclass(frozen=True)
class HFEntry:
    """Hugging Face tensor names of a slot's parts, in the layout's order; `{layer}` and `{expert}` stand for numbers.

    `fused` names the single tensor, in the slot's own layout, that files hold instead if transformers 5 saved it as it is in
    memory: [experts, rows, columns] for all experts of an expert slot, the whole slot otherwise.
    """

    layout: Layout
    names: tuple[str, ...]
    fused: str | None = None


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture: names, layouts and config rules. Checked when built."""

    name: str
    model_type: str
    architecture: str
    tensors: Mapping[str, HFEntry]
    rules: Sequence[Rule]
    #: Suffixes of names of tensors that files may hold although they are not weights.
    ignored_suffixes: tuple[str, ...] = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")

    def __post_init__(self) -> None:
        """Refuse a table that names an unknown slot or a name without its placeholder."""
        for slot, entry in self.tensors.items():
            for placeholder, wanted in (
                ("{layer}", SLOTS[slot].scope is Scope.LAYER),
                ("{expert}", SLOTS[slot].expert),
            ):
                if any((placeholder in name) != wanted for name in entry.names):
                    raise ValueError(
                        f"family {self.name}: the names of {slot} and its scope disagree about {placeholder}"
                    )

"""Family table: tensors (slot → Hugging Face names and layout), and rules for config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ..model.slots import SLOTS, Scope
from ..model.spec import ModelSpec
from ..model.tables import Entry
from .rules import Rule

#: Number of a layer of multi-token prediction, where files count it after the model's layers.
BEYOND = "{beyond}"


class Proof(Enum):
    """How a family's table was proven."""

    LOGITS = "logits of its class in transformers"
    EQUIVALENT = "logits of an equivalent class in transformers, since it has none for this family"
    SHAPES = "names, shapes and arrays made by hand"


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture: names, layouts and config rules. Checked when built.

    `mtp_layer` is the beginning of names in layers of multi-token prediction, in place of `layer`; `{beyond}` stands for the
    number of such a layer counted after the model's, `{layer}` for one from 0. `replicas` are further names of slots that such
    layers repeat. `optional_prefix` is the base model's prefix where files are published without it. `aliases` and
    `further_architectures` are further values of `model_type` and `architectures` in config.json; `computed_by` is the class of
    another family that transformers has for this one, too, and writes there. `since` is the first release of
    Megatron-LM whose arguments can say such a model, the one that needs least of them; empty where none can, or where nobody has
    said it, and `proof` is None in the second case alone. `models` are published models of this architecture, and `covers` is what
    of them is converted, both in Markdown for people.
    """

    name: str
    model_type: str
    architecture: str
    tensors: Mapping[str, Entry]
    rules: Sequence[Rule]
    layer: str = "model.layers.{layer}."
    mtp_layer: str = ""
    replicas: Mapping[str, str] = field(default_factory=dict)
    optional_prefix: str = ""
    #: Entries in place of those of `tensors`, where a property of the model has a value: property, value, entries.
    variants: Sequence[tuple[str, Any, Mapping[str, Entry]]] = ()
    #: Names of tensors that files may have in place of the table's, by these others.
    renamed: Mapping[str, str] = field(default_factory=dict)
    #: Beginning of the names of its classes with another head, or none, where it is not that of `architecture`.
    stem: str = ""
    aliases: tuple[str, ...] = ()
    further_architectures: tuple[str, ...] = ()
    computed_by: str = ""
    #: Where files have layers of multi-token prediction that no release of Megatron-LM can hold: how their names begin, and why.
    unheld_prediction: tuple[str, str] = ("", "")
    #: Notes for the user on keys of config.json that decide nothing, where they are set.
    remarks: Mapping[str, str] = field(default_factory=dict)
    #: Suffixes of names of tensors that files may hold although they are not weights.
    ignored_suffixes: tuple[str, ...] = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
    since: str = field(default="", compare=False)
    proof: Proof | None = field(default=None, compare=False)
    models: str = field(default="", compare=False)
    covers: str = field(default="", compare=False)

    def tensors_of(self, spec: ModelSpec) -> Mapping[str, Entry]:
        """Entries of the slots of a model."""
        own = [entries for name, value, entries in self.variants if spec.values.get(name) == value]
        return {slot: entry for entries in (self.tensors, *own) for slot, entry in entries.items()}

    @property
    def model_types(self) -> tuple[str, ...]:
        """Every value of `model_type` that names it."""
        return (self.model_type, *self.aliases)

    @property
    def architectures(self) -> tuple[str, ...]:
        """Every name of its class in `architectures`."""
        return (self.architecture, *self.further_architectures)

    @property
    def base_prefix(self) -> str:
        """What names of the base model begin with, which transformers finds without it, too; empty if nothing."""
        first = f"{self.layer.partition('.')[0]}."
        embeddings = self.tensors.get("word_embeddings")
        begins = embeddings is not None and embeddings.names[0].startswith(first)
        return self.optional_prefix or (first if begins else "")

    def __post_init__(self) -> None:
        """Refuse a table that names an unknown slot or a name without its placeholder."""
        others = [item for _, _, entries in self.variants for item in entries.items()]
        for slot, entry in [*self.tensors.items(), *others]:
            if slot not in SLOTS:
                raise ValueError(f"family {self.name}: {slot!r} is no slot; known are {', '.join(SLOTS)}")
            own, expert = SLOTS[slot].scope, SLOTS[slot].expert
            if entry.stacked and not expert:
                raise ValueError(
                    f"family {self.name}: {slot} is no slot of experts, so that its parts cannot stack theirs"
                )
            for name in entry.names:
                layered = "{layer}" in name or BEYOND in name
                if (own is Scope.LAYER) != layered and own is not Scope.MTP:
                    raise ValueError(f"family {self.name}: the names of {slot} and its scope disagree about {{layer}}")
                if ("{expert}" in name) != (expert and not entry.stacked):
                    raise ValueError(f"family {self.name}: the names of {slot} and its scope disagree about {{expert}}")

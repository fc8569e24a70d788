"""Parts of slots in a Hugging Face folder: separate tensors as in published models, or fused ones as in transformers 5."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ...basics.errors import ConversionError
from ...families.heads import ENTRIES
from ...families.table import Family
from ...model.layers import OF_ATTENTION, OF_MLP
from ...model.layouts import SAME, RowMap, row_maps
from ...model.slots import DECODER, Ref, Scope, Slot
from ...model.spec import ModelSpec
from ...model.tables import Entry
from ...model.values import Affine
from ...storage.decoding import UnitRows
from ...storage.tensor import StoredTensor
from .quantised import Weight


class Part(NamedTuple):
    """Part of a slot, of shape `shape`, in the stored tensor `name`: row i of the part is the slot's row `rows[i]`.

    `stored_shape` is the shape of the stored tensor. A tensor of fused experts stacks one part per expert along a first axis;
    `number` is the index of this part there. A `transposed` part is stored as its transposed matrix, a `swapped` one with the
    halves of its columns the other way round. `value` turns stored values into the slot's; rows that are to be `unit_rows` are
    divided by their lengths.
    """

    name: str
    rows: RowMap
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    transposed: bool = False
    swapped: bool = False
    value: Affine | None = None
    unit_rows: bool = False
    number: int = 0

    @property
    def unread(self) -> int:
        """Number of rows at the beginning that are none of the slot's."""
        return 0 if self.rows[0] >= 0 else int(np.argmax(self.rows >= 0))

    @property
    def stored_parts(self) -> int:
        """Number of such parts in the stored tensor."""
        return math.prod(self.stored_shape) // max(math.prod(self.shape), 1)

    def read(self, data: Weight) -> list[tuple[int, Weight | UnitRows]]:
        """This part of the stored tensor in views, each with the slot's column where it begins; computed for rows of length 1."""
        view = self.view(data)
        if not (self.unit_rows or self.swapped):
            return [(0, view)]
        if not isinstance(view, StoredTensor):
            raise ConversionError(
                f"{self.name} is quantised, and one whose rows are divided by their lengths, or whose halves are swapped, "
                "cannot be decoded"
            )
        if self.unit_rows:
            return [(0, UnitRows(self.name, view))]
        half = self.shape[1] // 2
        return [(half, view.columns(0, half)), (0, view.columns(half, 2 * half))]

    def view(self, data: Weight) -> Weight:
        """View of this part in the stored tensor, its columns as they are there."""
        if self.shape == self.stored_shape and not (self.transposed or self.swapped):
            return data
        whole = self.stored_parts == 1 and len(self.stored_shape) == len(self.shape)
        matrix = data if whole else data.item(self.number)
        return matrix.transposed() if self.transposed else matrix


#: Properties of a part that all refs of a slot in one kind of layer share. Its name is a template.
_Template = Part


#: Slots of the biases that a family's files may lack.
_ABSENT = {OF_ATTENTION: ("qkv_bias", "proj_bias"), OF_MLP: ("fc1_bias", "fc2_bias")}


def constants(family: Family, spec: ModelSpec) -> dict[str, float]:
    """Value of all elements of each slot that the family's files leave out, by the slot's name."""
    stated = {slot: entry.constant for slot, entry in family.tensors.items() if entry.constant is not None}
    return stated | dict.fromkeys(_ABSENT.get(spec.absent_biases, ()), 0.0)


class HFNames:
    """Names and parts of a model's refs in a Hugging Face folder; those of a `bare` base model lack its prefix."""

    def __init__(self, family: Family, spec: ModelSpec, *, bare: bool = False) -> None:
        self._family, self._spec = family, spec
        self._tensors, self._constants = family.tensors_of(spec), constants(family, spec)
        self._prefix = family.base_prefix if bare else ""
        self._templates: dict[tuple[Slot, int, str, bool], tuple[_Template, ...]] = {}

    def parts(self, ref: Ref, *, fused: bool) -> list[Part]:
        """Parts of a ref; `fused` selects the fused tensor of transformers 5 where the slot has one."""
        if self.constant(ref) is not None:
            return []
        entry = self._entry(ref)
        whole = entry.fused if fused and entry.fused is not None else ""
        key = ref.slot, ref.kind_number(self._spec), ref.stack, whole != ""
        if key not in self._templates:
            self._templates[key] = tuple(self._fused(ref, whole) if whole else self._separate(ref))
        number = (ref.expert or 0) if whole or entry.stacked else 0
        return [Part(self._name(template.name, ref), *template[1:-1], number) for template in self._templates[key]]

    def names(self, ref: Ref) -> tuple[str, ...]:
        """Names of a ref's separate tensors; none for one that files leave out."""
        if self.constant(ref) is not None:
            return ()
        return tuple(self._name(self._template(name, ref), ref) for name in self._entry(ref).names)

    def fused_name(self, ref: Ref) -> str:
        """Name of a ref's fused tensor in transformers 5; empty if it has none."""
        fused = None if self.constant(ref) is not None else self._entry(ref).fused
        return "" if fused is None else self._name(self._template(fused, ref), ref)

    def constant(self, ref: Ref) -> float | None:
        """Value of all elements of a ref that has no tensor; None for one that has."""
        return self._constants.get(ref.slot.name)

    def replica_names(self, ref: Ref) -> list[str]:
        """Names of copies of a ref that layers of multi-token prediction repeat."""
        template = self._family.replicas.get(ref.slot.name)
        if template is None:
            return []
        return [self._numbered(template, layer, None) for layer in range(len(self._spec.mtp))]

    def _separate(self, ref: Ref) -> Iterator[_Template]:
        entry, rest = self._entry(ref), ref.shape(self._spec)[1:]
        maps = row_maps(entry.layout, ref.slot, self._spec, ref.kind(self._spec))
        if len(maps) != len(entry.names):
            raise ConversionError(
                f"the {self._family.name} family has {len(entry.names)} names for {ref}, whose layout {entry.layout.name} has "
                f"{len(maps)} parts in this model; correct its table"
            )
        for name, rows in zip(entry.names, maps, strict=True):
            shape = (rows.size, *rest)
            stored = shape[::-1] if entry.transposed else shape
            stored = (self._spec.num_experts, *stored) if entry.stacked else stored
            name = self._template(name, ref)
            how = entry.transposed, entry.swapped, entry.value, entry.unit_rows
            yield _Template(name, rows, shape, stored, *how)

    def _fused(self, ref: Ref, name: str) -> Iterator[_Template]:
        entry = self._entry(ref)
        (rows,) = row_maps(SAME, ref.slot, self._spec, ref.kind(self._spec))
        shape = ref.shape(self._spec)
        stored = (self._spec.num_experts, *shape) if ref.slot.expert else shape
        yield _Template(self._template(name, ref), rows, shape, stored, value=entry.value)

    def _template(self, name: str, ref: Ref) -> str:
        """Name template of a part in the ref's stack of layers."""
        if ref.stack != DECODER and ref.slot.scope is Scope.LAYER:
            name = name.replace(self._family.layer, self._family.mtp_layer)
        return name.removeprefix(self._prefix)

    def _name(self, template: str, ref: Ref) -> str:
        return self._numbered(template, ref.layer, ref.expert)

    def _numbered(self, template: str, layer: int | None, expert: int | None) -> str:
        beyond = None if layer is None else self._spec.num_layers + layer
        return template.format(layer=layer, expert=expert, beyond=beyond)

    def _entry(self, ref: Ref) -> Entry:
        try:
            return self._tensors.get(ref.slot.name) or ENTRIES[ref.slot.name]
        except KeyError:
            raise ConversionError(f"the {self._family.name} family has no name for {ref}") from None

"""Parts of slots in a Hugging Face folder: separate tensors as in published models, or fused ones as in transformers 5."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from ...basics.errors import ConversionError
from ...families.table import Family, HFEntry
from ...model.layouts import SAME, RowMap, row_maps
from ...model.slots import Ref, Slot
from ...model.spec import ModelSpec
from ...storage.tensor import StoredTensor


class Part(NamedTuple):
    """Part of a slot, of shape `shape`, in the stored tensor `name`: row i of the part is the slot's row `rows[i]`.

    `stored_shape` is the shape of the stored tensor. A tensor of fused experts stacks one part per expert along a first axis;
    `number` is the index of this part there.
    """

    name: str
    rows: RowMap
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    number: int = 0

    @property
    def stored_parts(self) -> int:
        """Number of such parts in the stored tensor."""
        return math.prod(self.stored_shape) // max(math.prod(self.shape), 1)

    def view(self, data: StoredTensor) -> StoredTensor:
        """View of this part in the stored tensor."""
        if self.shape == self.stored_shape:
            return data
        offset = data.offset + self.number * data.strides[0] * data.dtype.itemsize
        return StoredTensor(data.path, offset, data.dtype, data.shape[1:], data.strides[1:])


class _PartTemplate(NamedTuple):
    """Properties shared by one part of all refs of a slot: name template, row map, shape, and shape of the stored tensor."""

    template: str
    rows: RowMap
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]


class HFNames:
    """Names and parts of a model's refs in a Hugging Face folder."""

    def __init__(self, family: Family, spec: ModelSpec) -> None:
        self._family, self._spec = family, spec
        self._templates: dict[tuple[Slot, bool], tuple[_PartTemplate, ...]] = {}

    def parts(self, ref: Ref, *, fused: bool) -> list[Part]:
        """Parts of a ref; `fused` selects the fused tensor of transformers 5 where the slot has one."""
        key = ref.slot, fused and self._entry(ref).fused is not None
        if key not in self._templates:
            self._templates[key] = tuple(self._separate(ref) if not key[1] else self._fused(ref))
        number = (ref.expert or 0) if key[1] else 0
        return [
            Part(template.format(layer=ref.layer, expert=ref.expert), rows, shape, stored_shape, number)
            for template, rows, shape, stored_shape in self._templates[key]
        ]

    def names(self, ref: Ref) -> tuple[str, ...]:
        """Names of a ref's separate tensors."""
        return tuple(name.format(layer=ref.layer, expert=ref.expert) for name in self._entry(ref).names)

    def fused_name(self, ref: Ref) -> str:
        """Name of a ref's fused tensor in transformers 5; empty if it has none."""
        fused = self._entry(ref).fused
        return "" if fused is None else fused.format(layer=ref.layer)

    def _separate(self, ref: Ref) -> Iterator[_PartTemplate]:
        entry, (_, *cols) = self._entry(ref), ref.slot.shape(self._spec)
        for name, rows in zip(entry.names, row_maps(entry.layout, ref.slot, self._spec), strict=True):
            shape = (rows.size, *cols)
            yield _PartTemplate(name, rows, shape, shape)

    def _fused(self, ref: Ref) -> Iterator[_PartTemplate]:
        (rows,) = row_maps(SAME, ref.slot, self._spec)
        shape = ref.slot.shape(self._spec)
        yield _PartTemplate(
            self._entry(ref).fused or "", rows, shape, (self._spec.num_experts, *shape) if ref.slot.expert else shape
        )

    def _entry(self, ref: Ref) -> HFEntry:
        try:
            return self._family.tensors[ref.slot.name]
        except KeyError:
            raise ConversionError(f"the {self._family.name} family has no name for {ref}") from None

"""The tensors of a Hugging Face folder that hold a slot: the separate ones of published models, or fused ones of transformers 5."""

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
    """A part of a slot in a file: `rows[i]` is the slot's row of its row i, `shape` its own.

    `stored_shape` is that of the tensor `name`, which for fused experts holds a matrix more for each of them; `number` is then
    this one's number in it.
    """

    name: str
    rows: RowMap
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    number: int = 0

    @property
    def stored_parts(self) -> int:
        """How many such parts the stored tensor has."""
        return math.prod(self.stored_shape) // max(math.prod(self.shape), 1)

    def of(self, data: StoredTensor) -> StoredTensor:
        """This part of the stored tensor."""
        if self.shape == self.stored_shape:
            return data
        offset = data.offset + self.number * data.strides[0] * data.dtype.itemsize
        return StoredTensor(data.path, offset, data.dtype, data.shape[1:], data.strides[1:])


class _Kind(NamedTuple):
    """What the parts of all tensors of one slot have in common: name template, row map, own shape, stored shape."""

    template: str
    rows: RowMap
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]


class HFNames:
    """Names and parts of one model's slots in a Hugging Face folder."""

    def __init__(self, family: Family, spec: ModelSpec) -> None:
        self._family, self._spec = family, spec
        self._kinds: dict[tuple[Slot, bool], tuple[_Kind, ...]] = {}

    def parts(self, ref: Ref, *, fused: bool) -> list[Part]:
        """The parts of a slot. `fused` takes the names of transformers 5 where the slot has any."""
        key = ref.slot, fused and self._entry(ref).fused is not None
        if key not in self._kinds:
            self._kinds[key] = tuple(self._separate(ref) if not key[1] else self._fused(ref))
        index = (ref.expert or 0) if key[1] else 0
        return [
            Part(template.format(layer=ref.layer, expert=ref.expert), rows, shape, stored, index)
            for template, rows, shape, stored in self._kinds[key]
        ]

    def names(self, ref: Ref) -> tuple[str, ...]:
        """The names of a slot's separate parts."""
        return tuple(name.format(layer=ref.layer, expert=ref.expert) for name in self._entry(ref).names)

    def fused_name(self, ref: Ref) -> str:
        """The name of the tensor that transformers 5 has in memory, empty where it is no other."""
        fused = self._entry(ref).fused
        return "" if fused is None else fused.format(layer=ref.layer)

    def _separate(self, ref: Ref) -> Iterator[_Kind]:
        entry, (_, *cols) = self._entry(ref), ref.slot.shape(self._spec)
        for name, rows in zip(entry.names, row_maps(entry.layout, ref.slot, self._spec), strict=True):
            shape = (rows.size, *cols)
            yield _Kind(name, rows, shape, shape)

    def _fused(self, ref: Ref) -> Iterator[_Kind]:
        (rows,) = row_maps(SAME, ref.slot, self._spec)
        shape = ref.slot.shape(self._spec)
        yield _Kind(
            self._entry(ref).fused or "", rows, shape, (self._spec.num_experts, *shape) if ref.slot.expert else shape
        )

    def _entry(self, ref: Ref) -> HFEntry:
        try:
            return self._family.tensors[ref.slot.name]
        except KeyError:
            raise ConversionError(f"the {self._family.name} family has no name for {ref}") from None

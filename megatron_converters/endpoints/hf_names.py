"""The tensors of a Hugging Face folder that hold a slot: the separate ones of published models, or fused ones of transformers 5."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import ConversionError
from ..families.base import Family, HFEntry
from ..layouts import SAME, RowMap, row_maps
from ..slots import Ref
from ..spec import ModelSpec
from ..storage.tensor import StoredTensor


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a slot in a file: `rows[i]` is the slot's row of its row i, `shape` its own.

    `stored_shape` is that of the tensor `name`, which for fused experts holds a matrix more for each of them; `index` is then
    this one's number in it.
    """

    name: str
    rows: RowMap
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    index: int = 0

    @property
    def count(self) -> int:
        """How many such parts the stored tensor has."""
        return math.prod(self.stored_shape) // max(math.prod(self.shape), 1)

    def of(self, data: StoredTensor) -> StoredTensor:
        """This part of the stored tensor."""
        if self.shape == self.stored_shape:
            return data
        offset = data.offset + self.index * data.strides[0] * data.dtype.itemsize
        return StoredTensor(data.path, offset, data.dtype, data.shape[1:], data.strides[1:])


def parts_of(family: Family, ref: Ref, spec: ModelSpec, *, fused: bool) -> list[Part]:
    """The parts of a slot. `fused` takes the names of transformers 5 where the slot has any."""
    entry = _entry(family, ref)
    shape = ref.slot.shape(spec)
    if fused and entry.fused is not None:
        (rows,) = row_maps(SAME, ref.slot, spec)
        if ref.expert is None:
            return [Part(fused_name(family, ref), rows, shape, shape)]
        return [Part(fused_name(family, ref), rows, shape, (spec.num_experts, *shape), ref.expert)]
    maps = row_maps(entry.layout, ref.slot, spec)
    return [
        Part(name, rows, (rows.size, *shape[1:]), (rows.size, *shape[1:]))
        for name, rows in zip(part_names(family, ref), maps, strict=True)
    ]


def part_names(family: Family, ref: Ref) -> tuple[str, ...]:
    """The names of a slot's separate parts."""
    return tuple(name.format(layer=ref.layer, expert=ref.expert) for name in _entry(family, ref).names)


def fused_name(family: Family, ref: Ref) -> str:
    """The name of the tensor that transformers 5 has in memory, empty where it is no other."""
    fused = _entry(family, ref).fused
    return "" if fused is None else fused.format(layer=ref.layer)


def _entry(family: Family, ref: Ref) -> HFEntry:
    try:
        return family.tensors[ref.slot.name]
    except KeyError:
        raise ConversionError(f"the {family.name} family has no name for {ref}") from None

"""Write a Megatron-LM checkpoint of the `torch` format: one `mp_rank_*/model_optim_rng.pt` a rank, filled in place.

Format: Megatron-LM core_v0.17.1, training/checkpointing.py, and the files that it writes.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import ConversionError
from ..layouts import RowMap
from ..megatron_names import DIALECTS, EXPERTS, EXTRA_STATE_SUFFIX, LAST_EXTRA_STATE, STACKED, extra_state
from ..outline import Fill
from ..parallel import Cut, Rank, homes
from ..slots import Ref, Shard, refs
from ..storage import torch_zip
from ..storage.output import Layout
from ..storage.tensor import StoredTensor
from ..units import count
from .megatron_checkpoint import CheckpointTarget, sizes

FILE = "model_optim_rng.pt"


@dataclass(frozen=True, eq=False)
class _Place:
    """A slot, or a tied copy of it, on one rank; of experts that share a tensor the `index`-th of `count`."""

    ref: Ref
    key: str
    cut: Cut
    index: int = 0
    count: int = 1
    transposed: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor. Megatron-LM gives stacks of transposed matrices only two dimensions."""
        if not self.transposed:
            return self.cut.shape
        rows, cols = self.cut.shape
        return (cols, self.count * rows) if self.ref.slot.shard is Shard.COLUMN else (self.count * cols, rows)


class MegatronTarget(CheckpointTarget):
    """A checkpoint of the `torch` format: a file for each rank."""

    format = "torch"

    def _lay_out(self) -> tuple[dict[str, Layout], dict[str, dict[str, StoredTensor]]]:
        files = {self._file(rank): self._layout(rank, places) for rank, places in self._places().items()}
        self._tensors = sum(len(layout.regions) for layout in files.values())
        ranks = [rank for stage in range(self._parallel.pp) for rank in self._parallel.ranks(stage)]
        return files, {self._file(rank): self._bins_on(rank) for rank in ranks}

    def fills(self, ref: Ref) -> Iterator[Fill]:
        """The slot's share on every rank that holds it."""
        dtype = self._dtype_of(ref)
        for rank, place in self._homes(ref):
            rows = resolve_padding(place.cut, self._spec.vocab_size)
            start = place.index * math.prod(place.cut.shape) * dtype.itemsize
            yield Fill(
                self._file(rank),
                place.key,
                dtype,
                place.cut.shape,
                rows,
                place.cut.col,
                start,
                place.transposed,
                place.cut.padding,
            )

    def _file(self, rank: Rank) -> str:
        return f"{self._parallel.directory(rank)}/{FILE}"

    def _bins_on(self, rank: Rank) -> dict[str, StoredTensor]:
        return {} if self._bins is None else dict(self._bins.on(rank, self._parallel))

    def _layout(self, rank: Rank, places: list[_Place]) -> Layout:
        tensors: dict[str, torch_zip.NewTensor] = {}
        for place in places:
            tensor = torch_zip.NewTensor(place.key, self._dtype_of(place.ref), place.stored_shape)
            if tensors.setdefault(place.key, tensor) != tensor:
                raise ConversionError(
                    f"{place.ref} is {tensor.dtype}, but others in {place.key} are not; give one dtype"
                )
        for key, data in self._bins_on(rank).items():
            tensors[key] = torch_zip.NewTensor(key, data.dtype, data.shape)
        parts = {place.key: place.count for place in places if place.count > 1}
        return dataclasses.replace(torch_zip.layout(FILE, self._tree(self._models(rank, tensors))), parts=parts)

    def _models(self, rank: Rank, tensors: Mapping[str, torch_zip.NewTensor]) -> dict[str, OrderedDict[str, Any]]:
        """The state dicts of a rank, one for each of its stages; `tensors` have the stage's prefix."""
        parallel = self._parallel
        models = {}
        for entry, stage in zip(parallel.entries, range(rank.pp, len(parallel.stages), parallel.pp), strict=True):
            prefix = parallel.prefix(stage)
            mine = [(key.removeprefix(prefix), tensor) for key, tensor in tensors.items() if key.startswith(prefix)]
            models[entry] = OrderedDict([*mine, *dict.fromkeys(self._extra_state(stage)).items()])
        return models

    def _places(self) -> dict[Rank, list[_Place]]:
        """What each rank holds, in the order of its layers."""
        places: dict[Rank, list[_Place]] = {}
        for ref in refs(self._spec):
            for rank, place in self._homes(ref):
                places.setdefault(rank, []).append(place)
        return places

    def _homes(self, ref: Ref) -> Iterator[tuple[Rank, _Place]]:
        """The ranks that hold a ref, with its key and share there."""
        parallel, experts = self._parallel, self._spec.num_experts
        names = {**DIALECTS[self._options.impl], **EXPERTS[self._expert_layout]}
        local = parallel.local_expert(ref.expert, experts)
        stacked = ref.expert is not None and self._expert_layout == STACKED
        stack = (local or 0, experts // parallel.ep, True) if stacked else (0, 1, False)
        for stage, slot, layer in homes(ref, self._spec, parallel):
            key = parallel.prefix(stage) + names[slot].format(layer=layer, expert=local, global_expert=ref.expert)
            for rank in parallel.ranks(stage):
                if parallel.holds(rank, ref.expert, experts):
                    yield rank, _Place(ref, key, parallel.share(ref.slot, self._spec, rank, self._padded), *stack)

    def _extra_state(self, stage: int) -> Iterator[str]:
        parallel, impl = self._parallel, self._options.impl
        before = sum(parallel.stages[:stage])
        experts = self._spec.num_experts // parallel.ep
        for layer in range(parallel.stages[stage]):
            for module in extra_state(impl, self._expert_layout, self._spec, before + layer, experts):
                yield f"{module.format(layer=layer)}.{EXTRA_STATE_SUFFIX}"
        if stage == len(parallel.stages) - 1:
            yield from (f"{module}.{EXTRA_STATE_SUFFIX}" for module in LAST_EXTRA_STATE[impl])

    def _written(self) -> str:
        ranks = sum(len(self._parallel.ranks(stage)) for stage in range(self._parallel.pp))
        return (
            f"{count(self._tensors, 'tensor')} on {count(ranks, 'rank')} "
            f"({sizes(self._parallel)}, layers {'+'.join(map(str, self._parallel.stages))})"
        )


def resolve_padding(share: Cut, vocab: int) -> RowMap:
    """The slot's row of each row of a share, padding resolved."""
    return _padded_rows(share, vocab) if share.padding else share.rows


@lru_cache(maxsize=64)
def _padded_rows(share: Cut, vocab: int) -> RowMap:
    """Padding repeats the last row of the vocabulary, as Megatron-LM's own converters do."""
    return np.where(share.rows < 0, vocab - 1, share.rows)

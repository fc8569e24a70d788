"""Placement of a model's tensors on ranks, for one set of parallel sizes.

What is equal for all layers and experts, such as the shares of a slot, is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ..model.layers import Layer
from ..model.slots import DECODER, Ref, Shard, Slot
from ..model.spec import ModelSpec
from .ranks import Cut, Parallel, Rank, cut, locations


class Share(NamedTuple):
    """Part of a slot that a rank holds; `number` is equal for ranks that hold the same part."""

    rank: Rank
    cut: Cut
    number: int


class Location(NamedTuple):
    """Pipeline stage that holds a tensor, and the slot that the tensor is there; `shares` are those of the stage's ranks.

    `layer` and `expert` are numbers on the rank. `prefix` distinguishes the tensor from one with the same key in another
    model of its rank.
    """

    stage: int
    prefix: str
    slot: str
    layer: int | None
    expert: int | None
    shares: tuple[Share, ...]

    def key(self, template: str, global_expert: int | None) -> str:
        """Key of the tensor in its model, from a template of Megatron names."""
        return template.format(layer=self.layer, expert=self.expert, global_expert=global_expert)


class Placement:
    """Locations of all tensors of a model that is cut by `parallel`; `padded` counts embedding rows with padding.

    `shards` has the dimension to cut of slots, by name, that are not cut as usual.
    """

    def __init__(
        self, spec: ModelSpec, parallel: Parallel, padded: int, shards: Mapping[str, Shard] | None = None
    ) -> None:
        self._spec, self._parallel, self._padded = spec, parallel, padded
        self._shards = shards or {}
        self._shares: dict[tuple[Slot, int, int, int | None], tuple[Share, ...]] = {}
        self._stages = [parallel.place(layer)[0] for layer in range(spec.num_layers)]
        self._prefixes = [parallel.prefix(stage) for stage in range(len(parallel.stages))]

    def locations(self, ref: Ref) -> Iterator[Location]:
        """Locations of a tensor: one stage, or two for embeddings that the last stage needs, too."""
        parallel = self._parallel
        local = parallel.local_expert(ref.expert, self._spec.num_experts)
        kind, ep = ref.kind_number(self._spec), self._ep(ref)
        for stage, slot, layer in locations(ref, self._spec, parallel):
            shares = self._stage_shares(ref.slot, kind, stage % parallel.pp, ep)
            yield Location(stage, self._prefixes[stage], slot, layer, local, shares)

    def shares(self, ref: Ref) -> tuple[Share, ...]:
        """Shares on the first stage that holds a tensor."""
        of_decoder = ref.layer is not None and ref.stack == DECODER
        stage = self._stages[ref.layer] if of_decoder else next(locations(ref, self._spec, self._parallel))[0]  # type: ignore[index]
        return self._stage_shares(ref.slot, ref.kind_number(self._spec), stage % self._parallel.pp, self._ep(ref))

    def _ep(self, ref: Ref) -> int | None:
        """Expert-parallel number of the ranks that hold an expert."""
        return None if ref.expert is None else ref.expert // (self._spec.num_experts // self._parallel.ep)

    def _stage_shares(self, slot: Slot, kind: int, pp: int, ep: int | None) -> tuple[Share, ...]:
        """Shares of the ranks with pipeline number `pp`: of all, or for an expert of those with expert-parallel number `ep`."""
        key = slot, kind, pp, ep
        if key not in self._shares:
            ranks = [rank for rank in self._parallel.ranks(pp) if ep in (None, rank.ep)]
            self._shares[key] = tuple(self._share(slot, self._spec.kinds[kind], rank) for rank in ranks)
        return self._shares[key]

    def _share(self, slot: Slot, kind: Layer, rank: Rank) -> Share:
        shard = self._shards.get(slot.name, slot.shard)
        ways, number = self._parallel.ways(slot, rank)
        return Share(rank, cut(slot, self._spec, kind, ways, number, self._padded, shard), number if shard.cuts else 0)

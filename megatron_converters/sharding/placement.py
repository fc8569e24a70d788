"""Placement of a model's tensors on ranks, for one set of parallel sizes.

What is equal for all layers and experts, such as the shares of a slot, is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..model.slots import Ref, Slot
from ..model.spec import ModelSpec
from .ranks import Cut, Parallel, Rank, locations


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

    prefix: str
    slot: str
    layer: int | None
    expert: int | None
    shares: tuple[Share, ...]

    def key(self, template: str, global_expert: int | None) -> str:
        """Key of the tensor on these ranks, from a template of Megatron names."""
        return self.prefix + template.format(layer=self.layer, expert=self.expert, global_expert=global_expert)


class Placement:
    """Locations of all tensors of a model that is cut by `parallel`; `padded` counts embedding rows with padding."""

    def __init__(self, spec: ModelSpec, parallel: Parallel, padded: int) -> None:
        self._spec, self._parallel, self._padded = spec, parallel, padded
        self._shares: dict[tuple[Slot, int, int | None], tuple[Share, ...]] = {}
        self._stages = [parallel.place(layer)[0] for layer in range(spec.num_layers)]
        self._prefixes = [parallel.prefix(stage) for stage in range(len(parallel.stages))]

    def locations(self, ref: Ref) -> Iterator[Location]:
        """Locations of a tensor: one stage, or two for tied embeddings."""
        parallel = self._parallel
        local = parallel.local_expert(ref.expert, self._spec.num_experts)
        ep = self._ep(ref)
        for stage, slot, layer in locations(ref, self._spec, parallel):
            yield Location(
                self._prefixes[stage], slot, layer, local, self._stage_shares(ref.slot, stage % parallel.pp, ep)
            )

    def shares(self, ref: Ref) -> tuple[Share, ...]:
        """Shares on the first stage that holds a tensor."""
        stage = next(locations(ref, self._spec, self._parallel))[0] if ref.layer is None else self._stages[ref.layer]
        return self._stage_shares(ref.slot, stage % self._parallel.pp, self._ep(ref))

    def _ep(self, ref: Ref) -> int | None:
        """Expert-parallel number of the ranks that hold an expert."""
        return None if ref.expert is None else ref.expert // (self._spec.num_experts // self._parallel.ep)

    def _stage_shares(self, slot: Slot, pp: int, ep: int | None) -> tuple[Share, ...]:
        """Shares of the ranks with pipeline number `pp`: of all, or for an expert of those with expert-parallel number `ep`."""
        key = slot, pp, ep
        if key not in self._shares:
            parallel = self._parallel
            self._shares[key] = tuple(
                Share(rank, parallel.share(slot, self._spec, rank, self._padded), parallel.share_number(slot, rank))
                for rank in parallel.ranks(pp)
                if ep in (None, rank.ep)
            )
        return self._shares[key]

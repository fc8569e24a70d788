"""Where each tensor of a model lies over the ranks of one set of sizes.

What is the same for all layers and experts, such as the shares of a slot, is worked out once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..model.slots import Ref, Slot
from ..model.spec import ModelSpec
from .ranks import Cut, Parallel, Rank, homes


class Share(NamedTuple):
    """Part of a slot that a rank holds; `number` is equal for ranks that hold the same."""

    rank: Rank
    cut: Cut
    number: int


class Home(NamedTuple):
    """Pipeline stage that holds a tensor, as `slot`. Layer and expert are numbers on the rank, `shares` those of its ranks.

    `prefix` tells the tensor from one of the same key in another model of its rank.
    """

    stage: int
    prefix: str
    slot: str
    layer: int | None
    expert: int | None
    shares: tuple[Share, ...]

    def key(self, template: str, global_expert: int | None) -> str:
        """The tensor's key on these ranks, by a template of `megatron_names`."""
        return self.prefix + template.format(layer=self.layer, expert=self.expert, global_expert=global_expert)


class Placement:
    """Homes of all tensors of a model that is cut by `parallel`; `padded` counts embedding rows with padding."""

    def __init__(self, spec: ModelSpec, parallel: Parallel, padded: int) -> None:
        self._spec, self._parallel, self._padded = spec, parallel, padded
        self._shares: dict[tuple[Slot, int, int | None], tuple[Share, ...]] = {}
        self._stages = [parallel.place(layer)[0] for layer in range(spec.num_layers)]
        self._prefixes = [parallel.prefix(stage) for stage in range(len(parallel.stages))]

    def homes(self, ref: Ref) -> Iterator[Home]:
        """Where a tensor lies: one stage, or for tied embeddings two."""
        parallel = self._parallel
        local = parallel.local_expert(ref.expert, self._spec.num_experts)
        ep = self._ep(ref)
        for stage, slot, layer in homes(ref, self._spec, parallel):
            yield Home(
                stage, self._prefixes[stage], slot, layer, local, self._shares_of(ref.slot, stage % parallel.pp, ep)
            )

    def shares(self, ref: Ref) -> tuple[Share, ...]:
        """The shares on the first stage that holds a tensor."""
        stage = next(homes(ref, self._spec, self._parallel))[0] if ref.layer is None else self._stages[ref.layer]
        return self._shares_of(ref.slot, stage % self._parallel.pp, self._ep(ref))

    def _ep(self, ref: Ref) -> int | None:
        """The expert-parallel number of the ranks that hold an expert."""
        return None if ref.expert is None else ref.expert // (self._spec.num_experts // self._parallel.ep)

    def _shares_of(self, slot: Slot, pp: int, ep: int | None) -> tuple[Share, ...]:
        """The shares on the ranks of pipeline stage `pp`: on all, or for an expert on those of one expert-parallel number."""
        key = slot, pp, ep
        if key not in self._shares:
            parallel = self._parallel
            self._shares[key] = tuple(
                Share(rank, parallel.share(slot, self._spec, rank, self._padded), parallel.share_number(slot, rank))
                for rank in parallel.ranks(pp)
                if ep in (None, rank.ep)
            )
        return self._shares[key]

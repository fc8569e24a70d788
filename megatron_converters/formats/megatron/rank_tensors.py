"""Tensors that a rank's models have, by Megatron-LM's names: where each ref of a model is, in one dialect and cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ...model.slots import Ref, Shard
from ...model.spec import ModelSpec
from ...sharding.placement import Location, Placement
from ...sharding.ranks import Parallel
from .names import DIALECTS, EXPERTS, FUSED_DOWN, MTP_MODULES, name_of
from .shared_tensors import Member, member_of


class Place(NamedTuple):
    """Stage that holds a ref, with the shares of its ranks, and the key of the tensor in the model of that stage.

    `whole_key` is the key that also says which of a rank's models it is in.
    """

    location: Location
    key: str

    @property
    def whole_key(self) -> str:
        """Key with the prefix of the stage's model."""
        return self.location.prefix + self.key


class RankTensors:
    """Tensors of all ranks' models. `impl` is a key of `names.DIALECTS`, `expert_layout` one of `names.EXPERTS`.

    `padded` counts embedding rows with padding, `shards` has cuts that are not usual, `mtp_module` names the module of layers that
    predict further tokens, and `fused_down` is whether the down projections of latents are one tensor.
    """

    def __init__(
        self,
        spec: ModelSpec,
        parallel: Parallel,
        padded: int,
        *,
        impl: str,
        expert_layout: str,
        shards: Mapping[str, Shard] | None = None,
        mtp_module: str = MTP_MODULES[0],
        fused_down: bool = False,
    ) -> None:
        self._spec, self._mtp_module = spec, mtp_module
        self._experts = spec.num_experts // parallel.ep
        self._placement = Placement(spec, parallel, padded, shards)
        self._table = {**(FUSED_DOWN if fused_down else DIALECTS[impl]), **EXPERTS[expert_layout]}
        self._templates: dict[tuple[str, int, str], str] = {}
        self._places: dict[Ref, tuple[Place, ...]] = {}

    def places(self, ref: Ref) -> tuple[Place, ...]:
        """Places of a ref: one stage, or two for embeddings that the last stage needs, too. They are asked for several times."""
        found = self._places.get(ref)
        if found is None:
            found = self._places[ref] = tuple(
                Place(location, location.key(self._template(location, ref), ref.expert))
                for location in self._placement.locations(ref)
            )
        return found

    def member(self, place: Place, ref: Ref) -> Member | None:
        """Place of a ref's shares in tensors that it shares with others; None if it has tensors of its own."""
        return member_of(place.key, ref, place.location.shares[0].cut.shape, self._spec, self._experts)

    def _template(self, location: Location, ref: Ref) -> str:
        """Name template of a ref at one of its locations."""
        number = ref.kind_number(self._spec)
        key = location.slot, number, ref.stack
        if key not in self._templates:
            kind = self._spec.kinds[number]
            self._templates[key] = name_of(self._table, location.slot, kind, ref.stack, self._mtp_module)
        return self._templates[key]

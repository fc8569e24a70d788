"""How rank files store slots otherwise than the hub, by release: cuts of slots, and the module of multi-token prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...model.slots import Shard
from .names import MTP_MODULES
from .releases import NEWEST, before

#: Release from which the down projections of multi-latent attention are not cut; earlier ones cut their rows.
_WHOLE_DOWN_PROJECTIONS = "0.14"
_DOWN_PROJECTIONS = ("q_down", "kv_down")
#: Release that renamed the module that holds the layer of multi-token prediction.
_MTP_MODEL_LAYER = "0.17"


@dataclass(frozen=True)
class Conventions:
    """Cuts of slots, by name, that are not the hub's, and the name of the module that holds a layer of multi-token prediction."""

    shards: Mapping[str, Shard] = field(default_factory=dict)
    mtp_module: str = MTP_MODULES[0]


def conventions(release: str = NEWEST) -> Conventions:
    """Conventions of a release's rank files."""
    cut = before(release, _WHOLE_DOWN_PROJECTIONS)
    shards = dict.fromkeys(_DOWN_PROJECTIONS, Shard.COLUMN) if cut else {}
    return Conventions(shards, MTP_MODULES[before(release, _MTP_MODEL_LAYER)])


#: Conventions of reading, in the order of trial.
CUT_DOWN_PROJECTIONS = dict.fromkeys(_DOWN_PROJECTIONS, Shard.COLUMN)

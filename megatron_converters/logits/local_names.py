"""Renaming of a stage's tensors to megatron-core's local layers, which run without Transformer Engine.

Only names change, and the older stacked experts are split: no sharding rule is applied, so that a wrong one is found.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..assets.capacity_bins import CAPACITY_BINS
from ..formats.megatron.names import EXPERTS, EXTRA_STATE_SUFFIX, LOCAL, keys, name_of
from ..formats.megatron.options import SINGLE, STACKED
from ..model.slots import SLOTS, Shard, refs
from ..model.spec import ModelSpec
from ..sharding.ranks import Parallel, Rank, locations

State = dict[str, torch.Tensor]
_SEQUENTIAL = EXPERTS["sequential"]
_NAMES = {**LOCAL, **_SEQUENTIAL}
#: Slots of experts that are no biases.
_MATRICES = EXPERTS[STACKED]


def with_local_names(state: State, spec: ModelSpec, parallel: Parallel, rank: Rank, stage: int) -> State:
    """Tensors that a rank holds of a stage, renamed, with one entry for each expert.

    Unknown names are kept, so that a strict load refuses them. Extra states, which hold no part of the model, and capacity bins
    are left out.
    """
    renamed = {
        key: value
        for key, value in state.items()
        if not key.endswith(EXTRA_STATE_SUFFIX) and not CAPACITY_BINS.fullmatch(key)
    }
    _unstack(renamed, spec, parallel, stage)
    _split_single(renamed, spec.num_experts // parallel.ep)
    for stored, wanted in _name_pairs(spec, parallel, rank, stage):
        if stored in renamed and wanted not in renamed:
            renamed[wanted] = renamed.pop(stored)
    return renamed


def _split_single(state: State, experts: int) -> None:
    """Replace each tensor of all experts of a rank by views of the single experts (see `SINGLE`)."""
    for slot, name in EXPERTS[SINGLE].items():
        end, own = (template.rpartition("layers.{layer}")[2] for template in (name, _SEQUENTIAL[slot]))
        for key in [key for key in state if key.endswith(end)]:
            whole = state.pop(key)
            members = whole.reshape(experts, -1, *whole.shape[-1:]) if slot in _MATRICES else whole.reshape(experts, -1)
            prefix = key.removesuffix(end)
            state |= {prefix + own.format(expert=number): one for number, one in enumerate(members)}


def _unstack(state: State, spec: ModelSpec, parallel: Parallel, stage: int) -> None:
    """Replace each stack of a rank's experts by transposed views of the single experts (see `STACKED`)."""
    for slot, name in EXPERTS[STACKED].items():
        for layer in range(parallel.stages[stage]):
            if (key := name.format(layer=layer)) not in state:
                continue
            whole = (-1, spec.hidden_size) if SLOTS[slot].shard is Shard.ROW else (spec.hidden_size, -1)
            experts = state.pop(key).reshape(spec.num_experts // parallel.ep, *whole).transpose(1, 2)
            state |= {_SEQUENTIAL[slot].format(layer=layer, expert=number): one for number, one in enumerate(experts)}


def _name_pairs(spec: ModelSpec, parallel: Parallel, rank: Rank, stage: int) -> Iterator[tuple[str, str]]:
    """Pairs of names for every tensor of a rank's stage: each name that it may be stored under, and its local name."""
    for ref in refs(spec):
        if not parallel.holds(rank, ref.expert, spec.num_experts):
            continue
        expert = parallel.local_expert(ref.expert, spec.num_experts)
        for home, slot, layer in locations(ref, spec, parallel):
            if home == stage:
                kind, numbers = ref.kind(spec), dict(layer=layer, expert=expert, global_expert=ref.expert)
                wanted = name_of(_NAMES, slot, kind, ref.stack).format(**numbers)
                stored = (name.format(**numbers) for name in keys(slot, kind, ref.stack))
                yield from ((name, wanted) for name in stored if name != wanted)

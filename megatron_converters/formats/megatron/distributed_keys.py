"""Keys of distributed checkpoints: the alternative ways in which one may store a ref.

In the `torch_dist` format modules name keys by their `sharded_state_dict`: a layer's tensors are slices of one whose first axis is
the layers, or have keys of their own; experts are a further axis, or have keys of their own too. The formats `torch_dcp` and
`fsdp_dtensor` have the names of a state dict, with layers and experts numbered over the whole model; the latter stores gate and
up apart, and since core_v0.18 the blocks of a gated DeltaNet. Source: Megatron-LM core_v0.9.0 to core_v0.19.0,
core/transformer/fsdp_dtensor_checkpoint.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ...model.layers import Layer
from ...model.slots import DECODER, Ref, Slot
from ...model.spec import ModelSpec
from .names import DISTRIBUTED, DISTRIBUTED_EXPERTS, DISTRIBUTED_LOCAL, GATE_AND_UP, keys, name_of, split_parts
from .shared_tensors import member_of


@dataclass(frozen=True)
class Slice:
    """Part of a slot: tensor `key` at `index` of its first axes, which have the sizes `axes`; row 0 is the slot's `first_row`.

    It has `rows` rows, 0 for all of the slot; those before and beyond the slot's belong to others. `uncut` is whether the tensor
    has its blocks one after the other only if no tensor parallelism cut them.
    """

    key: str
    index: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()
    first_row: int = 0
    rows: int = 0
    uncut: bool = False


def choices(ref: Ref, spec: ModelSpec) -> Iterator[tuple[Slice, ...]]:
    """Alternative ways in which the `torch_dist` format may store a ref, each as the parts that make it up."""
    expert, experts = ((), ()) if ref.expert is None else ((ref.expert,), (spec.num_experts,))
    for template in _templates(ref.slot, ref.kind(spec), ref.stack):
        if ref.layer is None:
            yield (Slice(template),)
            continue
        own = template.format(layer=ref.layer)
        parts = split_parts(ref.slot, ref.kind(spec), spec)
        if parts:
            yield tuple(Slice(own + part.suffix, (), (), part.first_row, part.rows) for part in parts)
            continue
        if ref.stack == DECODER:
            yield (Slice(template.replace("{layer}.", ""), (ref.layer, *expert), (spec.num_layers, *experts)),)
        yield (Slice(own, expert, experts),)
        own_expert = own.replace(DISTRIBUTED_EXPERTS, f"{DISTRIBUTED_EXPERTS}{ref.expert}.")
        if _is_gated(ref, spec):
            yield _gate_and_up(own_expert, ref, spec)
        elif own_expert != own:
            yield (Slice(own_expert),)


def module_choices(ref: Ref, spec: ModelSpec) -> Iterator[tuple[Slice, ...]]:
    """Alternative ways in which the formats `torch_dcp` and `fsdp_dtensor` may store a ref."""
    for template in keys(ref.slot.name, ref.kind(spec), ref.stack):
        key = template.format(layer=ref.layer, expert=ref.expert, global_expert=ref.expert)
        blocks = ref.slot.size(spec, ref.kind(spec)).blocks if ref.layer is not None else ()
        member = member_of(key, ref, ref.shape(spec), spec, spec.num_experts)
        if member is not None and isinstance(member.parts, tuple):
            row = member.start // math.prod(member.shape[1:])
            yield (Slice(key, first_row=-row, rows=member.shape[0], uncut=True),)
            continue
        yield (Slice(key, uncut=len(blocks) > 1),)
        if ref.layer is not None and _is_gated(ref, spec):
            yield _gate_and_up(key, ref, spec)
        parts = split_parts(ref.slot, ref.kind(spec), spec) if ref.layer is not None else ()
        if parts:
            yield tuple(Slice(key + part.suffix, first_row=part.first_row, rows=part.rows) for part in parts)


def _is_gated(ref: Ref, spec: ModelSpec) -> bool:
    """Whether a slot consists of as many blocks as gate and up are."""
    return len(ref.slot.size(spec, ref.kind(spec)).blocks) == len(GATE_AND_UP)


def _gate_and_up(key: str, ref: Ref, spec: ModelSpec) -> tuple[Slice, ...]:
    rows = ref.slot.size(spec, ref.kind(spec)).blocks[0].rows
    return tuple(Slice(key + suffix, first_row=rows * block, rows=rows) for block, suffix in enumerate(GATE_AND_UP))


@lru_cache(maxsize=1024)
def _templates(slot: Slot, kind: Layer, stack: str) -> tuple[str, ...]:
    """Key templates of a slot, of either implementation."""
    return tuple(dict.fromkeys(name_of(table, slot.name, kind, stack) for table in (DISTRIBUTED, DISTRIBUTED_LOCAL)))

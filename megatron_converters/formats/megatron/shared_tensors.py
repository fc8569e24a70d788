"""Tensors of a rank that several refs share: experts in one tensor, and the down projections of latents in one.

Source: Megatron-LM core_v0.19.0, `_split_grouped_checkpoint_tensor` in core/extensions/transformer_engine.py for single grouped
experts, `FusedMLASelfAttention` in core/transformer/multi_latent_attention.py for down projections; core_v0.9.0, `GroupedMLP` in
core/transformer/moe/experts.py for stacked experts.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import NamedTuple

from ...model.slots import SLOTS, Ref, Shard
from ...model.spec import ModelSpec
from ...storage.tensor import StoredTensor, contiguous_strides
from .names import DOWN_PROJECTION, DOWN_PROJECTIONS, EXPERTS
from .options import SINGLE, STACKED


def _ends(layout: str) -> tuple[str, ...]:
    """Last parts of the keys of a layout of experts, which name no expert."""
    return tuple(name.rpartition("}")[2] for name in EXPERTS[layout].values())


#: Last parts of the keys of experts that are stored in one tensor.
STACKED_SUFFIXES, SINGLE_SUFFIXES = _ends(STACKED), _ends(SINGLE)
_DOWN_SUFFIX = DOWN_PROJECTION.rpartition("}")[2]


class Member(NamedTuple):
    """Place of a ref's share in a tensor of the rank, which has the shape `shape`; `start` counts elements.

    `parts` is the number of members if they are equally large, else the elements of each. Where `transposed`, the tensor holds the
    transposed share.
    """

    shape: tuple[int, ...]
    start: int
    parts: int | tuple[int, ...]
    transposed: bool = False


def member_of(key: str, ref: Ref, shape: tuple[int, ...], spec: ModelSpec, experts: int) -> Member | None:
    """Place of a share of this shape in the tensor `key`; None if the tensor is the share. `experts` counts those of a rank."""
    if ref.expert is not None and key.endswith(STACKED_SUFFIXES):
        rows, cols = shape
        whole = (cols, experts * rows) if ref.slot.shard is Shard.COLUMN else (experts * cols, rows)
        return Member(whole, ref.expert % experts * rows * cols, experts, transposed=True)
    if ref.expert is not None and key.endswith(SINGLE_SUFFIXES):
        return Member((experts, *shape), ref.expert % experts * math.prod(shape), experts)
    if key.endswith(_DOWN_SUFFIX):
        return _down_projection(ref, shape, spec)
    return None


def _down_projection(ref: Ref, shape: tuple[int, ...], spec: ModelSpec) -> Member:
    """Place in the down projections of latents: each rank has its rows of queries above those of keys and values."""
    ways, kind = ref.shape(spec)[0] // shape[0], ref.kind(spec)
    rows = {name: SLOTS[name].size(spec, kind).rows // ways for name in DOWN_PROJECTIONS}
    starts = dict(zip(rows, accumulate(rows.values(), initial=0), strict=False))
    width = math.prod(shape[1:])
    sizes = tuple(count * width for count in rows.values())
    return Member((sum(rows.values()), *shape[1:]), starts[ref.slot.name] * width, sizes)


def view_of(data: StoredTensor, member: Member, shape: tuple[int, ...]) -> StoredTensor:
    """View of one share, of this shape, in a tensor; a tensor of another size is returned itself, so that its shape is reported."""
    if math.prod(data.shape) != math.prod(member.shape) or data.strides != contiguous_strides(data.shape):
        return data
    offset = data.offset + member.start * data.dtype.itemsize
    strides = (1, shape[0]) if member.transposed else contiguous_strides(shape)
    return StoredTensor(data.path, offset, data.dtype, shape, strides)

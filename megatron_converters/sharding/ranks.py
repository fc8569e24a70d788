"""Tensor and pipeline parallelism as arithmetic: which rank holds which rows, columns and layers.

Sources: Megatron-LM core_v0.16.1, `vocab_size_with_padding` (training/tokenizer), `get_checkpoint_name`
(training/checkpointing.py).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from ..basics.errors import ConversionError, UsageError
from ..model.extents import Extent
from ..model.layers import BlockExperts, Layer, Mixture, Mlp
from ..model.layouts import RowMap, interned
from ..model.slots import MTP, SLOTS, Ref, Scope, Shard, Slot
from ..model.spec import ModelSpec
from .stages import EVEN, PipelineSplit, alternatives, stage_layers


class Rank(NamedTuple):
    """A rank's numbers in the tensor-, pipeline-, expert- and expert-tensor-parallel groups."""

    tp: int
    pp: int
    ep: int = 0
    etp: int = 0


@dataclass(frozen=True)
class Parallel:
    """Sizes of the parallel groups and the layers of each pipeline stage, in the model's order.

    With `vpp` virtual stages on each pipeline rank, rank p holds the stages p, p + pp, p + 2 pp, …: one model for each.
    """

    tp: int
    stages: tuple[int, ...]
    split: PipelineSplit = EVEN
    ep: int = 1
    etp: int = 1
    vpp: int = 1

    @property
    def pp(self) -> int:
        """Pipeline-parallel size."""
        return len(self.stages) // self.vpp

    @property
    def entries(self) -> tuple[str, ...]:
        """Entries of a rank's file that hold its models, in the order of its stages."""
        return ("model",) if self.vpp == 1 else tuple(f"model{number}" for number in range(self.vpp))

    def prefix(self, stage: int) -> str:
        """Prefix that distinguishes a tensor of this stage from one with the same key in another model of its rank."""
        return "" if self.vpp == 1 else f"{self.entries[stage // self.pp]}."

    def place(self, layer: int) -> tuple[int, int]:
        """Stage of a layer, and the layer's number on it."""
        stage = bisect_right(self._ends, layer)
        if stage == len(self.stages):
            raise ConversionError(f"layer {layer} is beyond the {sum(self.stages)} layers of the model")
        return stage, layer - self._ends[stage] + self.stages[stage]

    @cached_property
    def _ends(self) -> list[int]:
        """Number of layers up to the end of each stage."""
        return list(accumulate(self.stages))

    def ranks(self, stage: int) -> tuple[Rank, ...]:
        """The ranks of a stage that have a file: one for each pair of tensor- and expert-parallel numbers that occurs.

        Source: Megatron-LM core_v0.16.1, `RankGenerator` in core/parallel_state.py and `get_checkpoint_name`.
        """
        count = math.lcm(self.tp, self.etp * self.ep)
        pp = stage % self.pp
        found = [Rank(r % self.tp, pp, r // self.etp % self.ep, r % self.etp) for r in range(count)]
        return tuple(dict.fromkeys(found))

    def directory(self, rank: Rank) -> str:
        """Directory name of a rank. With one pipeline stage, the last number is the expert-parallel one."""
        pp = "" if self.pp == 1 else f"_{rank.pp:03d}"
        ep = "" if self.ep == 1 else f"_{rank.ep:03d}"
        return f"mp_rank_{rank.tp:02d}{pp}{ep}"

    def holds(self, rank: Rank, expert: int | None, experts: int) -> bool:
        """Whether a rank holds an expert, or a tensor that belongs to none."""
        return expert is None or expert // (experts // self.ep) == rank.ep

    def local_expert(self, expert: int | None, experts: int) -> int | None:
        """An expert's number on the rank that holds it."""
        return None if expert is None else expert % (experts // self.ep)

    def ways(self, slot: Slot, rank: Rank) -> tuple[int, int]:
        """Number of shares that a slot is cut into, if it is, and the number of a rank's share."""
        return (self.etp, rank.etp) if slot.expert else (self.tp, rank.tp)


def locations(ref: Ref, spec: ModelSpec, parallel: Parallel) -> Iterator[tuple[int, str, int | None]]:
    """Stage, slot name and local layer number of each place that holds a ref.

    Tied embeddings are also the output layer of the last stage, where layers of multi-token prediction need them, too.
    """
    last = len(parallel.stages) - 1
    if ref.stack == MTP:
        yield last, ref.slot.name, ref.layer
    elif ref.layer is not None:
        stage, local = parallel.place(ref.layer)
        yield stage, ref.slot.name, local
    elif ref.slot.scope is Scope.FIRST:
        yield 0, ref.slot.name, None
        if spec.mtp and last > 0:
            yield last, ref.slot.name, None
        if ref.slot.vocab and spec.tied and last > 0:
            yield last, "output_layer", None
    else:
        yield last, ref.slot.name, None


def parallel_for(
    spec: ModelSpec,
    tp: int,
    pp: int,
    split: PipelineSplit = EVEN,
    ep: int = 1,
    etp: int | None = None,
    *,
    directories: bool = True,
) -> Parallel:
    """Check that these sizes can cut this model and return the cut; the error names the sizes that can.

    `etp` None means `tp`, or 1 for experts that cannot be cut. With `directories`, each rank needs an `mp_rank_*` directory of its
    own.
    """
    if tp < 1 or pp < 1:
        raise ConversionError(f"tensor- and pipeline-parallel sizes must be at least 1, not {tp} and {pp}")
    cuttable = _cuttable(spec)
    if not _tp_fits(cuttable, tp):
        most = min(extent.units or extent.rest[0] for shard, extent in cuttable if shard is Shard.ROW)
        fitting = [size for size in range(1, most + 1) if _tp_fits(cuttable, size)]
        raise ConversionError(
            f"{' and '.join(_sizes(spec))} cannot be cut over tp={tp}; use tp {alternatives(fitting)}"
        )
    stages = stage_layers(spec.num_layers, pp, split)
    vpp = len(stages) // pp
    if not spec.num_experts:
        if ep != 1:
            raise UsageError(f"--target-expert-parallel-size {ep}: a dense model has no experts to spread; use 1")
        if etp not in (None, 1, tp):
            raise UsageError(f"--target-expert-tensor-parallel-size {etp}: a dense model has no experts to cut; use 1")
        return Parallel(tp, stages, split, etp=tp, vpp=vpp)
    if etp is None:
        etp = 1 if has_whole_experts(spec) else tp
    return _with_experts(spec, Parallel(tp, stages, split, ep, etp, vpp), directories)


def has_whole_experts(spec: ModelSpec) -> bool:
    """Whether experts cannot be cut: Megatron-LM (0.15 on) has biases only in experts that are whole (`TransformerConfig`)."""
    return any(isinstance(kind.feed, Mixture) and kind.feed.mlp_bias for kind in spec.used)


def _with_experts(spec: ModelSpec, parallel: Parallel, directories: bool) -> Parallel:
    experts, ep, etp = spec.num_experts, parallel.ep, parallel.etp
    if ep < 1 or etp < 1 or experts % ep:
        fitting = [size for size in range(1, experts + 1) if experts % size == 0]
        raise ConversionError(f"{experts} experts cannot be spread over ep={ep}; use ep {alternatives(fitting)}")
    for size in {kind.feed.moe_ffn_hidden_size for kind in spec.used if isinstance(kind.feed, Mixture)}:
        if size % etp:
            raise ConversionError(f"experts with an MLP of {size} cannot be cut over etp={etp}")
    if etp != 1 and has_whole_experts(spec):
        raise ConversionError(
            f"experts with biases cannot be cut over etp={etp}, since Megatron-LM has such experts whole on each rank alone; use "
            "etp 1"
        )
    if directories and not _own_directories(parallel):
        raise ConversionError(
            f"tp={parallel.tp} and ep={ep} with etp={etp}: several ranks would share one mp_rank_* directory, whose name has "
            "no expert-tensor number; use an etp that divides tp"
        )
    return parallel


def _own_directories(parallel: Parallel) -> bool:
    """Whether no two ranks that hold different shares have one `mp_rank_*` directory."""
    ranks = parallel.ranks(0)
    return len({(rank.tp, rank.ep) for rank in ranks}) == len(ranks)


def kept_etp(source: Parallel | None, tp: int, ep: int) -> int | None:
    """Expert-tensor-parallel size to keep from the source, if these sizes allow it; else None, which means `tp`.

    A size equal to the source's `tp` is Megatron-LM's default and is not kept: it follows the new `tp`.
    """
    if source is None or source.etp == source.tp or not _own_directories(Parallel(tp, (0,), ep=ep, etp=source.etp)):
        return None
    return source.etp


def _cuttable(spec: ModelSpec) -> list[tuple[Shard, Extent]]:
    """Sizes of all slots that tensor parallelism cuts; vocabularies are padded and always fit."""
    slots = [slot for slot in SLOTS.values() if slot.shard.cuts and not slot.expert and not slot.vocab]
    found = {
        (slot.shard, extent): None
        for kind in spec.used
        for slot in slots
        if (slot.scope is not Scope.MTP or spec.mtp) and (extent := slot.extent(spec, kind)) is not None
    }
    return list(found)


def _tp_fits(cuttable: Sequence[tuple[Shard, Extent]], tp: int) -> bool:
    # A shared unit may be cut: megatron-core from 0.16 on gathers the query groups that a rank lacks at run time.
    return all(
        (extent.units or extent.rest[0]) % tp == 0
        if shard is Shard.ROW
        else all(block.fits(tp) for block in extent.blocks)
        for shard, extent in cuttable
    )


def _sizes(spec: ModelSpec) -> Iterable[str]:
    """Sizes in words of what tensor parallelism cuts."""
    mixers = [kind.mixer.sizes for kind in spec.used]
    dense = [kind.feed.sizes for kind in spec.used if isinstance(kind.feed, (Mlp, BlockExperts))]
    mixtures = [kind.feed for kind in spec.used if isinstance(kind.feed, Mixture)]
    shared = [f"shared experts of {size}" for feed in mixtures if (size := feed.shared_ffn_hidden_size)]
    return dict.fromkeys((*mixers, *dense, *shared))


def padded_vocab(vocab: int, divisor: int, tp: int) -> int:
    """Rows of the embedding after Megatron's padding: the next multiple of `divisor * tp`."""
    multiple = divisor * tp
    return -(-vocab // multiple) * multiple


@dataclass(frozen=True, eq=False)
class Cut:
    """Share of a slot on one rank: its shape, the slot row of each of its rows, and its first column.

    The last `padding` rows are vocabulary padding; `rows` is -1 there.
    """

    shape: tuple[int, ...]
    rows: RowMap
    col: int
    padding: int = 0


def cut(
    slot: Slot, spec: ModelSpec, layer: Layer, ways: int, index: int, padded: int, shard: Shard | None = None
) -> Cut:
    """Share number `index` of a slot that is cut `ways` ways. `padded` counts embedding rows with padding.

    `shard` is the dimension to cut, where it is not the slot's own.
    """
    return _cut(slot, slot.size(spec, layer), ways, index, padded, shard or slot.shard)


@lru_cache(maxsize=4096)
def _cut(slot: Slot, extent: Extent, ways: int, index: int, padded: int, shard: Shard) -> Cut:
    """As `cut`; cached, so that equal maps are one object."""
    rows, rest = extent.rows, extent.rest
    if shard is Shard.ROW:
        width = _share_size(slot, rest[0], ways)
        return Cut((rows, width), _all_rows(rows), index * width)
    if shard is Shard.REPLICATED:
        return Cut((rows, *rest), _all_rows(rows), 0)
    ranges = _row_ranges(slot, extent, ways, index, padded)
    row_map = np.concatenate([np.arange(start, start + count, dtype=np.int64) for start, count in ranges])
    row_map[row_map >= rows] = -1
    row_map.flags.writeable = False  # cached, so shared by all callers
    return Cut((row_map.size, *rest), row_map, 0, int(np.count_nonzero(row_map < 0)))


@lru_cache(maxsize=256)
def _all_rows(rows: int) -> RowMap:
    return interned(np.arange(rows, dtype=np.int64))


def boxes(slot: Slot, extent: Extent, ways: int, index: int, padded: int) -> tuple[tuple[int, int, int, int], ...]:
    """Share of a rank as boxes of the whole tensor, padding included: (first row, rows, first column, columns) of each."""
    rows, cols = extent.rows, math.prod(extent.rest)
    if slot.shard is Shard.ROW:
        width = _share_size(slot, cols, ways)
        return ((0, rows, index * width, width),)
    if slot.shard is Shard.REPLICATED:
        return ((0, rows, 0, cols),)
    return tuple((start, count, 0, cols) for start, count in _row_ranges(slot, extent, ways, index, padded))


def _row_ranges(slot: Slot, extent: Extent, ways: int, index: int, padded: int) -> list[tuple[int, int]]:
    """First row and number of rows of a share, for each block."""
    sizes = [padded] if slot.vocab else [block.rows for block in extent.blocks]
    shares = [_share_size(slot, size, ways) for size in sizes]
    starts = [0, *accumulate(sizes)]
    return [(start + index * share, share) for start, share in zip(starts, shares, strict=False)]


def _share_size(slot: Slot, size: int, ways: int) -> int:
    if size % ways:
        raise ConversionError(
            f"{slot.name}: {size} cannot be cut {ways} ways; choose a tensor-parallel size that divides it"
        )
    return size // ways

"""Target for Megatron-LM checkpoints of the `torch_dist` format: whole tensors in chunks, filled in place.

A chunk is what one rank of the requested parallel sizes holds, so that a run of these sizes reads only what it needs; a run of any
other sizes can load it too. Format: see torch_dist_source.py. Layers are an axis if all are of one kind, as in Megatron-LM.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...basics.dtypes import DType
from ...basics.errors import ConversionError, UsageError
from ...basics.quantities import count
from ...conversion.outline import Fill
from ...model.extents import Extent
from ...model.layouts import RowMap, interned
from ...model.slots import DECODER, MTP, Ref, Slot, refs
from ...sharding.placement import Placement, Share
from ...sharding.ranks import Rank, boxes
from ...storage import dcp_layout, marks, torch_zip
from ...storage.dcp_layout import NewChunk, NewObject, Placed
from ...storage.output_file import FileLayout
from ...storage.tensor import StoredTensor
from .locating import COMMON_FILE, FORMAT_FILE
from .names import (
    DISTRIBUTED,
    DISTRIBUTED_EXPERTS,
    DISTRIBUTED_LOCAL,
    EXTRA_STATE_SUFFIX,
    SplitPart,
    distributed_extra_state,
    name_of,
    split_parts,
    stacks_layers,
)
from .options import TORCH_DIST
from .writing import CheckpointTarget, sizes

#: Keys of slots by implementation.
_NAMES = {"local": DISTRIBUTED_LOCAL, "transformer_engine": DISTRIBUTED}
#: Content of `FORMAT_FILE`.
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
#: Megatron-LM's record of how it names keys (0.14 on, training/checkpointing.py).
_CONTENT_METADATA = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
_FINAL_NORM = "decoder.final_layernorm"
#: Part of a slot that is stored whole.
_WHOLE = SplitPart("", 0, 0)
#: Maximum bytes of tensors in a file with several; a rank can have several files, which threads or processes fill in parallel.
_FILE_BYTES = 1 << 30


class _Box(NamedTuple):
    """Share of a slot as one box: number of the rank that writes it, first row and column in the slot, shape, and row map.

    `padding` counts the rows at the end that are vocabulary padding; `rows` has the slot's row of each row of the box. `block` is
    the number of the slot's block that it belongs to.
    """

    rank: int
    row: int
    col: int
    shape: tuple[int, ...]
    rows: RowMap
    padding: int
    block: int


class TorchDistTarget(CheckpointTarget):
    """Checkpoint of the `torch_dist` format."""

    format = TORCH_DIST
    directories = False

    def _lay_out(self) -> tuple[dict[str, FileLayout], dict[str, dict[str, StoredTensor]]]:
        ranks = (rank for stage in range(self._parallel.pp) for rank in self._parallel.ranks(stage))
        self._numbers = {rank: number for number, rank in enumerate(ranks)}
        self._placement = Placement(self._spec, self._parallel, self._padded)
        self._boxes: dict[tuple[Slot, int, Rank], tuple[_Box, ...]] = {}
        self._addresses: dict[tuple[Slot, int, str], str] = {}
        self._stacked = stacks_layers(self._spec)
        files: dict[str, FileLayout] = {}
        placed: list[Placed] = []
        for rank, items in sorted(self._items().items()):
            for number, part in enumerate(_by_size(items)):
                name = f"__{rank}_{number}.distcp"
                files[name], entries = dcp_layout.lay_out(name, part)
                placed += entries
        self._files = {entry.item.name: entry.file for entry in placed if isinstance(entry.item, NewChunk)}
        self._chunks = [entry.item for entry in placed if isinstance(entry.item, NewChunk)]
        common = {**self._tree({}), "content_metadata": dict(_CONTENT_METADATA)}
        files[COMMON_FILE] = torch_zip.layout(COMMON_FILE, common)
        files[marks.METADATA] = dcp_layout.index(placed)
        return files, {}

    def _choose_bins(self) -> None:
        if self._options.load_capacity_bins or self._expert_layout == "dynamic":
            raise UsageError(
                "Habana's experts and capacity bins have no place in a torch_dist checkpoint; use --ckpt-format torch"
            )

    def assets(self, folder: Path) -> None:
        """Write the flags that training needs, and the description of the format."""
        super().assets(folder)
        (folder / FORMAT_FILE).write_text(json.dumps(FORMAT), encoding="utf-8")

    def fills(self, ref: Ref) -> Iterator[Fill]:
        """Fills of a ref, one per chunk."""
        for box, chunk in self._chunks_of(ref):
            name = chunk.name
            fill = Fill(self._files[name], name, chunk.dtype, box.shape, box.rows, box.col, padding=box.padding)
            yield self._conventions.fill(ref, fill)

    def _loading_notes(self) -> Iterator[str]:
        rows = self._padded
        other = next(size for size in itertools.count(3) if rows % size)
        yield (
            f"loads at any tensor-parallel size that divides the {rows} rows of the padded vocabulary, a number that Megatron-LM "
            f"takes from the args; for another, such as {other}, write with --pad-vocab-for-tp {other}"
        )

    def _items(self) -> dict[int, list[NewChunk | NewObject]]:
        """Chunks and objects that each rank writes, by rank number."""
        items: dict[int, list[NewChunk | NewObject]] = {}
        dtypes: dict[str, DType] = {}
        for ref in refs(self._spec):
            for box, chunk in self._chunks_of(ref):
                items.setdefault(box.rank, []).append(chunk)
                if dtypes.setdefault(chunk.key, chunk.dtype) != chunk.dtype:
                    raise ConversionError(
                        f"{ref} is {chunk.dtype}, but others in {chunk.key} are {dtypes[chunk.key]}; choose one dtype for all"
                    )
        last = len(self._parallel.stages) - 1
        for stack, order in ((DECODER, self._spec.order), (MTP, self._spec.mtp)):
            for layer in range(len(order)):
                stage = self._parallel.place(layer)[0] if stack == DECODER else last
                objects = items.setdefault(self._writer(stage), [])
                objects += map(NewObject, self._extra_state(layer, stack))
        items[self._writer(last)].append(NewObject(f"{_FINAL_NORM}.{EXTRA_STATE_SUFFIX}/shard_0_1"))
        return items

    def _chunks_of(self, ref: Ref) -> Iterator[tuple[_Box, NewChunk]]:
        """Chunks of a ref with their boxes: each share once, from the first rank that holds it."""
        spec, slot, dtype = self._spec, ref.slot, self._dtype_of(ref)
        key, index, axes = self._address(self._template(ref), ref.layer, ref.expert, ref.stack)
        rows, *rest = ref.shape(spec)
        shape, ones = (*axes, self._padded if slot.vocab else rows, *rest), (1,) * len(index)
        parts = split_parts(slot, ref.kind(spec), spec)
        for box in self._boxes_of(ref, self._placement.shares(ref)):
            part = parts[box.block] if parts else _WHOLE
            whole = (*axes, part.rows, *rest) if parts else shape
            offsets = (*index, box.row - part.first_row, box.col, *(0 for _ in rest[1:]))[: len(whole)]
            yield box, NewChunk(key + part.suffix, whole, dtype, offsets, ones + box.shape)

    def _template(self, ref: Ref) -> str:
        """Key template of a ref."""
        number = ref.kind_number(self._spec)
        key = ref.slot, number, ref.stack
        if key not in self._addresses:
            table = _NAMES[self._impl]
            self._addresses[key] = name_of(table, ref.slot.name, self._spec.kinds[number], ref.stack)
        return self._addresses[key]

    def _boxes_of(self, ref: Ref, shares: tuple[Share, ...]) -> tuple[_Box, ...]:
        """Boxes of a ref's shares, each once; cached for all layers of a kind and experts on the same ranks."""
        key = ref.slot, ref.kind_number(self._spec), shares[0].rank
        if key not in self._boxes:
            first_of: dict[int, Rank] = {}
            for share in shares:
                first_of.setdefault(share.number, share.rank)
            extent = ref.slot.size(self._spec, ref.kind(self._spec))
            self._boxes[key] = tuple(box for rank in first_of.values() for box in self._cut(ref.slot, extent, rank))
        return self._boxes[key]

    def _cut(self, slot: Slot, extent: Extent, rank: Rank) -> Iterator[_Box]:
        """Boxes of one rank's share of a slot."""
        ways, number = self._parallel.ways(slot, rank)
        for block, (row, height, col, width) in enumerate(boxes(slot, extent, ways, number, self._padded)):
            limit = self._spec.vocab_size if slot.vocab else row + height
            padding = min(max(row + height - limit, 0), height)
            rest = extent.rest if width == math.prod(extent.rest) else (width,)
            yield _Box(self._numbers[rank], row, col, (height, *rest), _rows(row, height, limit), padding, block)

    def _address(
        self, template: str, layer: int | None, expert: int | None, stack: str
    ) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """Key of a layer's tensor or object, its index on the first axes, and the sizes of these axes."""
        spec = self._spec
        expert_index, experts = ((), ()) if expert is None else ((expert,), (spec.num_experts,))
        if layer is None or not self._stacked or stack != DECODER:
            return template.format(layer=layer), expert_index, experts
        return template.replace("{layer}.", ""), (layer, *expert_index), (spec.num_layers, *experts)

    def _extra_state(self, layer: int, stack: str) -> Iterator[str]:
        """Names of the `_extra_state` objects of a layer."""
        spec = self._spec
        kind = spec.kinds[(spec.order if stack == DECODER else spec.mtp)[layer]]
        for module in distributed_extra_state(spec, kind, stack):
            for expert in range(spec.num_experts) if DISTRIBUTED_EXPERTS in module else (None,):
                key, index, axes = self._address(module, layer, expert, stack)
                position, size = (".".join(map(str, numbers)) for numbers in (index or (0,), axes or (1,)))
                yield f"{key}.{EXTRA_STATE_SUFFIX}/shard_{position}_{size}"

    def _writer(self, stage: int) -> int:
        """Number of the rank that writes the objects of a stage."""
        return self._numbers[self._parallel.ranks(stage)[0]]

    def _summary(self) -> str:
        keys, files = {chunk.key for chunk in self._chunks}, set(self._files.values())
        return (
            f"{count(len(keys), 'tensor')} in {count(len(self._chunks), 'chunk')} and {count(len(files), 'file')}, "
            f"cut for {sizes(self._parallel)},"
        )


def _by_size(items: Sequence[NewChunk | NewObject]) -> Iterator[list[NewChunk | NewObject]]:
    """Split the items of a rank into files of at most `_FILE_BYTES` of tensors, except for a single larger one."""
    part: list[NewChunk | NewObject] = []
    filled = 0
    for item in items:
        nbytes = math.prod(item.sizes) * item.dtype.itemsize if isinstance(item, NewChunk) else 0
        if part and filled + nbytes > _FILE_BYTES:
            yield part
            part, filled = [], 0
        part.append(item)
        filled += nbytes
    if part:
        yield part


@lru_cache(maxsize=512)
def _rows(first: int, count: int, limit: int) -> RowMap:
    """Row map of the slot's rows from `first` on; from `limit` on, row `limit` - 1 repeats. Equal maps are the same object."""
    return interned(np.minimum(np.arange(first, first + count, dtype=np.int64), limit - 1))

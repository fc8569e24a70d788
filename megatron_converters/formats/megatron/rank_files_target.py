"""Target for Megatron-LM checkpoints of the `torch` format: one `mp_rank_*/model_optim_rng.pt` per rank, filled in place.

Format: Megatron-LM core_v0.17.1, training/checkpointing.py, and the files that it writes.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ...basics.errors import ConversionError
from ...basics.quantities import count
from ...conversion.outline import Fill
from ...model.layouts import RowMap
from ...model.slots import DECODER, MTP, Ref, refs
from ...sharding.ranks import Cut, Rank
from ...storage import torch_zip
from ...storage.output_file import FileLayout
from ...storage.tensor import StoredTensor
from .conventions import CUT_DOWN_PROJECTIONS, MTP_MODEL_LAYER, WHOLE_DOWN_PROJECTIONS
from .locating import RANK_FILE
from .names import EXTRA_STATE_SUFFIX, LAST_EXTRA_STATE, MTP_MODULES, extra_state
from .options import FUSED, TORCH
from .rank_tensors import Place, RankTensors
from .releases import previous
from .writing import CheckpointTarget, sizes


class _Stored(NamedTuple):
    """Tensor of a rank's file, and its parts if several refs share it: their number if they are equally large, else their bytes."""

    tensor: torch_zip.NewTensor
    parts: int | tuple[int, ...]


#: Tensors of a rank's file, by key.
_Group = dict[str, _Stored]


class MegatronTarget(CheckpointTarget):
    """Checkpoint of the `torch` format: one file per rank."""

    format = TORCH

    def _lay_out(self) -> tuple[dict[str, FileLayout], dict[str, dict[str, StoredTensor]]]:
        parallel = self._parallel
        self._rank_tensors = RankTensors(
            self._spec,
            parallel,
            self._padded,
            impl=self._impl,
            expert_layout=self._expert_layout,
            shards=self._conventions.shards,
            mtp_module=self._conventions.mtp_module,
            fused_down=self._mla_layout == FUSED,
        )
        ranks = [rank for stage in range(parallel.pp) for rank in parallel.ranks(stage)]
        self._files = {rank: self._file_of(rank) for rank in ranks}
        groups = self._groups(ranks)
        given = {rank: {} if self._bins is None else dict(self._bins.on_rank(rank, parallel)) for rank in ranks}
        layouts: dict[tuple[int, tuple[_Stored, ...]], FileLayout] = {}
        files = {}
        for rank in ranks:
            bins = {key: _Stored(_new(key, data.dtype, data.shape), 1) for key, data in given[rank].items()}
            stored = groups[rank.pp, rank.ep] | bins
            kind = rank.pp, tuple(stored.values())
            if kind not in layouts:  # ranks whose files have the same structure share a layout
                layouts[kind] = self._layout(rank, stored)
            files[self._files[rank]] = layouts[kind]
        self._tensors = sum(len(layout.regions) for layout in files.values())
        return files, {self._files[rank]: bins for rank, bins in given.items()}

    def fills(self, ref: Ref) -> Iterator[Fill]:
        """Fills of a ref: one per rank that holds a share of it."""
        dtype, usual = self._dtype_of(ref), self._conventions.is_usual(ref.slot)
        for place in self._rank_tensors.places(ref):
            key, member = place.whole_key, self._rank_tensors.member(place, ref)
            start, transposed = (0, False) if member is None else (member.start * dtype.itemsize, member.transposed)
            for rank, cut, _ in place.location.shares:
                rows = resolve_padding(cut, self._spec.vocab_size)
                fill = Fill(self._files[rank], key, dtype, cut.shape, rows, cut.col, start, transposed, cut.padding)
                yield fill if usual else self._conventions.fill(ref, fill)

    def _groups(self, ranks: Sequence[Rank]) -> dict[tuple[int, int], _Group]:
        """Tensors of a rank in the order of its layers, by pipeline and expert number, which determine them."""
        groups: dict[tuple[int, int], _Group] = {(rank.pp, rank.ep): {} for rank in ranks}
        for ref in refs(self._spec):
            for place in self._rank_tensors.places(ref):
                key, shares = place.whole_key, place.location.shares
                stored = self._stored(ref, place)
                for group in dict.fromkeys((share.rank.pp, share.rank.ep) for share in shares):
                    if groups[group].setdefault(key, stored) != stored:
                        raise ConversionError(
                            f"{ref} is {stored.tensor.dtype}, but others in {key} are not; choose one dtype for all"
                        )
        return groups

    def _stored(self, ref: Ref, place: Place) -> _Stored:
        """New tensor of a ref, or the one that it shares with others."""
        dtype, member = self._dtype_of(ref), self._rank_tensors.member(place, ref)
        if member is None:
            return _Stored(_new(place.whole_key, dtype, place.location.shares[0].cut.shape), 1)
        parts = member.parts
        if not isinstance(parts, int):
            parts = tuple(elements * dtype.itemsize for elements in parts)
        return _Stored(_new(place.whole_key, dtype, member.shape), parts)

    def _file_of(self, rank: Rank) -> str:
        """Path of a rank's file in the output folder."""
        return f"{self._parallel.directory(rank)}/{RANK_FILE}"

    def _content(self, models: Mapping[str, OrderedDict[str, Any]]) -> Any:
        """Content of the file of a rank that holds these models."""
        return self._tree(models)

    def _layout(self, rank: Rank, stored: Mapping[str, _Stored]) -> FileLayout:
        tensors = {key: entry.tensor for key, entry in stored.items()}
        parts = {key: entry.parts for key, entry in stored.items() if entry.parts != 1}
        content = self._content(self._models(rank.pp, tensors))
        return dataclasses.replace(torch_zip.layout(self._files[rank], content), parts=parts)

    def _models(self, pp: int, tensors: Mapping[str, torch_zip.NewTensor]) -> dict[str, OrderedDict[str, Any]]:
        """State dicts of a rank, one for each of its stages; the keys of `tensors` have the stage's prefix."""
        parallel = self._parallel
        models = {}
        for entry, stage in zip(parallel.entries, range(pp, len(parallel.stages), parallel.pp), strict=True):
            prefix = parallel.prefix(stage)
            own = [(key.removeprefix(prefix), tensor) for key, tensor in tensors.items() if key.startswith(prefix)]
            models[entry] = OrderedDict([*own, *dict.fromkeys(self._extra_state(stage)).items()])
        return models

    def _extra_state(self, stage: int) -> Iterator[str]:
        """Keys of the `_extra_state` entries of a stage."""
        parallel, spec, impl = self._parallel, self._spec, self._impl
        before = sum(parallel.stages[:stage])
        is_last = stage == len(parallel.stages) - 1
        stacks = [(DECODER, spec.order[before : before + parallel.stages[stage]]), (MTP, spec.mtp if is_last else ())]
        experts = spec.num_experts // parallel.ep
        for stack, order in stacks:
            for layer, number in enumerate(order):
                kind, module = spec.kinds[number], self._conventions.mtp_module
                fused = self._mla_layout == FUSED
                for owner in extra_state(
                    impl, self._expert_layout, spec, kind, experts, stack, module, fused_down=fused
                ):
                    yield f"{owner.format(layer=layer)}.{EXTRA_STATE_SUFFIX}"
        if is_last:
            yield from (f"{module}.{EXTRA_STATE_SUFFIX}" for module in LAST_EXTRA_STATE[impl])

    def _needed_releases(self) -> Iterator[str]:
        if self._spec.mtp and self._conventions.mtp_module == MTP_MODULES[0]:
            yield MTP_MODEL_LAYER
        if self._cuts_matter() and not self._shards_of_release:
            yield WHOLE_DOWN_PROJECTIONS

    def _newest_release(self) -> str:
        if self._cuts_matter() and self._shards_of_release:
            return previous(WHOLE_DOWN_PROJECTIONS)
        return previous(MTP_MODEL_LAYER) if self._spec.mtp and self._conventions.mtp_module != MTP_MODULES[0] else ""

    @property
    def _shards_of_release(self) -> bool:
        """Whether releases before `WHOLE_DOWN_PROJECTIONS` cut so, and no later one."""
        return bool(self._conventions.shards) and self._mla_layout != FUSED

    def _cuts_matter(self) -> bool:
        """Whether the model has tensors that releases cut differently, and is cut."""
        return self._parallel.tp > 1 and any(ref.slot.name in CUT_DOWN_PROJECTIONS for ref in refs(self._spec))

    def _summary(self) -> str:
        ranks = sum(len(self._parallel.ranks(stage)) for stage in range(self._parallel.pp))
        return (
            f"{count(self._tensors, 'tensor')} on {count(ranks, 'rank')} "
            f"({sizes(self._parallel)}, layers {'+'.join(map(str, self._parallel.stages))})"
        )


_new = torch_zip.NewTensor


def resolve_padding(cut: Cut, vocab: int) -> RowMap:
    """Slot row of each row of a cut; a padding row repeats the vocabulary's last row."""
    return _padded_rows(cut, vocab) if cut.padding else cut.rows


@lru_cache(maxsize=64)
def _padded_rows(cut: Cut, vocab: int) -> RowMap:
    """Rows of a cut with padding as in Megatron-LM's own converters, which repeat the vocabulary's last row."""
    return np.where(cut.rows < 0, vocab - 1, cut.rows)

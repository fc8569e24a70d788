"""What a folder holds, from its headers alone: parameters, bytes, files, and where each slot lies."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from ..assets.origin import Origin
from ..basics.dtypes import DType
from ..conversion.endpoint import Source
from ..families import FAMILIES
from ..formats.detect import HF, MEGATRON
from ..formats.huggingface.parts import HFNames
from ..formats.huggingface.target import FUSED, SEPARATE
from ..formats.megatron.names import DIALECTS, EXPERTS
from ..model.slots import Ref, refs
from ..model.spec import ModelSpec
from ..sharding.ranks import Parallel, Rank
from ..storage.tensor import StoredTensor

_EMBEDDINGS, _OUTPUT, _NORM, _EXPERT = "word_embeddings", "output_layer", "input_norm", "expert_fc1"


class Parameters(NamedTuple):
    """Elements of a model: all, and those that take part for one token."""

    total: int
    active: int


@dataclass(frozen=True)
class Holding:
    """A stored tensor, or the part of one, that holds some of a ref.

    `file` is the path within the folder and `name` the tensor's name there. `slot` is the ref's, but for a copy of tied
    embeddings under another name, which is the output layer's. `padding` counts the rows that belong to no slot. `copy` says
    whether the same elements lie elsewhere, too, and are read there.
    """

    file: str
    name: str
    ref: Ref
    slot: str
    dtype: DType
    shape: tuple[int, ...]
    padding: int
    copy: bool

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Survey:
    """A folder of the format `kind`: its model, its files by path with their bytes on the disk, and all that they hold."""

    kind: str
    spec: ModelSpec
    origin: Origin
    files: Mapping[str, int]
    holdings: tuple[Holding, ...]

    @cached_property
    def by_file(self) -> dict[str, list[Holding]]:
        """What each file with weights holds; the ranks of a pipeline stage stand together."""
        found: dict[str, list[Holding]] = {}
        for holding in self.holdings:
            found.setdefault(holding.file, []).append(holding)
        return {file: found[file] for file in sorted(found, key=lambda file: (self.stage(file), file))}

    @cached_property
    def ranks(self) -> dict[str, Rank]:
        """The rank that each file belongs to; nothing where files are not those of ranks."""
        parallel = self.origin.parallel
        if parallel is None:
            return {}
        folders = {parallel.directory(rank): rank for stage in range(parallel.pp) for rank in parallel.ranks(stage)}
        files = {holding.file for holding in self.holdings}
        return {file: folders[name] for file in files if (name := Path(file).parent.name) in folders}

    @property
    def cut(self) -> Parallel | None:
        """The parallel sizes where each rank has a file of its own; else None."""
        return self.origin.parallel if self.ranks else None

    @property
    def checkpoint_format(self) -> str | None:
        """Megatron-LM's name of a checkpoint's format: a file for each rank, or chunks; None for other folders."""
        return None if self.kind != MEGATRON else "torch" if self.ranks else "torch_dist"

    def stage(self, file: str) -> int:
        """The pipeline stage of a file; 0 where it belongs to no rank."""
        return self.ranks[file].pp if file in self.ranks else 0

    @cached_property
    def layers(self) -> dict[int, list[int]]:
        """The layers of each pipeline stage, counted over all stages; of rank `pp` where ranks have virtual stages."""
        found: dict[int, set[int]] = {}
        for file, holdings in self.by_file.items():
            layers = (holding.ref.layer for holding in holdings)
            found.setdefault(self.stage(file), set()).update(layer for layer in layers if layer is not None)
        return {stage: sorted(layers) for stage, layers in found.items()}

    @cached_property
    def padded_vocab(self) -> int:
        """Rows of the embeddings, padding included."""
        rows = (holding.padding for holding in self.holdings if holding.slot == _EMBEDDINGS and not holding.copy)
        return self.spec.vocab_size + sum(rows)

    @cached_property
    def names(self) -> str | None:
        """Whose names a Megatron-LM checkpoint's parameters have; None for other formats."""
        return self._table_of(self._first(_NORM), DIALECTS)

    @cached_property
    def expert_layout(self) -> str | None:
        """How experts are stored; None for a dense model."""
        first = self._first(_EXPERT)
        if first is not None and self.kind == HF:
            return (
                FUSED
                if first.name == HFNames(FAMILIES[self.spec.family], self.spec).fused_name(first.ref)
                else SEPARATE
            )
        return self._table_of(first, EXPERTS)

    def _first(self, slot: str) -> Holding | None:
        return next((holding for holding in self.holdings if holding.slot == slot), None)

    def _table_of(self, holding: Holding | None, tables: Mapping[str, Mapping[str, str]]) -> str | None:
        """The table that has a holding's name."""
        parallel = self.origin.parallel
        if parallel is None or holding is None or holding.ref.layer is None:
            return None
        ref = holding.ref
        stage, local = parallel.place(holding.ref.layer)
        stored = holding.name.removeprefix(parallel.prefix(stage))
        numbers: dict[str, Any] = {
            "layer": local,
            "expert": parallel.local_expert(ref.expert, self.spec.num_experts),
            "global_expert": ref.expert,
        }
        return next((name for name, table in tables.items() if table[ref.slot.name].format(**numbers) == stored), None)


def survey(kind: str, source: Source) -> Survey:
    """Look at an opened folder of the format `kind`; no weight is read."""
    files = {path: size for path, (size, *_) in (source.origin.identity or {}).items()}
    return Survey(kind, source.spec, source.origin, files, tuple(_holdings(source)))


def count_parameters(spec: ModelSpec) -> Parameters:
    """Elements of a model without padding, tied embeddings once; of its experts, a token uses `moe_router_topk`."""
    shared = experts = 0
    for ref in refs(spec):
        size = math.prod(ref.slot.shape(spec))
        if ref.slot.expert:
            experts += size
        else:
            shared += size
    active = experts * spec.moe_router_topk // spec.num_experts if spec.num_experts else 0
    return Parameters(shared + experts, shared + active)


def _holdings(source: Source) -> Iterator[Holding]:
    folder = source.origin.described
    for ref in refs(source.spec):
        found = source.read(ref)
        first = found.pieces[0].name.tensor
        for piece, copied in [
            *((piece, False) for piece in found.pieces),
            *((piece, True) for piece in found.replicas),
        ]:
            data = cast(StoredTensor, piece.data)  # a folder's tensors lie in files
            name = piece.name.tensor
            slot = _OUTPUT if copied and ref.slot.name == _EMBEDDINGS and name != first else ref.slot.name
            padding = int(np.count_nonzero(piece.rows < 0)) if ref.slot.vocab else 0
            yield Holding(os.path.relpath(data.path, folder), name, ref, slot, data.dtype, data.shape, padding, copied)

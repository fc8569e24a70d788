"""Inventory of a folder, from its headers alone: parameters, bytes, files, and which tensors hold each slot."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from ..assets.origin import Origin, folder_of
from ..basics.dtypes import DType
from ..conversion.composing import Piece
from ..conversion.endpoint import Source
from ..families import FAMILIES
from ..formats.huggingface.options import FUSED, SEPARATE
from ..formats.huggingface.parts import HFNames
from ..formats.kinds import HF, WEIGHTS
from ..formats.megatron.names import DIALECTS, EXPERTS, Name, name_of
from ..model.layers import Mixture
from ..model.slots import DECODER, Ref, refs
from ..model.spec import ModelSpec
from ..sharding.ranks import Parallel, Rank
from ..storage.tensor import StoredTensor

_EMBEDDINGS, _OUTPUT, _EXPERT = "word_embeddings", "output_layer", "expert_fc1"
#: Slots whose names tell the implementation, in the layers where they differ.
_NORMS = ("input_norm", "mlp_norm", "kv_latent_norm")


class Parameters(NamedTuple):
    """Element counts of a model: all, and those that one token uses."""

    total: int
    active: int


@dataclass(frozen=True)
class Holding:
    """Stored tensor, or part of one, that holds part of a ref.

    `file` is the path within the folder, `name` the tensor's name in that file. `slot` is the ref's slot, except for a copy of tied
    embeddings under another name, which counts as the output layer. `padding` counts the rows that belong to no slot. `copy` is
    true where another tensor stores the same elements and conversions read that one.
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
        """Bytes that it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Survey:
    """Inventory of a folder of format `kind`: its model, its files (path to bytes on disk), and all that they hold."""

    kind: str
    spec: ModelSpec
    origin: Origin
    files: Mapping[str, int]
    holdings: tuple[Holding, ...]

    @cached_property
    def by_file(self) -> dict[str, list[Holding]]:
        """Holdings of each file with weights, ordered by pipeline stage, then by path."""
        found: dict[str, list[Holding]] = {}
        for holding in self.holdings:
            found.setdefault(holding.file, []).append(holding)
        return {file: found[file] for file in sorted(found, key=lambda file: (self.stage(file), file))}

    @cached_property
    def ranks(self) -> dict[str, Rank]:
        """Rank of each file; empty where files do not belong to ranks."""
        parallel = self.origin.parallel
        if parallel is None:
            return {}
        folders = {parallel.directory(rank): rank for stage in range(parallel.pp) for rank in parallel.ranks(stage)}
        files = {holding.file for holding in self.holdings}
        return {file: folders[name] for file in files if (name := Path(file).parent.name) in folders}

    @property
    def cut(self) -> Parallel | None:
        """Parallel sizes if each rank has a file of its own, else None."""
        return self.origin.parallel if self.ranks else None

    def stage(self, file: str) -> int:
        """Pipeline stage of a file; 0 if it belongs to no rank."""
        return self.ranks[file].pp if file in self.ranks else 0

    @cached_property
    def layers(self) -> dict[int, list[int]]:
        """Layers of each pipeline stage, numbered over the whole model; with virtual stages, those of each pipeline rank."""
        found: dict[int, set[int]] = {}
        for file, holdings in self.by_file.items():
            layers = (holding.ref.layer for holding in holdings if holding.ref.stack == DECODER)
            found.setdefault(self.stage(file), set()).update(layer for layer in layers if layer is not None)
        return {stage: sorted(layers) for stage, layers in found.items()}

    @cached_property
    def padded_vocab(self) -> int:
        """Rows of the embeddings, padding included."""
        rows = (holding.padding for holding in self.holdings if holding.slot == _EMBEDDINGS and not holding.copy)
        return self.spec.vocab_size + sum(rows)

    @cached_property
    def names(self) -> str | None:
        """Key of `DIALECTS` whose names a Megatron-LM checkpoint uses; None for other formats."""
        local, engine = DIALECTS.values()
        differing = (
            holding
            for holding in self.holdings
            if holding.slot in _NORMS
            and name_of(local, holding.slot, kind := holding.ref.kind(self.spec), holding.ref.stack)
            != name_of(engine, holding.slot, kind, holding.ref.stack)
        )
        return self._matching_table(next(differing, None), DIALECTS)

    @cached_property
    def expert_layout(self) -> str | None:
        """Layout of the stored experts; None for a dense model."""
        first = self._first(_EXPERT)
        if first is not None and self.kind in (HF, WEIGHTS):
            family = FAMILIES[self.spec.family]
            fused = HFNames(family, self.spec).fused_name(first.ref)
            same_end = fused and first.name.rpartition(".")[2] == fused.rpartition(".")[2]  # prefixes may differ
            return FUSED if same_end or family.tensors[_EXPERT].stacked else SEPARATE
        return self._matching_table(first, EXPERTS)

    def _first(self, slot: str) -> Holding | None:
        return next((holding for holding in self.holdings if holding.slot == slot), None)

    def _matching_table(self, holding: Holding | None, tables: Mapping[str, Mapping[str, Name]]) -> str | None:
        """Key of the table that contains a holding's name; None if none does."""
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
        kind = ref.kind(self.spec)
        return next(
            (
                name
                for name, table in tables.items()
                if name_of(table, ref.slot.name, kind, ref.stack).format(**numbers) == stored
            ),
            None,
        )


def survey(kind: str, source: Source) -> Survey:
    """Inventory of an opened folder of format `kind`; reads no weights."""
    files = {path: size for path, (size, *_) in (source.origin.identity or {}).items()}
    return Survey(kind, source.spec, source.origin, files, tuple(_holdings(source)))


def count_parameters(spec: ModelSpec) -> Parameters:
    """Elements of a model without padding, tied embeddings once; of its experts, a token uses `moe_router_topk`."""
    shared = total = active = 0
    for ref in refs(spec):
        size = math.prod(ref.shape(spec))
        if ref.slot.expert:
            feed = cast(Mixture, ref.kind(spec).feed)
            total += size
            active += size * feed.moe_router_topk
        else:
            shared += size
    return Parameters(shared + total, shared + active // max(spec.num_experts, 1))


def _holdings(source: Source) -> Iterator[Holding]:
    folder = folder_of(source.origin.described)
    shown = cache(partial(os.path.relpath, start=folder))  # a few files hold many tensors
    for ref in refs(source.spec):
        sources = source.read(ref)
        first_name = sources.pieces[0].name.tensor
        for piece, is_copy in [
            *((piece, False) for piece in sources.pieces),
            *((piece, True) for piece in sources.replicas),
        ]:
            name = piece.name.tensor
            slot = _OUTPUT if is_copy and ref.slot.name == _EMBEDDINGS and name != first_name else ref.slot.name
            padding = int(np.count_nonzero(piece.rows < 0)) if ref.slot.vocab else 0
            for stored, data in _stored(piece).items():
                place = shown(data.path), stored, ref, slot
                yield Holding(*place, data.dtype, data.shape, padding if stored == name else 0, is_copy)


def _stored(piece: Piece) -> Mapping[str, StoredTensor]:
    """Stored tensors of a piece, by name: one, or those that it is decoded from."""
    if piece.reader is not None:
        return piece.reader.stored
    return {piece.name.tensor: cast(StoredTensor, piece.data)}  # the tensors of a folder are stored in files

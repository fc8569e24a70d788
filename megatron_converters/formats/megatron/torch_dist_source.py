"""Source for distributed Megatron-LM checkpoints: whole tensors in chunks, whatever ranks wrote them.

Gate lies above up in the whole tensor, not in each rank's part. Formats: see distributed_folder.py; keys: distributed_keys.py.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ...basics.dtypes import DType
from ...basics.errors import ConversionError
from ...conversion.composing import Piece, Sources, StoredName
from ...conversion.endpoint import with_main_dtype
from ...conversion.left_out import LeftOut
from ...conversion.matching import Matcher
from ...conversion.zero_bias import without_absent
from ...model.layouts import RowMap, interned
from ...model.slots import Ref, refs
from ...model.spec import ModelSpec
from ...sharding.ranks import Parallel, parallel_for
from ...storage import dcp, marks
from ...storage.dcp import Chunk, ChunkedTensor
from ...storage.embedded import EmbeddedTensors
from ...storage.tensor import StoredTensor
from . import training_state
from .conventions import conventions_of
from .describing import padding_note, spec_and_notes
from .distributed_folder import read_folder
from .distributed_keys import Slice, choices, module_choices
from .locating import RANK, checkpoint_directory, listing, reference_near
from .names import EMBEDDINGS, OUTPUT_BIAS
from .prediction import as_stored, stored_layers, without_prediction
from .reading import (
    AS_STORED,
    MegatronReadOptions,
    args_in,
    origin_of,
    parallel_of,
    supplemented,
)
from .run_config import RUN_CONFIG, Record, recorded_beside
from .wrapped_names import prefix_note


@dataclass
class _Chunks:
    """Chunks of one tensor by index of its first axes. `at` builds the table once; all indices must have the same length."""

    tensor: ChunkedTensor
    _by_index: dict[tuple[int, ...], list[Chunk]] = field(default_factory=dict)

    def at(self, index: tuple[int, ...]) -> Sequence[Chunk]:
        """Chunks that hold elements of the tensor at `index`."""
        if not self._by_index:
            for chunk in self.tensor.chunks:
                spans = [
                    range(chunk.offsets[axis], chunk.offsets[axis] + chunk.sizes[axis]) for axis in range(len(index))
                ]
                for position in itertools.product(*spans):
                    self._by_index.setdefault(position, []).append(chunk)
        return self._by_index.get(index, ())


class TorchDistSource:
    """Distributed checkpoint, with every tensor checked against its args; chunk files are opened when read."""

    def __init__(self, load_dir: Path, options: MegatronReadOptions = AS_STORED) -> None:
        self._dir = checkpoint_directory(load_dir, options.directory_name)
        self._left_out = LeftOut(options.ignore_tensors)
        self._folder = read_folder(self._dir, self._left_out)
        common = self._folder.common
        args, record = _args_of(self._dir, common, self._folder.common_file, options)
        embeddings = self._embeddings()
        #: Number of embedding rows, padding included.
        self.padded = embeddings.shape[0]
        content = common.get("content_metadata")
        #: Megatron-LM's own description of how it named the keys (0.13 on); empty if there is none.
        self.content: dict[str, Any] = content if isinstance(content, dict) else {}
        self.spec, notes = spec_and_notes(args, self.padded, embeddings.dtype, options, record)
        stored = stored_layers(self.weights)
        self.spec = as_stored(self.spec, stored, args, options, self._dir)
        biased = any(key.endswith(OUTPUT_BIAS) for key in self.weights)
        self.spec, bias_notes = without_absent(self.spec, stored=biased)
        self.conventions = conventions_of(vars(args), self.spec, options.mup)
        self._slices = self._match(args)
        self._chunks: dict[str, _Chunks] = {}
        self._archives = EmbeddedTensors()
        self.spec, dtype_notes = with_main_dtype(self.spec, self.dtype_of)
        notes += [*bias_notes, *self._left_out.notes, *dtype_notes]
        self.spec, left_out_notes = without_prediction(self.spec, options.without_mtp)
        parallel, size_notes = _recorded_sizes(args, self.spec, self._dir, record)
        index = self._folder.index
        notes += [
            *prefix_note(self._folder.wrapper),
            *left_out_notes,
            *padding_note(self.padded, self.spec),
            *training_state.note(index, common),
            *size_notes,
            *_rank_folders_note(self._dir),
        ]
        self.origin = origin_of(
            self._dir,
            args if record is None else record.margs,
            options,
            common.get("iteration"),
            [
                self._folder.common_file,
                self._dir / marks.METADATA,
                *index.files,
                *([] if record is None else [record.path]),
            ],
            checkpoint_format=self._folder.format,
            parallel=parallel,
            mup=self.conventions.mup,
            notes=notes,
            ignored=[*training_state.grouped(index), *self._left_out.ignored],
            float32_originals=training_state.float32_originals(index),
        )

    @property
    def weights(self) -> Mapping[str, ChunkedTensor]:
        """Tensors of the model by key, without training state and `_extra_state`."""
        return self._folder.tensors

    def dtype_of(self, ref: Ref) -> DType:
        """Dtype of a ref in the files."""
        return self.weights[self._slices[ref][0].key].dtype

    def read(self, ref: Ref) -> Sources:
        """Pieces of a ref, one per chunk that holds elements of it."""
        pieces = tuple(piece for part in self._slices[ref] for piece in self._pieces(ref, part))
        if not pieces:
            raise ConversionError(
                f"{ref}: no chunk of {self._slices[ref][0].key} holds any element of it; the checkpoint is damaged, copy it again"
            )
        return Sources(pieces)

    def close(self) -> None:
        """Do nothing: every tensor was matched when the checkpoint was opened."""

    def _embeddings(self) -> ChunkedTensor:
        tensor = self.weights[EMBEDDINGS]
        if len(tensor.shape) != 2:
            raise ConversionError(
                f"{self._dir}: {EMBEDDINGS} is missing or not a matrix, so this is not a checkpoint of a GPT"
            )
        return tensor

    def _match(self, args: argparse.Namespace) -> dict[Ref, tuple[Slice, ...]]:
        """Match tensors with refs; returns the slices of every ref. Missing, extra and misshapen tensors are raised together."""
        heading = f"{self._dir}: the tensors do not match the model that the args describe:"
        shown, left_out = self._folder.prefix.__add__, self._left_out
        matcher = Matcher(self.weights, (), heading, "the args require", shown, left_out=left_out)
        alternatives = module_choices if self._folder.has_module_names else choices
        slices: dict[Ref, tuple[Slice, ...]] = {}
        for ref in refs(self.spec):
            found = [choice for choice in alternatives(ref, self.spec) if any(self._has(part) for part in choice)]
            if len(found) != 1:
                keys = " and ".join(choice[0].key for choice in found)
                first = next(alternatives(ref, self.spec))[0].key
                matcher.note(f"{ref}: {keys} are both there" if found else f"{first} ({ref}) is missing")
                continue
            slices[ref] = found[0]
            for part in found[0]:
                self._check(ref, part, matcher)
        _check_uncut(slices, args, matcher)
        matcher.close("is not a tensor of this model")
        return slices

    def _has(self, part: Slice) -> bool:
        return part.key in self.weights

    def _check(self, ref: Ref, part: Slice, matcher: Matcher[str, ChunkedTensor]) -> None:
        """Check that a part of a ref is stored in its shape, which other layers and experts may share."""
        rows, *rest = ref.shape(self.spec)
        wanted = (*part.axes, self.padded if ref.slot.vocab else part.rows or rows, *rest)
        matcher.take(part.key, ref if not self._has(part) else None, wanted)

    def _pieces(self, ref: Ref, part: Slice) -> Iterator[Piece]:
        """Pieces of one part of a ref."""
        chunks = self._chunks.setdefault(part.key, _Chunks(self.weights[part.key]))
        limit = self.spec.vocab_size if ref.slot.vocab else ref.shape(self.spec)[0]
        axes = len(part.index)
        for chunk in chunks.at(part.index):
            whole = dcp.stored(chunk, chunks.tensor.dtype, self._archives.read)
            data = _subtensor(whole, [i - o for i, o in zip(part.index, chunk.offsets, strict=False)])
            row, *col = chunk.offsets[axes:]
            rows = _rows(part.first_row + row, data.shape[0], limit)
            if any(col[1:]):
                raise ConversionError(
                    f"{part.key} is cut along an axis that no release cuts; copy the checkpoint again"
                )
            offsets = ",".join(map(str, chunk.offsets))
            name = StoredName(os.path.basename(chunk.item.path), f"{self._folder.prefix}{part.key} [{offsets}]")
            yield from self.conventions.pieces(ref, Piece(data, rows, col[0] if col else 0, name))


def _check_uncut(
    slices: Mapping[Ref, Sequence[Slice]], args: argparse.Namespace, matcher: Matcher[str, ChunkedTensor]
) -> None:
    """Note tensors of several blocks that tensor parallelism has cut, or may have cut, so that the blocks alternate in them."""
    tp = getattr(args, "tensor_model_parallel_size", None)
    of_experts = getattr(args, "expert_tensor_parallel_size", None) or tp
    for ref, parts in slices.items():
        size = tp if ref.expert is None else of_experts
        if parts[0].uncut and size != 1:
            said = (
                "do not say by which tensor-parallel size" if size is None else f"say a tensor-parallel size of {size}"
            )
            matcher.note(
                f"{parts[0].key} ({ref}) holds several blocks, and the args {said}, by which they alternate in it"
            )


def _subtensor(data: StoredTensor, index: Sequence[int]) -> StoredTensor:
    """View of a tensor at an index of its first axes."""
    offset = data.offset + sum(i * step for i, step in zip(index, data.strides, strict=False)) * data.dtype.itemsize
    return StoredTensor(data.path, offset, data.dtype, data.shape[len(index) :], data.strides[len(index) :])


@lru_cache(maxsize=512)
def _rows(first: int, count: int, limit: int) -> RowMap:
    """Row map of the slot's rows from `first` on, -1 before row 0 and from `limit` on; equal maps are the same object."""
    rows = np.arange(first, first + count, dtype=np.int64)
    return interned(np.where((rows >= 0) & (rows < limit), rows, -1))


def _rank_folders_note(directory: Path) -> list[str]:
    """Warning if the folder also holds a checkpoint of the `torch` format."""
    if not any(RANK.match(path.name) for path in listing(directory)):
        return []
    return [f"warning: {directory} holds mp_rank_* folders, too; as in Megatron-LM, the torch_dist checkpoint is read"]


def _args_of(
    directory: Path, common: Mapping[str, Any], where: Path, options: MegatronReadOptions
) -> tuple[argparse.Namespace, Record | None]:
    """Args of the common state, or else those that a file beside it says; empty if a reference alone describes the model."""
    args = supplemented(args_in(common, where), options)
    if args is not None:
        return args, None
    record = recorded_beside(directory)
    if record is not None:
        return record.args, record
    if common.get("args") is None and options.hf_config is not None:
        return argparse.Namespace(), None
    kind = type(common.get("args")).__name__
    what = "has no args, which describe the model," if common.get("args") is None else f"has args of the type {kind},"
    near = reference_near(directory)
    reference = f"give a reference model with --hf-config DIR{'' if near is None else f', such as {near}'}"
    remedy = reference if options.hf_config is None else "save it again"
    raise ConversionError(f"{where} {what} and no {RUN_CONFIG} lies beside it; {remedy}")


def _recorded_sizes(
    args: argparse.Namespace, spec: ModelSpec, where: Path, record: Record | None
) -> tuple[Parallel | None, list[str]]:
    """Parallel sizes at which the checkpoint was written, as defaults for a target; or None and a note why they cannot be."""
    if not vars(args) or (record is not None and getattr(args, "tensor_model_parallel_size", None) is None):
        return None, []
    try:
        sizes = parallel_of(args, where)
        return parallel_for(spec, sizes.tp, sizes.pp, sizes.split, sizes.ep, sizes.etp, directories=False), []
    except ConversionError as error:
        return None, [f"the parallel sizes that it was written at are not taken over: {error}"]

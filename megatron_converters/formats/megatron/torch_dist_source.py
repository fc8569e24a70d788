"""Source for Megatron-LM checkpoints of the `torch_dist` format: whole tensors in chunks, whatever ranks wrote them.

Format: Megatron-LM core_v0.9.0 to core_v0.19.0, core/dist_checkpointing and the modules' `sharded_state_dict`. A layer's
tensors are slices of one whose first axis is the layers, or have keys of their own; experts are a further axis, or have keys of
their own too. Gate lies above up in the whole tensor, not in each rank's part.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ...basics.dtypes import DType
from ...basics.errors import ConversionError
from ...basics.json_files import read_json
from ...conversion.composing import Piece, Sources, StoredName
from ...conversion.endpoint import dtype_notes, main_dtype
from ...conversion.left_out import LeftOut
from ...conversion.matching import Matcher
from ...conversion.zero_bias import without_absent
from ...model.layers import Layer
from ...model.layouts import RowMap, interned
from ...model.slots import DECODER, Ref, Slot, refs
from ...model.spec import ModelSpec
from ...sharding.ranks import Parallel, parallel_for
from ...storage import dcp, torch_zip
from ...storage.dcp import Chunk, ChunkedTensor
from ...storage.tensor import StoredTensor
from .conventions import conventions_of
from .names import (
    DISTRIBUTED,
    DISTRIBUTED_EXPERTS,
    DISTRIBUTED_LOCAL,
    EMBEDDINGS,
    EXTRA_STATE_SUFFIX,
    GATE_AND_UP,
    OUTPUT_BIAS,
    name_of,
    split_parts,
)
from .reading import (
    AS_STORED,
    FORMAT_FILE,
    RANK,
    MegatronReadOptions,
    args_in,
    checkpoint_directory,
    listing,
    origin_of,
    padding_note,
    parallel_of,
    skipped_entries,
    spec_and_notes,
    supplemented,
    without_prediction,
)

COMMON_FILE = "common.pt"
#: Object that replaces `COMMON_FILE` since Megatron-LM 0.19: a list whose only element is that file's content.
_COMMON_OBJECT = "common_state/shard_0_1"
#: Name and version of the only supported format.
_BACKEND = ("torch_dist", 1)
#: Prefixes of keys that belong to a training run and not to its model.
_TRAINING_KEY = re.compile(
    r"(optimizer|chained_\d+|rng_state|rerun_state_machine\w*|opt_param_scheduler|dataloader\w*)([./]|$)"
)


@dataclass(frozen=True)
class _Slice:
    """Part of a slot: tensor `key` at `index` of its first axes, which have the sizes `axes`; row 0 is the slot's `first_row`.

    It has `rows` rows, 0 for all of the slot.
    """

    key: str
    index: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()
    first_row: int = 0
    rows: int = 0


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
    """Checkpoint of the `torch_dist` format, with every tensor checked against its args; chunk files are opened when read."""

    def __init__(self, load_dir: Path, options: MegatronReadOptions = AS_STORED) -> None:
        self._dir = checkpoint_directory(load_dir, options.directory_name)
        _check_format(self._dir)
        self._left_out = LeftOut(options.ignore_tensors)
        index = dcp.read_index(self._dir)
        self._index = dataclasses.replace(index, tensors=self._left_out.kept(index.tensors))
        common, common_file = _read_common(self._dir, self._index)
        args = _args_of(common, common_file, options)
        embeddings = self._embeddings()
        #: Number of embedding rows, padding included.
        self.padded = embeddings.shape[0]
        content = common.get("content_metadata")
        #: Megatron-LM's own description of how it named the keys (0.13 on); empty if there is none.
        self.content: dict[str, Any] = content if isinstance(content, dict) else {}
        self.spec, notes = spec_and_notes(args, self.padded, embeddings.dtype, options)
        biased = any(key.endswith(OUTPUT_BIAS) for key in self._index.tensors)
        self.spec, bias_notes = without_absent(self.spec, stored=biased)
        self.conventions = conventions_of(vars(args), self.spec, options.mup)
        self._slices = self._match()
        self._chunks: dict[str, _Chunks] = {}
        self.spec = dataclasses.replace(self.spec, dtype=main_dtype(self.spec, self.dtype_of))
        notes += [*bias_notes, *self._left_out.notes, *dtype_notes(self.spec, self.dtype_of)]
        self.spec, left_out_notes = without_prediction(self.spec, options)
        parallel, size_notes = _recorded_sizes(args, self.spec, self._dir)
        notes += [
            *left_out_notes,
            *padding_note(self.padded, self.spec),
            *self._training_note(common),
            *size_notes,
            *_rank_folders_note(self._dir),
        ]
        self.origin = origin_of(
            self._dir,
            args,
            options,
            common.get("iteration"),
            [common_file, self._dir / dcp.METADATA, *self._index.files],
            checkpoint_format="torch_dist",
            parallel=parallel,
            mup=self.conventions.mup,
            notes=notes,
            ignored=[
                *(f"{key} (training state)" for key in self._index.tensors if _TRAINING_KEY.match(key)),
                *self._left_out.ignored,
            ],
        )

    @property
    def weights(self) -> dict[str, ChunkedTensor]:
        """Tensors of the model by key, without training state and `_extra_state`."""
        return {
            key: tensor
            for key, tensor in self._index.tensors.items()
            if not _TRAINING_KEY.match(key) and not key.endswith(EXTRA_STATE_SUFFIX)
        }

    def dtype_of(self, ref: Ref) -> DType:
        """Dtype of a ref in the files."""
        return self._index.tensors[self._slices[ref][0].key].dtype

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
        key = EMBEDDINGS
        tensor = self._index.tensors.get(key)
        if tensor is None or len(tensor.shape) != 2:
            raise ConversionError(
                f"{self._dir}: {key} is missing or not a matrix, so this is not a checkpoint of a GPT"
            )
        return tensor

    def _match(self) -> dict[Ref, tuple[_Slice, ...]]:
        """Match tensors with refs; returns the slices of every ref. Missing, extra and misshapen tensors are raised together."""
        heading = f"{self._dir}: the tensors do not match the model that the args describe:"
        matcher = Matcher(self.weights, (), heading, "the args require", left_out=self._left_out)
        slices: dict[Ref, tuple[_Slice, ...]] = {}
        for ref in refs(self.spec):
            choices = [choice for choice in _choices(ref, self.spec) if any(self._has(part) for part in choice)]
            if len(choices) != 1:
                found = " and ".join(choice[0].key for choice in choices)
                first = next(_choices(ref, self.spec))[0].key
                matcher.note(f"{ref}: {found} are both there" if choices else f"{first} ({ref}) is missing")
                continue
            slices[ref] = choices[0]
            for part in choices[0]:
                self._check(ref, part, matcher)
        matcher.close("is not a tensor of this model")
        return slices

    def _has(self, part: _Slice) -> bool:
        return part.key in self._index.tensors

    def _check(self, ref: Ref, part: _Slice, matcher: Matcher[str, ChunkedTensor]) -> None:
        """Check that a part of a ref is stored in its shape, which other layers and experts may share."""
        rows, *rest = ref.shape(self.spec)
        wanted = (*part.axes, self.padded if ref.slot.vocab else part.rows or rows, *rest)
        matcher.take(part.key, ref if not self._has(part) else None, wanted)

    def _pieces(self, ref: Ref, part: _Slice) -> Iterator[Piece]:
        """Pieces of one part of a ref."""
        chunks = self._chunks.setdefault(part.key, _Chunks(self._index.tensors[part.key]))
        limit = self.spec.vocab_size if ref.slot.vocab else ref.shape(self.spec)[0]
        axes = len(part.index)
        for chunk in chunks.at(part.index):
            data = _subtensor(
                dcp.stored(chunk, chunks.tensor.dtype), [i - o for i, o in zip(part.index, chunk.offsets, strict=False)]
            )
            row, *col = chunk.offsets[axes:]
            rows = _rows(part.first_row + row, data.shape[0], limit)
            if any(col[1:]):
                raise ConversionError(
                    f"{part.key} is cut along an axis that no release cuts; copy the checkpoint again"
                )
            offsets = ",".join(map(str, chunk.offsets))
            name = StoredName(os.path.basename(chunk.item.path), f"{part.key} [{offsets}]")
            yield from self.conventions.pieces(ref, Piece(data, rows, col[0] if col else 0, name))

    def _training_note(self, common: Mapping[str, Any]) -> list[str]:
        """Note on optimizer and training state, which is not converted."""
        entries = [
            *((key, tensor.nbytes) for key, tensor in self._index.tensors.items()),
            *((key, item.nbytes) for key, item in self._index.objects.items()),
        ]
        stored = [(match[1], nbytes) for key, nbytes in entries if (match := _TRAINING_KEY.match(key))]
        kinds = sorted({kind for kind, _ in stored} | skipped_entries(common))
        if not kinds:
            return []
        total = sum(nbytes for _, nbytes in stored)
        return [f"left out of the conversion: {', '.join(kinds)} (optimizer and training state, {total} bytes)"]


def _choices(ref: Ref, spec: ModelSpec) -> Iterator[tuple[_Slice, ...]]:
    """Alternative ways in which a ref may be stored, each as the parts that make it up."""
    expert, experts = ((), ()) if ref.expert is None else ((ref.expert,), (spec.num_experts,))
    for template in _templates(ref.slot, ref.kind(spec), ref.stack):
        if ref.layer is None:
            yield (_Slice(template),)
            continue
        own = template.format(layer=ref.layer)
        parts = split_parts(ref.slot, ref.kind(spec), spec)
        if parts:
            yield tuple(_Slice(own + part.suffix, (), (), part.first_row, part.rows) for part in parts)
            continue
        if ref.stack == DECODER:
            yield (_Slice(template.replace("{layer}.", ""), (ref.layer, *expert), (spec.num_layers, *experts)),)
        yield (_Slice(own, expert, experts),)
        own_expert = own.replace(DISTRIBUTED_EXPERTS, f"{DISTRIBUTED_EXPERTS}{ref.expert}.")
        blocks = ref.slot.size(spec, ref.kind(spec)).blocks
        if len(blocks) == len(GATE_AND_UP):
            rows = blocks[0].rows
            yield tuple(
                _Slice(own_expert + suffix, first_row=rows * block, rows=rows)
                for block, suffix in enumerate(GATE_AND_UP)
            )
        elif own_expert != own:
            yield (_Slice(own_expert),)


@lru_cache(maxsize=1024)
def _templates(slot: Slot, kind: Layer, stack: str) -> tuple[str, ...]:
    """Key templates of a slot, of either implementation."""
    return tuple(dict.fromkeys(name_of(table, slot.name, kind, stack) for table in (DISTRIBUTED, DISTRIBUTED_LOCAL)))


def _subtensor(data: StoredTensor, index: Sequence[int]) -> StoredTensor:
    """View of a tensor at an index of its first axes."""
    offset = data.offset + sum(i * step for i, step in zip(index, data.strides, strict=False)) * data.dtype.itemsize
    return StoredTensor(data.path, offset, data.dtype, data.shape[len(index) :], data.strides[len(index) :])


@lru_cache(maxsize=512)
def _rows(first: int, count: int, limit: int) -> RowMap:
    """Row map of the slot's rows from `first` on, -1 (padding) from `limit` on; equal maps are the same object."""
    rows = np.arange(first, first + count, dtype=np.int64)
    return interned(np.where(rows < limit, rows, -1))


def _check_format(directory: Path) -> None:
    if not (directory / FORMAT_FILE).is_file():
        raise ConversionError(
            f"{directory} has no {FORMAT_FILE}: saving was interrupted, or it is not of the torch_dist format; "
            "load it with Megatron-LM and save it with --ckpt-format torch_dist"
        )
    description = read_json(directory / FORMAT_FILE)
    backend = description.get("sharded_backend"), description.get("sharded_backend_version", 1)
    if backend != _BACKEND:
        raise ConversionError(
            f"{directory} is of the distributed format {backend[0]}, version {backend[1]}; only torch_dist, version 1, "
            "can be read: load it with Megatron-LM and save it with --ckpt-format torch_dist"
        )


def _rank_folders_note(directory: Path) -> list[str]:
    """Warning if the folder also holds a checkpoint of the `torch` format."""
    if not any(RANK.match(path.name) for path in listing(directory)):
        return []
    return [f"warning: {directory} holds mp_rank_* folders, too; as in Megatron-LM, the torch_dist checkpoint is read"]


def _read_common(directory: Path, index: dcp.Index) -> tuple[Mapping[str, Any], Path]:
    """Read the common state of all ranks; returns it and the file that holds it."""
    path, item = directory / COMMON_FILE, index.objects.get(_COMMON_OBJECT)
    if path.is_file():  # also if both exist, as in Megatron-LM
        common, where = torch_zip.read(path), str(path)
    elif item is not None:
        path, where = Path(item.path), f"{_COMMON_OBJECT} in {item}"
        content = torch_zip.read_embedded(item.path, item.start, item.nbytes)
        common = content[0] if isinstance(content, list) and len(content) == 1 else content
    else:
        raise ConversionError(
            f"{path} is missing, and {dcp.METADATA} has no {_COMMON_OBJECT} in its place; copy the checkpoint again"
        )
    if not isinstance(common, dict):
        raise ConversionError(f"{where} holds a {type(common).__name__}, not a checkpoint's common state")
    return common, path


def _args_of(common: Mapping[str, Any], where: Path, options: MegatronReadOptions) -> argparse.Namespace:
    """Args of the common state; empty if it has none and a reference describes the model."""
    args = supplemented(args_in(common, where), options)
    if args is None and common.get("args") is None and options.hf_config is not None:
        return argparse.Namespace()
    if args is None:
        raise ConversionError(
            f"{where} has no args, which describe the model; give a reference model with --hf-config DIR"
        )
    return args


def _recorded_sizes(args: argparse.Namespace, spec: ModelSpec, where: Path) -> tuple[Parallel | None, list[str]]:
    """Parallel sizes at which the checkpoint was written, as defaults for a target; or None and a note why they cannot be."""
    if not vars(args):
        return None, []
    try:
        sizes = parallel_of(args, where)
        return parallel_for(spec, sizes.tp, sizes.pp, sizes.split, sizes.ep, sizes.etp, directories=False), []
    except ConversionError as error:
        return None, [f"the parallel sizes that it was written at are not taken over: {error}"]

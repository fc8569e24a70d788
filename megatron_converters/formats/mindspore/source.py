"""Source for weights of MindSpore Transformers, memory-mapped: every tensor is matched by name and shape with the model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...assets.origin import Origin, file_identities
from ...basics.dtypes import DType
from ...basics.errors import ConversionError
from ...basics.json_files import read_json
from ...conversion.composing import Piece, Sources, StoredName
from ...conversion.endpoint import first_dtype, with_main_dtype
from ...conversion.left_out import LeftOut
from ...conversion.matching import Matcher
from ...model.layouts import ALTERNATING, GATED, GROUPED_QKV, SAME, Layout, RowMap, joined, row_maps
from ...model.slots import SLOTS, Ref, refs
from ...model.spec import ModelSpec
from ...storage.tensor import StoredTensor
from .describing import Described, MindSporeReadOptions, describe
from .files import Slice, Tensor, WeightFiles, read_weight_files
from .latents import separated
from .names import EXPERTS, LEGACY, PREFIX, Dialect
from .options import CONTIGUOUS, INTERLEAVED
from .shapes import Shapes

GENERATION = "hf_generation_config.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
#: Beginnings of names that stand after the prefix, if there is one.
_AFTER_PREFIX = ("decoder.", "embedding.", "output_layer.", "mtp.")
_OUTPUT = "output_layer.weight"
_PADDED = ("word_embeddings", "output_layer")


class _Part(NamedTuple):
    """Stored tensor of a ref, or one of several: its name, and the slot's row of each of its rows."""

    name: str
    rows: RowMap


class MindSporeSource:
    """Weights of MindSpore Transformers, in whichever form they are on disk."""

    def __init__(self, path: Path, options: MindSporeReadOptions) -> None:
        files = read_weight_files(path)
        self._left_out = LeftOut(options.ignore_tensors)
        tensors = separated(_without_prefix(self._left_out.kept(files.tensors)))
        shapes = Shapes({name: tensor.shape for name, tensor in tensors.items()})
        self._rows = shapes.embeddings[0]
        dtype = next(iter(_embeddings(tensors))).dtype
        found = describe(files.root, shapes, dtype, options)
        self.spec = found.spec
        self._dialect = Dialect(found.spec, found.mlp_layout, found.qkv_layout)
        self._legacy = shapes.is_legacy
        self._pieces, self._replicas = self._match(path, tensors)
        self.spec, dtype_notes = with_main_dtype(found.spec, self.dtype_of)
        self.origin = _origin(path, files, found, self._rows, options)
        self.origin.notes += [*self._left_out.notes, *dtype_notes]
        self.origin.ignored += self._left_out.ignored

    def dtype_of(self, ref: Ref) -> DType:
        """Dtype of a ref in the files."""
        return first_dtype(self._pieces[ref])

    def read(self, ref: Ref) -> Sources:
        """Pieces of a ref; copies in files of other ranks are replicas."""
        return Sources(self._pieces[ref], self._replicas.get(ref, ()))

    def close(self) -> None:
        """Do nothing: every tensor was matched when the weights were opened."""

    def _match(
        self, path: Path, tensors: Mapping[str, Tensor]
    ) -> tuple[dict[Ref, tuple[Piece, ...]], dict[Ref, tuple[Piece, ...]]]:
        heading = f"{path}: the weights do not match the model that shapes, options and configuration describe:"
        matcher = Matcher(tensors, (), heading, "the model requires", left_out=self._left_out)
        pieces: dict[Ref, tuple[Piece, ...]] = {}
        replicas: dict[Ref, tuple[Piece, ...]] = {}
        for ref in refs(self.spec):
            slices = self._experts if ref.slot.name in EXPERTS and not self._legacy else self._whole
            found = list(slices(ref, tensors, matcher))
            pieces[ref] = tuple(piece for piece, copy in found if not copy)
            replicas[ref] = tuple(piece for piece, copy in found if copy)
        head = tensors.get(_OUTPUT) if self.spec.tied else None
        if head is not None:  # which a configuration ties, and the program that saved it stored apart
            embeddings = Ref(SLOTS["word_embeddings"])
            matcher.strike([_OUTPUT])
            replicas[embeddings] = (*replicas[embeddings], *self._copies(head, embeddings))
        matcher.close("is not a tensor of this model")
        return pieces, replicas

    def _whole(
        self, ref: Ref, tensors: Mapping[str, Tensor], matcher: Matcher[str, Tensor]
    ) -> Iterator[tuple[Piece, bool]]:
        """Pieces of a ref that tensors of its own hold, and whether each is a copy."""
        rest = ref.shape(self.spec)[1:]
        for part in self._parts(ref, tensors):
            tensor = matcher.take(part.name, ref, (part.rows.size, *rest))
            for stored, copy in _slices(tensor):
                rows = part.rows[stored.offset[0] : stored.offset[0] + stored.data.shape[0]]
                col = stored.offset[1] if len(stored.offset) > 1 else 0
                yield Piece(stored.data, rows, col, _name(stored.data, part.name)), copy

    def _copies(self, head: Tensor, ref: Ref) -> Iterator[Piece]:
        """Pieces of an output layer that repeats the embeddings."""
        (part,) = _rows_of(SAME, (_OUTPUT,), ref, self.spec, head.shape[0])
        for stored, _ in _slices(head):
            rows = part.rows[stored.offset[0] : stored.offset[0] + stored.data.shape[0]]
            yield Piece(stored.data, rows, stored.offset[1], _name(stored.data, _OUTPUT))

    def _parts(self, ref: Ref, tensors: Mapping[str, Tensor]) -> Iterator[_Part]:
        slot = ref.slot.name
        if not self._legacy:
            yield from _rows_of(self._dialect.layout(slot), (self._dialect.name(ref),), ref, self.spec, self._rows)
            return
        entry = LEGACY[slot]
        names = tuple(name.format(layer=ref.layer) for name in entry.names)
        fused = None if entry.fused is None else entry.fused.format(layer=ref.layer)
        if fused is None or fused not in tensors:
            yield from _rows_of(entry.layout, names, ref, self.spec, self._rows)
            return
        yield from _rows_of(self._fused_layout(slot), (fused,), ref, self.spec, self._rows)

    def _fused_layout(self, slot: str) -> Layout:
        """Layout of an older class's joined tensor."""
        if slot.startswith("qkv"):
            return joined(GROUPED_QKV) if self._dialect.qkv_layout == CONTIGUOUS else self._dialect.layout(slot)
        return ALTERNATING if self._dialect.mlp_layout == INTERLEAVED else joined(GATED)

    def _experts(
        self, ref: Ref, tensors: Mapping[str, Tensor], matcher: Matcher[str, Tensor]
    ) -> Iterator[tuple[Piece, bool]]:
        """Pieces of an expert, whose transposed matrix is a part of the tensor of all experts."""
        name = self._dialect.name(ref)
        rows, cols = ref.matrix(self.spec)
        tensor = tensors.get(name)
        taken = matcher.take(name, ref, _expert_shape(tensor, self.spec.num_experts, cols, rows))
        first = (ref.expert or 0) * cols
        for stored, copy in _slices(None if taken is None else _as_matrix(taken, self.spec.num_experts * cols, rows)):
            start, stop = max(first, stored.offset[0]), min(first + cols, stored.offset[0] + stored.data.shape[0])
            if start >= stop:
                continue
            width = stored.data.shape[1]
            data = stored.data
            offset = data.offset + (start - stored.offset[0]) * data.strides[0] * data.dtype.itemsize
            view = StoredTensor(data.path, offset, data.dtype, (width, stop - start), data.strides[::-1])
            slot_rows = np.arange(stored.offset[1], stored.offset[1] + width, dtype=np.int64)
            yield Piece(view, slot_rows, start - first, _name(data, name)), copy


def _rows_of(layout: Layout, names: tuple[str, ...], ref: Ref, spec: ModelSpec, padded: int) -> Iterator[_Part]:
    """Parts of a ref under these names; embeddings and output layer may have rows of padding."""
    for name, rows in zip(names, row_maps(layout, ref.slot, spec, ref.kind(spec)), strict=True):
        if ref.slot.name in _PADDED and padded > rows.size:
            rows = np.append(rows, np.full(padded - rows.size, -1, np.int64))
        yield _Part(name, rows)


def _slices(tensor: Tensor | None) -> Iterator[tuple[Slice, bool]]:
    for slices, copy in () if tensor is None else ((tensor.slices, False), (tensor.copies, True)):
        yield from ((stored, copy) for stored in slices)


def _name(data: StoredTensor, name: str) -> StoredName:
    return StoredName(os.path.basename(data.path), name)


def _expert_shape(tensor: Tensor | None, experts: int, cols: int, rows: int) -> tuple[int, ...]:
    """Shape in which a tensor of all experts may be: releases label the same bytes otherwise."""
    shapes = [(experts * cols, rows), (experts, cols, rows), (cols, experts * rows)]
    return tensor.shape if tensor is not None and tensor.shape in shapes else shapes[0]


def _as_matrix(tensor: Tensor, height: int, width: int) -> Tensor:
    """The same bytes as a matrix of this shape; only a tensor in one slice can be in another shape than that."""
    if tensor.shape == (height, width):
        return tensor
    slices = [tuple(_reshaped(each, tensor, height, width) for each in held) for held in (tensor.slices, tensor.copies)]
    return Tensor((height, width), tensor.dtype, *slices)


def _reshaped(stored: Slice, tensor: Tensor, height: int, width: int) -> Slice:
    """Slice of experts, of shape [experts, rows, columns], or the whole tensor, as rows of the matrix."""
    data = stored.data
    if len(tensor.shape) == 3 and data.shape[1:] == tensor.shape[1:]:
        offset, rows = stored.offset[0] * tensor.shape[1], data.shape[0] * tensor.shape[1]
        return Slice(StoredTensor(data.path, data.offset, data.dtype, (rows, width), (width, 1)), (offset, 0))
    if data.shape == tensor.shape:
        return Slice(StoredTensor(data.path, data.offset, data.dtype, (height, width), (width, 1)), (0, 0))
    raise ConversionError(
        f"{data.path}: experts of shape {list(tensor.shape)} are cut as {list(data.shape)}, which is not supported; unify them "
        "with MindSpore's unified_safetensors first"
    )


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under names without the prefix that some models put before all of them."""
    return {
        name.removeprefix(PREFIX) if name.startswith(tuple(PREFIX + start for start in _AFTER_PREFIX)) else name: tensor
        for name, tensor in tensors.items()
    }


def _embeddings(tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    yield from (tensor for name, tensor in tensors.items() if "embedding" in name and len(tensor.shape) == 2)


def _origin(path: Path, files: WeightFiles, found: Described, rows: int, options: MindSporeReadOptions) -> Origin:
    generation = files.root / GENERATION
    folder = options.reference or files.root
    padding = rows - found.spec.vocab_size
    notes = list(found.notes)
    if padding:
        notes.append(f"{padding} rows of vocabulary padding are left out (vocabulary {found.spec.vocab_size})")
    return Origin(
        described=str(path),
        hf_config=found.config,
        generation_config=read_json(generation) if generation.exists() else None,
        tokenizer=str(folder) if any((folder / name).exists() for name in _TOKENIZERS) else None,
        notes=[*notes, *files.notes],
        urgent=list(found.urgent),
        ignored=[f"{count} tensors ({group})" for group, count in files.dropped.items()],
        identity=file_identities(files.root, files.files),
    )

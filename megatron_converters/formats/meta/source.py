"""Source for checkpoints as Meta and Mistral AI publish them: params.json and consolidated files, one per model-parallel rank.

Source: meta-llama/llama and meta-llama/llama3, llama/model.py (names, model-parallel layers, `apply_rotary_emb` on
neighbouring pairs); mistralai/mistral-inference has the same names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...assets.origin import Origin, file_identities
from ...basics.dtypes import DType
from ...basics.errors import ConversionError
from ...basics.json_files import read_json
from ...conversion.composing import Piece, Sources, StoredName
from ...conversion.endpoint import first_dtype, with_main_dtype
from ...conversion.left_out import LeftOut
from ...conversion.matching import Matcher
from ...model.layouts import GATED, GROUPED_INTERLEAVED_QKV, SAME, interned, row_maps
from ...model.slots import Ref, Shard, refs
from ...model.spec import ModelSpec
from ...model.tables import Entry
from ...storage.tensor import StoredTensor
from .files import read_ranks
from .params import FILE, read_params


class _Entry(NamedTuple):
    """Entry of a slot, and how Meta's model parallelism cuts it."""

    entry: Entry
    shard: Shard


_LAYER = "layers.{layer}."
_ENTRIES = {
    "word_embeddings": _Entry(Entry(SAME, ("tok_embeddings.weight",)), Shard.COLUMN),
    "input_norm": _Entry(Entry(SAME, (_LAYER + "attention_norm.weight",)), Shard.REPLICATED),
    "qkv": _Entry(
        Entry(GROUPED_INTERLEAVED_QKV, tuple(f"{_LAYER}attention.w{part}.weight" for part in "qkv")), Shard.COLUMN
    ),
    "proj": _Entry(Entry(SAME, (_LAYER + "attention.wo.weight",)), Shard.ROW),
    "mlp_norm": _Entry(Entry(SAME, (_LAYER + "ffn_norm.weight",)), Shard.REPLICATED),
    "fc1": _Entry(Entry(GATED, (_LAYER + "feed_forward.w1.weight", _LAYER + "feed_forward.w3.weight")), Shard.COLUMN),
    "fc2": _Entry(Entry(SAME, (_LAYER + "feed_forward.w2.weight",)), Shard.ROW),
    "final_norm": _Entry(Entry(SAME, ("norm.weight",)), Shard.REPLICATED),
    "output_layer": _Entry(Entry(SAME, ("output.weight",)), Shard.COLUMN),
}
#: Name of the rotary frequencies, which some files store although they follow from params.json.
_IGNORED = "rope.freqs"


class MetaSource:
    """Llama or Mistral in Meta's layout, with every file and tensor checked against params.json by name and shape."""

    def __init__(
        self, folder: Path, *, ignored_params: Iterable[str] = (), ignored_tensors: Sequence[str] = ()
    ) -> None:
        """`ignored_params` are unknown fields of params.json that do not matter, `ignored_tensors` patterns of names left out."""
        described = read_params(read_json(folder / FILE), ignored_params)
        stored = read_ranks(folder)
        left_out = LeftOut(ignored_tensors)
        ranks: list[Mapping[str, StoredTensor]] = [left_out.kept(rank) for rank in stored]
        spec = _spec(described.properties, ranks)
        self._pieces, self._replicas = _match(folder, spec, ranks, left_out)
        self.spec, dtype_notes = with_main_dtype(spec, self.dtype_of)
        tokenizer = next(
            (str(path) for path in (folder / "tokenizer.model", folder.parent / "tokenizer.model") if path.exists()),
            None,
        )
        files = {data.path for rank in stored for data in rank.values()}
        self.origin = Origin(
            described=str(folder),
            tokenizer=tokenizer,
            notes=[*left_out.notes, *dtype_notes],
            ignored=left_out.ignored,
            identity=file_identities(folder, [folder / FILE, *files]),
        )
        self.origin.say_first([*_config_note(folder), *described.notes])

    def dtype_of(self, ref: Ref) -> DType:
        """Dtype of a ref in the files."""
        return first_dtype(self._pieces[ref])

    def read(self, ref: Ref) -> Sources:
        """Pieces of a ref from all model-parallel ranks; further copies of an uncut tensor are replicas."""
        return Sources(self._pieces[ref], self._replicas[ref])

    def close(self) -> None:
        """Do nothing: every tensor was matched when the folder was opened."""


def _config_note(folder: Path) -> list[str]:
    there = (folder / "config.json").exists()
    return [f"{folder} has no weights for its config.json; params.json describes those that it has"] if there else []


def _spec(properties: Mapping[str, Any], ranks: list[Mapping[str, StoredTensor]]) -> ModelSpec:
    """Spec by params.json, and by the sizes that tensors alone say."""
    return ModelSpec.of(
        ffn_hidden_size=sum(_shape(rank, "layers.0.feed_forward.w1.weight")[0] for rank in ranks),
        vocab_size=sum(_shape(rank, "output.weight")[0] for rank in ranks),
        dtype=ranks[0]["output.weight"].dtype,
        **properties,
    )


def _shape(rank: Mapping[str, StoredTensor], name: str) -> tuple[int, ...]:
    if name not in rank or len(rank[name].shape) != 2:
        raise ConversionError(f"the checkpoint has no matrix {name}, so it is not a Llama of Meta's")
    return rank[name].shape


_Pieces = dict[Ref, tuple[Piece, ...]]


def _match(
    folder: Path, spec: ModelSpec, ranks: list[Mapping[str, StoredTensor]], left_out: LeftOut
) -> tuple[_Pieces, _Pieces]:
    """Match tensors with refs; returns pieces and replicas of every ref. All problems are raised together."""
    stored = {(number, name): data for number, rank in enumerate(ranks) for name, data in rank.items()}
    ignored = {(number, _IGNORED) for number in range(len(ranks))}
    heading = f"{folder}: the tensors do not match the model that params.json describes:"
    names = [os.path.basename(next(iter(rank.values())).path) if rank else "" for rank in ranks]
    matcher = Matcher(
        stored,
        ignored,
        heading,
        "params.json requires",
        lambda key: f"{names[key[0]]}: {key[1]}",
        left_out=left_out,
    )
    pieces: _Pieces = {}
    replicas: _Pieces = {}
    for ref in refs(spec):
        entry, shard = _ENTRIES[ref.slot.name]
        found: list[Piece] = []
        for template, rows in zip(entry.names, row_maps(entry.layout, ref.slot, spec, ref.kind(spec)), strict=True):
            name = template.format(layer=ref.layer)
            shape = (rows.size, *ref.shape(spec)[1:])
            dim = _cut_dimension(shard, ref, ranks, name, shape)
            for number in range(len(ranks)):
                wanted = tuple(size // len(ranks) if axis == dim else size for axis, size in enumerate(shape))
                data = matcher.take((number, name), ref, wanted)
                if data is not None:
                    part_rows = interned(rows[number * wanted[0] :][: wanted[0]]) if dim == 0 else rows
                    where = StoredName(os.path.basename(data.path), name)
                    found.append(Piece(data, part_rows, number * wanted[1] if dim == 1 else 0, where))
        count = len(found) if shard.cuts else 1
        pieces[ref], replicas[ref] = tuple(found[:count]), tuple(found[count:])
    matcher.close("is not a tensor of a Llama of Meta's")
    return pieces, replicas


def _cut_dimension(
    shard: Shard, ref: Ref, ranks: list[Mapping[str, StoredTensor]], name: str, shape: tuple[int, ...]
) -> int | None:
    """Dimension that model parallelism cuts, None for none. Llama 1 and 2 cut the embedding's width, Llama 3 its vocabulary."""
    if not shard.cuts:
        return None
    if ref.slot.name == "word_embeddings" and name in ranks[0] and ranks[0][name].shape[0] == shape[0]:
        return 1
    return 0 if shard is Shard.COLUMN else 1

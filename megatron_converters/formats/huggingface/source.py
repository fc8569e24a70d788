"""Source for Hugging Face folders: config.json, and safetensors or `pytorch_model*.bin` files, memory-mapped."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...assets.origin import Origin, file_identities
from ...basics.dtypes import DType
from ...basics.errors import ConversionError, one_line, raise_all
from ...basics.json_files import read_json
from ...conversion.composing import Piece, Sources, StoredName
from ...conversion.endpoint import first_dtype
from ...families import FAMILIES
from ...families.config_json import spec_from_config
from ...families.table import Family
from ...model.layouts import row_maps
from ...model.slots import SLOTS, Ref, refs
from ...model.spec import ModelSpec
from ...storage import safetensors, torch_zip
from ...storage.opening import is_name
from ...storage.tensor import StoredTensor
from .parts import HFNames

#: Weight files of unsharded models, in the order of preference of `from_pretrained`; '.index.json' is appended for an index.
_SINGLE = ("model.safetensors", "pytorch_model.bin")
#: Maximum number of names listed in a message.
_SHOWN_NAMES = 40
_ADAPTER = "adapter_config.json"


class HFSource:
    """Hugging Face folder, with every tensor checked against its config.json by name and shape."""

    def __init__(self, folder: Path, *, ignored_config: Sequence[str] = (), untie: bool = False) -> None:
        if (folder / _ADAPTER).exists():  # transformers would load the adapter with the base model that it names
            raise ConversionError(
                f"{folder / _ADAPTER} describes a PEFT adapter, which cannot be converted; merge it into its model, or remove this "
                "file to convert the model without it"
            )
        config = read_json(folder / "config.json")
        tensors = read_tensors(folder)
        spec = spec_from_config(config, ignored_config)
        if untie:
            spec = dataclasses.replace(spec, tied=False)
        family = FAMILIES[spec.family]
        self._pieces = _match(folder, spec, family, tensors)
        self._replicas = _tied_replica(spec, family, tensors)
        files = {data.path for data in tensors.values()} | {folder / "config.json"}
        self.spec = dataclasses.replace(spec, dtype=first_dtype(self._pieces[Ref(SLOTS["word_embeddings"])]))
        generation = folder / "generation_config.json"
        self.origin = Origin(
            described=str(folder),
            hf_config=config,
            generation_config=read_json(generation) if generation.exists() else None,
            tokenizer=str(folder) if _has_tokenizer(folder) else None,
            ignored=[f"{name} (no weight)" for name in sorted(tensors) if name.endswith(family.ignored_suffixes)],
            identity=file_identities(folder, files),
        )

    def dtype_of(self, ref: Ref) -> DType:
        """Dtype of a ref in the files."""
        return first_dtype(self._pieces[ref])

    def read(self, ref: Ref) -> Sources:
        """Pieces of a ref; a tied model's stored lm_head is a replica of its embeddings."""
        return Sources(self._pieces[ref], self._replicas if ref.slot.name == "word_embeddings" else ())

    def close(self) -> None:
        """Do nothing: every tensor was matched when the folder was opened."""


def _has_tokenizer(folder: Path) -> bool:
    return any(
        (folder / name).exists()
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    )


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Read every tensor of the folder, by name, from an index or a single file; safetensors are preferred."""
    for single in _SINGLE:
        index = folder / f"{single}.index.json"
        if (folder / single).exists():
            return _read_file(folder / single)
        if index.exists():
            return _read_sharded(folder, index)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = f"; it has {', '.join(shards)}, but the index of these shards is missing" if shards else ""
    raise ConversionError(f"{folder} has neither {' nor '.join(_SINGLE)} nor an index of shards{hint}")


def _read_sharded(folder: Path, index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(is_name, itertools.chain(*weight_map.items()))):
        raise ConversionError(f"{index} has no weight_map from tensor names to file names; copy it again")
    tensors: dict[str, StoredTensor] = {}
    problems = []
    listed_in: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        listed_in.setdefault(name, set()).add(tensor)
    for name, listed in sorted(listed_in.items()):
        path = folder / name
        if Path(name).name != name or not os.path.isfile(path):  # `isfile` is also False for a name that is too long
            problems.append(f"{path} is named by {index.name}, but is not there; copy it again")
            continue
        found = _read_file(path)
        problems += [
            f"{tensor} should be in {name} by {index.name}, but is not" for tensor in sorted(listed - found.keys())
        ]
        problems += [f"{tensor} is in {name}, but not in {index.name}" for tensor in sorted(found.keys() - listed)]
        tensors.update(found)
    raise_all(f"{folder}: the shards and their index disagree:", problems)
    return tensors


def _read_file(path: Path) -> dict[str, StoredTensor]:
    if path.suffix == ".safetensors":
        return safetensors.read(path).tensors
    state: Any = torch_zip.read(path)
    if not isinstance(state, Mapping):
        raise ConversionError(f"{path} holds a {type(state).__name__}, not a dictionary of tensors")
    others = [one_line(key) for key, value in state.items() if not (is_name(key) and isinstance(value, StoredTensor))]
    if others:
        raise ConversionError(f"{path} holds entries that are not named tensors: {', '.join(others[:_SHOWN_NAMES])}")
    return dict(state)


def _match(
    folder: Path, spec: ModelSpec, family: Family, tensors: Mapping[str, StoredTensor]
) -> dict[Ref, tuple[Piece, ...]]:
    """Match tensors with refs; returns the pieces of every ref. Missing, extra and misshapen tensors are raised together."""
    problems: list[str] = []
    pieces: dict[Ref, tuple[Piece, ...]] = {}
    names = HFNames(family, spec)
    unused = {name for name in tensors if not name.endswith(family.ignored_suffixes)}
    if spec.tied:
        unused -= set(names.names(Ref(SLOTS["output_layer"])))
    for ref in refs(spec):
        found = []
        for part in names.parts(ref, fused=names.fused_name(ref) in tensors):
            unused.discard(part.name)
            data = tensors.get(part.name)
            if data is None:
                problems.append(f"{part.name} ({ref}) is missing")
            elif data.shape != part.stored_shape:
                problems.append(
                    f"{part.name} ({ref}) has shape {list(data.shape)}; config.json requires {list(part.stored_shape)}"
                )
            else:
                found.append(Piece(part.view(data), part.rows, 0, StoredName(os.path.basename(data.path), part.name)))
        pieces[ref] = tuple(found)
    problems += [f"{name} is not a tensor of the {family.name} family with this config.json" for name in sorted(unused)]
    raise_all(f"{folder}: the tensors do not match the model that config.json describes:", problems)
    return pieces


def _tied_replica(spec: ModelSpec, family: Family, tensors: Mapping[str, StoredTensor]) -> tuple[Piece, ...]:
    """Stored lm_head of a tied model, as a replica of the embeddings; empty if there is none."""
    (name,) = HFNames(family, spec).names(Ref(SLOTS["output_layer"]))
    data = tensors.get(name)
    if not spec.tied or data is None:
        return ()
    slot = SLOTS["word_embeddings"]
    if data.shape != slot.shape(spec):
        raise ConversionError(
            f"{name} has shape {list(data.shape)}, but config.json ties it to the embeddings of shape {list(slot.shape(spec))}"
        )
    (rows,) = row_maps(family.tensors[slot.name].layout, slot, spec)
    stored = StoredName(os.path.basename(data.path), name, "tied; pass --untie to keep it apart")
    return (Piece(data, rows, 0, stored),)

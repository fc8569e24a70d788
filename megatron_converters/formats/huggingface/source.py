"""Source for Hugging Face folders: config.json, and safetensors or `pytorch_model*.bin` files, memory-mapped.

A file of weights alone can be read, too, with the config.json beside it or that of a reference model.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...assets.code_files import code_files
from ...assets.origin import Origin, file_identities
from ...basics.dtypes import DType
from ...basics.errors import ConversionError, UsageError, one_line, raise_all
from ...basics.json_files import read_json
from ...basics.quantities import count
from ...conversion.composing import Piece, Sources, StoredName
from ...conversion.endpoint import first_dtype
from ...conversion.matching import Matcher
from ...families import FAMILIES
from ...families.config_json import config_notes, spec_from_config
from ...families.quantisation import unquantised
from ...families.table import Family
from ...model.slots import MTP, SLOTS, Ref, refs
from ...model.spec import ModelSpec
from ...storage import safetensors, torch_zip
from ...storage.opening import is_name
from ...storage.tensor import StoredTensor
from .parts import HFNames, Part
from .quantised import Weight, decoded, decoded_note

#: Weight files of unsharded models, in the order of preference of `from_pretrained`; '.index.json' is appended for an index.
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
#: Maximum number of names listed in a message.
_SHOWN_NAMES = 40
ADAPTER = "adapter_config.json"
_CONFIG = "config.json"


class HFSource:
    """Hugging Face folder or file of weights, with every tensor checked against config.json by name and shape.

    A file's configuration and tokenizer are those of the folder `reference`, by default of the folder where it lies. `untie` keeps
    a stored lm_head although config.json ties it, `without_mtp` leaves out layers of multi-token prediction.
    """

    def __init__(
        self,
        path: Path,
        *,
        reference: Path | None = None,
        ignored_config: Sequence[str] = (),
        untie: bool = False,
        without_mtp: bool = False,
    ) -> None:
        single = path.is_file()
        folder = (reference or path.parent) if single else path
        if single and not (folder / _CONFIG).exists():
            raise UsageError(
                f"{path} holds weights alone, and {folder} has no {_CONFIG}; give the folder of a reference model with "
                "--hf-config DIR"
            )
        if (folder / ADAPTER).exists():  # transformers would load the adapter with the base model that it names
            raise ConversionError(
                f"{folder / ADAPTER} describes a PEFT adapter, which cannot be converted; merge it into its model, or remove this "
                "file to convert the model without it"
            )
        config = read_json(folder / _CONFIG)
        spec = spec_from_config(config, ignored_config)  # before tensors: it says what they are
        stored = _read_file(path) if single else read_tensors(folder)
        tensors = decoded(path, config, stored)
        if untie:
            spec = dataclasses.replace(spec, tied=False)
        family = FAMILIES[spec.family]
        spec, left_out, notes = _prediction_layers(spec, family, tensors, without_mtp)
        prefixed = any(name.startswith(family.optional_prefix) for name in tensors)
        names = HFNames(family, spec, prefixed=prefixed)
        ignored = {name for name in tensors if name.endswith(family.ignored_suffixes)}
        experts = (ref for ref in refs(spec) if ref.expert is not None)
        #: Whether experts are in fused tensors, as transformers 5 has them in memory.
        self.fused = any(names.fused_name(ref) in tensors for ref in itertools.islice(experts, 1))
        self._pieces, self._replicas = _match(path, spec, names, tensors, ignored | left_out)
        code = code_files(folder)
        files = {data.path for data in stored.values()} | {folder / _CONFIG, *code.values()}
        self.spec = dataclasses.replace(spec, dtype=first_dtype(self._pieces[Ref(SLOTS["word_embeddings"])]))
        generation = folder / "generation_config.json"
        self.origin = Origin(
            described=str(path),
            hf_config=unquantised(config),
            generation_config=read_json(generation) if generation.exists() else None,
            tokenizer=str(folder) if _has_tokenizer(folder) else None,
            code_files=code,
            notes=[*notes, *decoded_note(tensors), *config_notes(config)],
            ignored=[
                *(f"{name} (no weight)" for name in sorted(ignored)),
                *(f"{name} (multi-token prediction)" for name in sorted(left_out)),
            ],
            identity=file_identities(path, files),
        )

    def dtype_of(self, ref: Ref) -> DType:
        """Dtype of a ref in the files."""
        return first_dtype(self._pieces[ref])

    def read(self, ref: Ref) -> Sources:
        """Pieces of a ref; further copies of embeddings and head are replicas."""
        return Sources(self._pieces[ref], self._replicas.get(ref, ()))

    def close(self) -> None:
        """Do nothing: every tensor was matched when the folder was opened."""


def _has_tokenizer(folder: Path) -> bool:
    return any(
        (folder / name).exists()
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    )


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Read every tensor of the folder, by name, from an index or a single file; safetensors are preferred."""
    for single in SINGLE_FILES:
        index = folder / f"{single}.index.json"
        if (folder / single).exists():
            return _read_file(folder / single)
        if index.exists():
            return _read_sharded(folder, index)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = f"; it has {', '.join(shards)}, but the index of these shards is missing" if shards else ""
    raise ConversionError(f"{folder} has neither {' nor '.join(SINGLE_FILES)} nor an index of shards{hint}")


def weight_map(index: Path) -> dict[str, str]:
    """File of each tensor, by an index of shards."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(map(is_name, itertools.chain(*found.items()))):
        raise ConversionError(f"{index} has no weight_map from tensor names to file names; copy it again")
    return found


def _read_sharded(folder: Path, index: Path) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    problems = []
    listed_in: dict[str, set[str]] = {}
    for tensor, name in weight_map(index).items():
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


def _prediction_layers(
    spec: ModelSpec, family: Family, tensors: Mapping[str, Weight], without: bool
) -> tuple[ModelSpec, set[str], list[str]]:
    """Spec with the layers of multi-token prediction that are converted, names of tensors that are left out, and notes.

    transformers drops these layers when it saves a model, but leaves their number in config.json.
    """
    if not spec.mtp:
        return spec, set(), []
    names = HFNames(family, spec)
    needed = [ref for ref in refs(spec) if ref.stack == MTP]
    stored = {name for ref in needed for name in (*names.names(ref), names.fused_name(ref)) if name in tensors}
    stored |= {name for ref in refs(spec) if ref.layer is None for name in names.replica_names(ref) if name in tensors}
    if stored and not without:
        return spec, set(), []
    layers = count(len(spec.mtp), "layer")
    why = (
        f"with {count(len(stored), 'tensor')}, as --without-mtp says" if stored else "since the files have none of them"
    )
    note = f"{layers} of multi-token prediction in config.json: left out, {why}"
    return dataclasses.replace(spec, mtp=()), stored, [note]


def _match(
    folder: Path, spec: ModelSpec, names: HFNames, tensors: Mapping[str, Weight], ignored: set[str]
) -> tuple[dict[Ref, tuple[Piece, ...]], dict[Ref, tuple[Piece, ...]]]:
    """Match tensors with refs; returns pieces and replicas of every ref. Missing, extra and misshapen ones are raised together."""
    heading = f"{folder}: the tensors do not match the model that config.json describes:"
    matcher = Matcher(tensors, ignored, heading, "config.json requires")
    pieces: dict[Ref, tuple[Piece, ...]] = {}
    for ref in refs(spec):
        parts = names.parts(ref, fused=names.fused_name(ref) in tensors)
        found = [(part, matcher.take(part.name, ref, part.stored_shape)) for part in parts]
        pieces[ref] = tuple(_piece(part, data) for part, data in found if data is not None)
    replicas = _replicas(spec, names, tensors)
    matcher.strike(name for copies in replicas.values() for _, name, _ in (piece.name for piece in copies))
    matcher.close(f"is not a tensor of the {spec.family} family with this config.json")
    return pieces, replicas


def _piece(part: Part, data: Weight, note: str = "") -> Piece:
    name = StoredName(os.path.basename(data.path), part.name, note)
    return Piece(part.view(data), part.rows, 0, name, part.value)


def _replicas(spec: ModelSpec, names: HFNames, tensors: Mapping[str, Weight]) -> dict[Ref, tuple[Piece, ...]]:
    """Stored copies of embeddings and head: a tied model's lm_head, and those in layers of multi-token prediction."""
    found: dict[Ref, tuple[Piece, ...]] = {}
    embeddings, head = Ref(SLOTS["word_embeddings"]), Ref(SLOTS["output_layer"])
    copies = [(embeddings, name, "") for name in names.replica_names(embeddings)]
    copies += [(embeddings if spec.tied else head, name, "") for name in names.replica_names(head)]
    if spec.tied:
        copies += [(embeddings, name, "tied; pass --untie to keep it apart") for name in names.names(head)]
    for ref, name, note in copies:
        (part,) = names.parts(ref, fused=False)
        data = tensors.get(name)
        if data is None:
            continue
        if data.shape != part.stored_shape:
            tied = "config.json ties it to the embeddings" if note else f"it repeats {part.name},"
            raise ConversionError(f"{name} has shape {list(data.shape)}, but {tied} of shape {list(part.stored_shape)}")
        found[ref] = (*found.get(ref, ()), _piece(part._replace(name=name), data, note))
    return found

"""Source for Hugging Face folders: config.json, and safetensors or `pytorch_model*.bin` files, memory-mapped.

A file of weights alone can be read, too, with the config.json beside it or that of a reference model.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...assets.code_files import code_files
from ...assets.origin import Origin, file_identities
from ...basics.dtypes import DType, dtype_named
from ...basics.errors import ConversionError, UsageError
from ...basics.json_files import read_json
from ...basics.quantities import count, few
from ...conversion import zero_bias
from ...conversion.composing import Piece, Sources, StoredName
from ...conversion.endpoint import first_dtype, with_main_dtype
from ...conversion.left_out import LeftOut
from ...conversion.matching import Matcher
from ...families import FAMILIES
from ...families.config_json import config_notes, spec_from_config
from ...families.heads import BASE_NOTE, class_of
from ...families.quantisation import unquantised
from ...families.table import Family
from ...model.layouts import SAME, row_maps
from ...model.slots import MTP, SLOTS, Ref, refs
from ...model.spec import ModelSpec
from ...storage.decoding import Constant, UnitRows
from ...storage.tensor import StoredTensor
from .parts import HFNames, Part, constants
from .quantised import Weight, decoded
from .text_part import text_part_of
from .weight_files import ADAPTER, WeightFiles, ghost_line, read_file, read_weights
from .wrapping import Wrapping, refuse_adapters, wrapping_of

_CONFIG = "config.json"
_ZERO_BIAS_NOTE = (
    "the output biases of attention are 0 everywhere: left out, since the model is the same without; a Hugging Face folder that is "
    "written has them again"
)


class HFSource:
    """Hugging Face folder or file of weights, with every tensor checked against config.json by name and shape.

    A file's configuration and tokenizer are those of the folder `reference`, by default of the folder where it lies. `untie` keeps
    a stored lm_head although config.json ties it, `without_mtp` leaves out layers of multi-token prediction.
    `ignored_tensors` are patterns of names of tensors that are left out.
    """

    def __init__(
        self,
        path: Path,
        *,
        reference: Path | None = None,
        ignored_config: Sequence[str] = (),
        untie: bool = False,
        without_mtp: bool = False,
        ignored_tensors: Sequence[str] = (),
    ) -> None:
        single = path.is_file()
        folder = (reference or path.parent) if single else path
        if single and not (folder / _CONFIG).exists():
            remedy = "with --hf-config DIR" if reference is None else "that has one"
            raise UsageError(
                f"{path} holds weights alone, and {folder} has no {_CONFIG}; give the folder of a reference model {remedy}"
            )
        if (folder / ADAPTER).exists():  # transformers would load the adapter with the base model that it names
            raise ConversionError(
                f"{folder / ADAPTER} describes a PEFT adapter, which cannot be converted; merge it into its model, or remove this "
                "file to convert the model without it"
            )
        config = read_json(folder / _CONFIG)
        spec = spec_from_config(config, ignored_config)
        if untie:
            spec = dataclasses.replace(spec, tied=False)
        files = WeightFiles(read_file(path)) if single else read_weights(folder)
        dropped = LeftOut(ignored_tensors)
        stored, ghosts = dropped.kept(files.tensors), dropped.kept(files.ghosts)
        refuse_adapters(path, stored)
        part = text_part_of(folder, config, spec, stored, ghosts)
        family, spec, stored, ghosts = part.family, part.spec, part.stored, part.ghosts
        weights = decoded(path, config, stored)
        wrapping = wrapping_of(weights.tensors, ghosts, family, spec)
        tensors = wrapping.as_table(weights.tensors)
        missing = wrapping.as_table(ghosts)
        spec, head_notes = _without_head(spec, family, {*stored, *ghosts}, {*tensors, *missing}, untie)
        spec, left_out, notes = _prediction_layers(spec, family, {*tensors, *missing}, without_mtp)
        names = HFNames(family, spec)
        ignored = {name for name in tensors if name.endswith(family.ignored_suffixes)}
        experts = (ref for ref in refs(spec) if ref.expert is not None)
        #: Whether experts are in fused tensors, as transformers 5 has them in memory.
        self.fused = any(names.fused_name(ref) in tensors for ref in itertools.islice(experts, 1))
        why = partial(_why_missing, config, spec, names, missing)
        heading = f"{path}: the tensors do not match the model that config.json describes:"
        matcher = Matcher(tensors, ignored | left_out, heading, "config.json requires", wrapping.in_file, why, dropped)
        self._pieces, self._replicas = _match(spec, names, tensors, matcher, wrapping)
        zero = self._take_out_zero_bias(spec)
        spec = zero_bias.without(spec) if zero else spec
        self.spec, dtype_notes = with_main_dtype(spec, self.dtype_of)
        code = code_files(folder)
        beside = {**code, **({} if part.carried is None else part.carried.files)}
        generation = folder / "generation_config.json"
        self.origin = Origin(
            described=str(path),
            hf_config=unquantised(config),
            generation_config=read_json(generation) if generation.exists() else None,
            tokenizer=str(folder) if _has_tokenizer(folder) else None,
            code_files=code,
            carried=part.carried,
            notes=[
                *files.notes,
                *part.notes,
                *wrapping.notes,
                *head_notes,
                *notes,
                *_ghost_note(ghosts),
                *([_ZERO_BIAS_NOTE] if zero else []),
                *_constant_notes(family, spec),
                *_unread_notes(self._pieces),
                *dropped.notes,
                *weights.notes,
                *_unit_notes(self._pieces),
                *_dtype_note(config, self.spec),
                *dtype_notes,
                *config_notes(config),
            ],
            ignored=[
                *(f"{wrapping.in_file(name)} (no weight)" for name in sorted(ignored)),
                *(f"{wrapping.in_file(name)} (multi-token prediction)" for name in sorted(left_out & tensors.keys())),
                *(f"{name} (0 everywhere)" for name in zero),
                *weights.left_out,
                *dropped.ignored,
            ],
            identity=file_identities(path, files.paths | {str(folder / _CONFIG), *map(str, beside.values())}),
        )

    def dtype_of(self, ref: Ref) -> DType:
        """Dtype of a ref in the files."""
        return first_dtype(self._pieces[ref])

    def read(self, ref: Ref) -> Sources:
        """Pieces of a ref; further copies of embeddings and head are replicas."""
        return Sources(self._pieces[ref], self._replicas.get(ref, ()))

    def close(self) -> None:
        """Do nothing: every tensor was matched when the folder was opened."""

    def _take_out_zero_bias(self, spec: ModelSpec) -> list[str]:
        """Take output biases that are 0 everywhere out of the pieces, if Megatron-LM would lack a place for them; their names."""
        biases = [ref for ref in self._pieces if ref.slot.name == zero_bias.SLOT]
        if not zero_bias.is_alone(spec) or not all(zero_bias.all_zero(self._pieces[ref]) for ref in biases):
            return []
        return [piece.name.tensor for ref in biases for piece in self._pieces.pop(ref)]


def _without_head(
    spec: ModelSpec, family: Family, stored: Collection[str], tensors: Collection[str], untie: bool
) -> tuple[ModelSpec, list[str]]:
    """Spec of a base model where the files are of one, whatever class config.json names: without prefix and head; and notes.

    So are published embedding models, such as Qwen3-Embedding-8B. `stored` are names in the files, `tensors` those of the table.
    """
    base = family.base_prefix
    head = HFNames(family, spec).names(Ref(SLOTS["output_layer"])) if "output_layer" in family.tensors else ()
    prefixed = not base or any(name.startswith(base) for name in stored)
    if spec.num_labels is not None or spec.tied or untie or prefixed or not {*head}.isdisjoint(tensors):
        return spec, []
    return spec.replaced(num_labels=0, tied=True, head_bias=False), [
        f"the names lack the prefix {base!r}, and there is no {', '.join(head)}: the files are of {class_of(family, 0)}",
        BASE_NOTE,
    ]


def _has_tokenizer(folder: Path) -> bool:
    return any(
        (folder / name).exists()
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    )


def _prediction_layers(
    spec: ModelSpec, family: Family, tensors: Collection[str], without: bool
) -> tuple[ModelSpec, set[str], list[str]]:
    """Spec with the layers of multi-token prediction that are converted, names of tensors that are left out, and notes.

    transformers drops these layers when it saves a model, but leaves their number in config.json.
    """
    prefix, reason = family.unheld_prediction
    unheld = {name for name in tensors if prefix and name.startswith(prefix)}
    if unheld and not without:
        raise ConversionError(
            f"the files have {count(len(unheld), 'tensor')} of multi-token prediction ({prefix}*), which cannot be converted: "
            f"{reason}; pass --without-mtp to leave them out"
        )
    if unheld:
        return (
            spec,
            unheld,
            [f"multi-token prediction: left out, {count(len(unheld), 'tensor')}, as --without-mtp says"],
        )
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


def _why_missing(
    config: Mapping[str, Any], spec: ModelSpec, names: HFNames, ghosts: Mapping[str, str], name: str
) -> str:
    """What else is known of a tensor that is not there: the index names a file for it, or a model without a head is not tied."""
    if name in ghosts:
        return f": {ghost_line(name, ghosts[name])}"
    key = next(
        (key for rule in FAMILIES[spec.family].rules if getattr(rule, "field", "") == "tied" for key in rule.keys), ""
    )
    if spec.tied or not key or name not in names.names(Ref(SLOTS["output_layer"])):
        return ""
    if config.get(key):
        return f": {key} is true in config.json; leave --untie out"
    stated = f"{key} is {str(config[key]).lower()} in config.json" if key in config else f"config.json has no {key}"
    return f": {stated}, so that it is not tied to the embeddings; if the model has no head of its own, set it to true"


def _match(
    spec: ModelSpec,
    names: HFNames,
    tensors: Mapping[str, Weight],
    matcher: Matcher[str, Weight],
    wrapping: Wrapping,
) -> tuple[dict[Ref, tuple[Piece, ...]], dict[Ref, tuple[Piece, ...]]]:
    """Match tensors with refs; returns pieces and replicas of every ref. Missing, extra and misshapen ones are raised together."""
    pieces: dict[Ref, tuple[Piece, ...]] = {}
    for ref in refs(spec):
        parts = names.parts(ref, fused=names.fused_name(ref) in tensors)
        found = [(part, matcher.take(part.name, ref, part.stored_shape)) for part in parts]
        pieces[ref] = tuple(
            piece for part, data in found if data is not None for piece in _pieces(part, data, wrapping)
        )
    copies = list(_replicas(spec, names, tensors))
    matcher.strike(part.name for _, part, _ in copies)
    matcher.close(f"is not a tensor of the {spec.family} family with this config.json")
    empty = [ref for ref, found in pieces.items() if not found]
    if empty:
        dtype = _dtype_of_most(pieces)
        pieces |= {ref: (_constant(names, ref, spec, dtype),) for ref in empty}
    replicas: dict[Ref, tuple[Piece, ...]] = {}
    for ref, part, note in copies:
        replicas[ref] = (*replicas.get(ref, ()), *_pieces(part, tensors[part.name], wrapping, note))
    return pieces, replicas


def _dtype_of_most(pieces: Mapping[Ref, Sequence[Piece]]) -> DType:
    """Dtype of most stored elements."""
    elements: Counter[DType] = Counter()
    for piece in itertools.chain(*pieces.values()):
        elements[piece.data.dtype] += math.prod(piece.data.shape)
    return elements.most_common(1)[0][0]


def _constant(names: HFNames, ref: Ref, spec: ModelSpec, dtype: DType) -> Piece:
    """Piece of a ref that has no tensor, since all of its elements are the same."""
    (rows,) = row_maps(SAME, ref.slot, spec, ref.kind(spec))
    data = Constant(dtype, ref.shape(spec), names.constant(ref) or 0.0)
    return Piece(data, rows, 0, StoredName("no file", f"{ref} of the {spec.family} family"))


def _pieces(part: Part, data: Weight, wrapping: Wrapping, note: str = "") -> Iterator[Piece]:
    stored = wrapping.in_file(part.name) if isinstance(data, StoredTensor) else data.name
    name = StoredName(os.path.basename(data.path), stored, note)
    for col, view in part.read(data):
        yield Piece(view, part.rows, col, name, part.value)


def _unit_notes(pieces: Mapping[Ref, tuple[Piece, ...]]) -> list[str]:
    """Note on each tensor whose rows are divided by their lengths."""
    return [
        f"{piece.name.tensor}: {piece.data.computed}, as the model's own code does when it runs; its lengths are not kept"
        for parts in pieces.values()
        for piece in parts
        if isinstance(piece.data, UnitRows)
    ]


def _ghost_note(ghosts: Mapping[str, str]) -> list[str]:
    """Note on tensors that only the index has; matching has refused those that the model needs."""
    if not ghosts:
        return []
    named = few(sorted(ghosts))
    return [
        f"the index names {count(len(ghosts), 'tensor')} that no file has, and the model needs none of them: {named}"
    ]


def _constant_notes(family: Family, spec: ModelSpec) -> list[str]:
    """Note on slots that the files leave out, since all of their elements are the same."""
    left_out = constants(family, spec)
    held = {ref.slot.name for ref in refs(spec)} if left_out else ()
    values = {slot: value for slot, value in left_out.items() if slot in held}
    by_value = {value: [name for name, each in values.items() if each == value] for value in values.values()}
    listed = "; ".join(f"{value:g} in {', '.join(found)}" for value, found in by_value.items())
    if not listed:
        return []
    return [
        f"this {family.name} model has no tensors where Megatron-LM has weights: {listed}. Training changes them, and a model with "
        "other values cannot be written as this one again"
    ]


def _unread_notes(pieces: Mapping[Ref, Sequence[Piece]]) -> Iterator[str]:
    """Notes on rows of tensors that are none of a slot's."""
    for piece in itertools.chain(*pieces.values()):
        if piece.rows[0] < 0:
            rows = int(np.count_nonzero(piece.rows < 0))
            yield f"{count(rows, 'row')} of {piece.name.tensor}, which the model does not read, are left out"


def _dtype_note(config: Mapping[str, Any], spec: ModelSpec) -> list[str]:
    """Note on another dtype in config.json than the model's weights have."""
    stated = next((config[key] for key in ("torch_dtype", "dtype") if config.get(key) is not None), None)
    if stated is None or dtype_named(str(stated)) == spec.dtype:
        return []
    return [f"config.json says {stated}, but the weights are {spec.dtype}, which is taken for the model's dtype"]


def _replicas(spec: ModelSpec, names: HFNames, tensors: Mapping[str, Weight]) -> Iterator[tuple[Ref, Part, str]]:
    """Stored copies of embeddings and head: a tied model's lm_head, and those in layers of multi-token prediction."""
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
        yield ref, part._replace(name=name), note

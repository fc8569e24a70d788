"""Target for Hugging Face folders: sharded safetensors, index, config.json, generation config, tokenizer, training arguments."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...assets import capacity_bins
from ...assets.code_files import write_code_files
from ...assets.origin import Origin
from ...assets.tokenizer import (
    generation_config,
    recorded_name,
    refuse_other_tokenizer,
    token_ids,
    tokenizer_files,
    tokenizer_token_ids,
    write_tokenizer,
)
from ...assets.training_args import margs_to_json
from ...basics.dtypes import DType
from ...basics.errors import ConversionError, UsageError
from ...basics.json_files import write_json
from ...basics.quantities import count, size
from ...conversion.endpoint import main_dtype
from ...conversion.journal import MANIFEST, unchanged_beside
from ...conversion.outline import Fill, Outline
from ...conversion.staging import Staging
from ...conversion.stored_model import StoredModel
from ...families import FAMILIES
from ...families.config_json import config_for, config_from_spec, missing_code
from ...model.layouts import SAME, interned, row_maps
from ...model.slots import SLOTS, Ref, refs
from ...model.spec import ModelSpec
from ...model.values import composed, inverse
from ...storage import marks
from ...storage.output_file import FileLayout
from ...storage.shards import Stored, layout, split
from ...storage.tensor import MemoryTensor, StoredTensor, zeros
from .options import FUSED, HFOptions
from .other_family import origin_elsewhere, stored_as
from .parts import HFNames, Part
from .text_part import table_for
from .zero_bias import with_zero_bias

_INDEX = "model.safetensors.index.json"
#: Files moved last: no reader takes a folder without them for a model.
_MOVED_LAST = (_INDEX, "config.json")
_GENERATION, _MARGS = "generation_config.json", "source_megatron_args.json"
#: Patterns of the files that transformers reads a model from, those that name other files first.
_MODEL_PATTERNS = (
    "config.json",
    "*.safetensors.index.json",
    "pytorch_model*.index.json",
    "model*.safetensors",
    "pytorch_model*.bin",
)
_LLAMA2_VOCABULARY, _LLAMA3_VOCABULARY = 32000, 128256


def named_shards(tensors: list[Stored], limit: int) -> dict[str, list[Stored]]:
    """Tensors of each file, by the names that huggingface_hub gives to files of at most `limit` bytes."""
    shards = split(tensors, limit)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


class HFTarget:
    """Hugging Face folder that appears in `save_dir` only when it is complete."""

    #: Name of the output in that of its hidden folder.
    _name = "hf"

    def __init__(self, save_dir: Path, options: HFOptions) -> None:
        self.save_dir = save_dir
        self._options = options
        self._file_names: dict[str, str] = {}
        self._notes: list[str] = []
        #: Number of rows that no slot has, at the beginning of tensors, by name.
        self._unread: dict[str, int] = {}

    def prepare(self, spec: ModelSpec, origin: Origin, dtype_of: Callable[[Ref], DType]) -> Outline:
        """Lay out all files; raises `ConversionError` if the options do not fit the model."""
        _check_model_type(self._options.source_model_type, spec)
        asked = self._options.as_family
        own = asked in (None, spec.family)
        self._stored = StoredModel(with_zero_bias(spec)) if own else stored_as(spec, str(asked))
        self._spec = dataclasses.replace(self._stored.spec, dtype=main_dtype(spec, dtype_of))
        if not own and origin.carried is not None:
            from ...assets.side_file import refuse_carried

            refuse_carried(origin, f"a model of the {asked} family")
        self._origin = origin
        table = table_for(FAMILIES[self._spec.family], origin)
        self._names = HFNames(table, self._spec, bare=self._spec.num_labels == 0)
        self._dtype_of = dtype_of
        self._parts_of: dict[Ref, list[Part]] = {}
        self._config, self._changed = self._configuration(spec.family)
        self._model_type = self._options.source_model_type or _token_family(self._spec)
        stored: dict[str, Stored] = {}
        held = set(refs(spec))
        zero: dict[str, MemoryTensor] = {}
        for ref in refs(self._spec):
            dtype = dtype_of(ref) if ref in held else self._spec.dtype
            for part in self._parts(ref):
                tensor = Stored(part.name, dtype, part.stored_shape, part.stored_parts)
                if part.unread:
                    self._unread[part.name] = part.unread
                    zero[part.name] = zeros(dtype, (part.unread, *part.shape[1:]))
                if ref not in held:
                    zero[part.name] = zeros(dtype, part.stored_shape)
                if stored.setdefault(part.name, tensor) != tensor:
                    raise ConversionError(
                        f"{ref} is {tensor.dtype}, but others in {part.name} are {stored[part.name].dtype}; "
                        "choose one dtype for all, or write experts as separate tensors"
                    )
        carried = {} if origin.carried is None else origin.carried.tensors
        stored |= {name: Stored(name, data.dtype, data.shape, 1) for name, data in carried.items()}
        given: dict[str, StoredTensor | MemoryTensor] = {**zero, **carried}
        shards = self._split(list(stored.values()))
        self._file_names = {tensor.name: file for file, shard in shards.items() for tensor in shard}
        self._total = sum(tensor.nbytes for tensor in stored.values())
        options = {
            **dataclasses.asdict(self._options),
            "overwrite": None,
            "tokenizer": recorded_name(self._options.tokenizer),
            "format": "hf",
            "dtype": self._spec.dtype.name,
        }
        layouts = {file: self._layout(shard) for file, shard in shards.items()}
        extra = {
            file: {tensor.name: given[tensor.name] for tensor in shard if tensor.name in given}
            for file, shard in shards.items()
        }
        return Outline(self._name, layouts, options, extra, content=self._small_files({}))

    def _configuration(self, family: str) -> tuple[dict[str, Any], list[str]]:
        """config.json to write, and what differs from the source's; another `family` has nothing of that but token ids."""
        if self._spec.family == family:
            return config_for(self._spec, self._origin.hf_config, self._origin.code_files)
        self._origin = origin_elsewhere(self._origin, self._stored, family)
        return {**config_from_spec(self._spec), **(self._origin.hf_config or {})}, []

    @property
    def output(self) -> Path:
        """Folder of the model, which is `save_dir` itself."""
        return self.save_dir

    @property
    def manifest(self) -> Path:
        """Manifest in the folder of the model."""
        return self.save_dir / MANIFEST

    @property
    def marker(self) -> str | None:
        """config.json, unless all is to be overwritten."""
        return None if self._options.overwrite else "config.json"

    def shown(self) -> Path | None:
        """Return the folder if it has a config.json that is not to be overwritten; else None."""
        there = (self.save_dir / "config.json").exists() and not self._options.overwrite
        return self.save_dir if there else None

    def refuse_existing(self) -> None:
        """Raise if the folder holds a model or files of one, unless `overwrite` is set, or a model of another format."""
        marks.refuse_others(self.save_dir, marks.META, marks.RANKS, marks.MODEL_PT, marks.MINDSPORE)
        if self._options.overwrite:
            return
        model, beside = self._model_files(), [path for path in self._small_paths() if os.path.lexists(path)]
        if model or beside:
            what = "a model" if model else "files of a model"
            names = ", ".join(path.name for path in [*model, *beside])
            alone = "" if self._options.tokenizer is None else "; a tokenizer alone can be copied there by hand"
            raise ConversionError(
                f"{self.save_dir} already holds {what} ({names}); save elsewhere or pass --overwrite{alone}"
            )

    def fills(self, ref: Ref) -> Iterator[Fill]:
        """Fills of one ref; for one that the family has no tensor for, what its elements must be."""
        value = self._names.constant(ref)
        if value is not None:
            (rows,) = row_maps(SAME, ref.slot, self._spec, ref.kind(self._spec))
            family = self._spec.family
            why = (
                f"the {family} model that the configuration describes has no tensor for it, so that this model is another; give a "
                "configuration that has one with --hf-config, or write another family with --as"
            )
            yield Fill("", why, self._dtype_of(ref), ref.shape(self._spec), rows, 0, constant=value)
        for part in self._parts(ref):
            dtype, unread = self._dtype_of(ref), part.unread
            start = (part.number * part.shape[0] + unread) * math.prod(part.shape[1:]) * dtype.itemsize
            file = self._file_names[part.name]
            rows = interned(part.rows[unread:]) if unread else part.rows
            fill = Fill(
                *(file, part.name, dtype, (rows.size, *part.shape[1:]), rows, 0, start, part.transposed),
                swapped=part.swapped,
            )
            fill = self._stored.fill(ref, fill)
            yield fill if part.value is None else fill._replace(value=composed(fill.value, inverse(part.value)))

    def clear(self, staging: Staging) -> None:
        """Remove an older model's files, those that name others first, so that a mixture of two models never looks complete."""
        beside = self._small_paths()
        if tokenizer_files(staging.files):  # without a new tokenizer the old one stays
            beside += tokenizer_files(self.save_dir)
        for path in [*self._model_files(), *beside]:
            path.unlink(missing_ok=True)

    def show(self, staging: Staging) -> list[str]:
        """Move the files into place, index and config.json last; returns lines for the user."""
        staging.move_into(self.save_dir, _MOVED_LAST)
        files = len(set(self._file_names.values()))
        return [
            f"wrote {count(len(self._file_names), 'tensor')} ({size(self._total)}) in {count(files, 'file')} to {self.save_dir}",
            *self._notes,
        ]

    def _split(self, stored: list[Stored]) -> dict[str, list[Stored]]:
        """Tensors of each file."""
        return named_shards(stored, self._options.max_shard_size)

    def _layout(self, shard: list[Stored]) -> FileLayout:
        """Layout of a file with these tensors."""
        return layout(shard, {"format": "pt"})

    def _parts(self, ref: Ref) -> list[Part]:
        """Parts of a ref, and the copies of it that layers of multi-token prediction repeat. They are asked for several times."""
        found = self._parts_of.get(ref)
        if found is None:
            found = self._parts_of[ref] = self._find_parts(ref)
        return found

    def _find_parts(self, ref: Ref) -> list[Part]:
        """The same, found anew."""
        parts = self._names.parts(ref, fused=self._options.expert_layout == FUSED)
        copies = self._names.replica_names(ref)
        if ref.slot.name == "word_embeddings" and self._spec.tied:
            copies = [*copies, *self._names.replica_names(Ref(SLOTS["output_layer"]))]
        return [*parts, *(parts[0]._replace(name=name) for name in copies)]

    def _model_files(self) -> list[Path]:
        return [path for pattern in _MODEL_PATTERNS for path in sorted(self.save_dir.glob(pattern))]

    def _small_paths(self) -> list[Path]:
        """Paths of a model's small files that an older model must not leave behind."""
        carried = () if self._origin.carried is None else self._origin.carried.files
        names = (_GENERATION, _MARGS, capacity_bins.FILE, MANIFEST, *self._origin.code_files, *carried)
        return [self.save_dir / name for name in names]

    def _code_notes(self) -> list[str]:
        """Note on code of the model that does not travel."""
        missing = missing_code(self._origin.hf_config or {}, self._origin.code_files)
        files = ", ".join(missing)
        return (
            [f"auto_map is left out of config.json: {files}, which it names, did not come with the model"]
            if missing
            else []
        )

    def assets(self, folder: Path) -> None:
        """Write the small files: configuration, index, training arguments and tokenizer."""
        origin, options = self._origin, self._options
        notes = [*origin.notes]
        notes += [f"config.json differs from the reference in {change}" for change in self._changed]
        notes += self._code_notes()
        notes += [
            f"{count(rows, 'row')} at the beginning of {name}, which the model does not read, are 0: no other format has them"
            for name, rows in self._unread.items()
        ]
        write_code_files(origin.code_files, folder)
        if origin.carried is not None:
            from ...assets.side_file import write_small_files

            write_small_files(origin.carried, folder)
        self._write_index(folder)
        notes += self._write_bins(folder)
        notes += write_tokenizer(
            options.tokenizer or origin.tokenizer,
            folder,
            vocab_size=self._spec.vocab_size,
            source_model_type=self._model_type,
            instruct=options.instruct,
            explicit=options.tokenizer is not None,
        )
        tokens, token_notes = self._token_ids(folder)
        notes += [*token_notes, *self._instruct_warnings()]
        for name, value in self._small_files(tokens).items():
            write_json(folder / name, value)
        self._notes = notes
        if not options.overwrite:
            refuse_other_tokenizer(folder, self.save_dir, ours=unchanged_beside(self.manifest))

    def _write_index(self, folder: Path) -> None:
        """Write the index of shards, if there are several."""
        if len(set(self._file_names.values())) > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(self._file_names.items()))}
            write_json(folder / _INDEX, index)

    def _small_files(self, tokens: dict[str, Any]) -> dict[str, Any]:
        """Contents by file name: configuration with these token ids, generation settings and training arguments."""
        origin = self._origin
        is_known = self._options.instruct and self._model_type is not None
        generation = generation_config(self._model_type) if is_known else origin.generation_config
        margs = None if origin.margs is None else margs_to_json(origin.margs)
        found = {"config.json": {**self._config, **tokens}, _GENERATION: generation, _MARGS: margs}
        return {name: value for name, value in found.items() if value is not None}

    def _instruct_warnings(self) -> list[str]:
        """Warning that --instruct has no settings for this model."""
        if not self._options.instruct or self._model_type is not None:
            return []
        kept = "no generation settings are" if self._origin.generation_config is None else "those that came with it are"
        return [
            f"warning: --instruct knows no end tokens and sampling of this {self._spec.family} model; {kept} written "
            "(--source-model-type names a Llama or Mixtral)"
        ]

    def _token_ids(self, folder: Path) -> tuple[dict[str, Any], list[str]]:
        """Begin and end token ids for config.json, where no source configuration has them, and notes for the user.

        Without them transformers uses defaults of its own: generation by a Llama would end at token 2, whatever that is.
        """
        options, configured = self._options, self._origin.hf_config is not None
        if configured and not options.instruct:
            return {}, []
        typical = token_ids(self._model_type, options.instruct)
        if configured or (typical and (options.instruct or options.source_model_type is not None)):
            return typical, []
        found = tokenizer_token_ids(folder)
        ids = {"bos_token_id": None, "eos_token_id": None, **(found or typical)}
        if not found and not typical:
            return ids, ["config.json names no begin and end tokens, since there is no tokenizer that has them"]
        origin = "the tokenizer" if found else f"{self._model_type}, whose vocabulary has this size"
        listed = ", ".join(f"{key} {number}" for key, number in (found or typical).items())
        return ids, [f"config.json has {listed} of {origin}"]

    def _write_bins(self, folder: Path) -> list[str]:
        bins, parallel, wanted = self._origin.capacity_bins, self._origin.parallel, self._options.save_capacity_bins
        if bins is None:
            return ["warning: there are no capacity bins to save"] if wanted else []
        if not wanted:
            return [capacity_bins.left_out_note(bins, "--save-capacity-bins")]
        if parallel is not None:
            capacity_bins.check(bins, self._spec, parallel)
        capacity_bins.write(bins, folder / capacity_bins.FILE)
        return [f"{len(bins.tensors)} capacity-bin buffers are in {capacity_bins.FILE}"]


def _check_model_type(given: str | None, spec: ModelSpec) -> None:
    """Raise if `given` does not fit the model. Habana has no name for Mistral, whose tokenizer is of Llama 2's kind."""
    if given is not None and spec.family not in (("mixtral",) if given == "mixtral" else ("llama", "mistral")):
        raise UsageError(
            f"--source-model-type {given} disagrees with the checkpoint, which holds a {spec.family} model; leave it out"
        )


def _token_family(spec: ModelSpec) -> str | None:
    """Model type whose begin and end tokens a Llama has, by its vocabulary size; None if the size does not tell."""
    if spec.family != "llama":
        return None
    if spec.vocab_size == _LLAMA3_VOCABULARY:
        return "llama3" if spec.values["rope_scaling"] is None else "llama3.1"
    return "llama2" if spec.vocab_size == _LLAMA2_VOCABULARY else None

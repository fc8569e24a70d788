"""Write a Hugging Face folder: sharded safetensors with index, config.json, generation config, tokenizer, training arguments."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path
from typing import Any

from ...assets import capacity_bins
from ...assets.origin import Origin
from ...assets.tokenizer import (
    generation_config,
    recorded_name,
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
from ...conversion.journal import MANIFEST
from ...conversion.outline import Fill, Outline
from ...conversion.staging import Staging
from ...families import FAMILIES
from ...families.config_json import config_for
from ...model.slots import SLOTS, Ref, refs
from ...model.spec import ModelSpec
from ...storage import safetensors
from ...storage.output_file import FileLayout
from .parts import HFNames, Part

_NAME = "hf"
#: One tensor for each part of each expert, as in published models, or what transformers 5 holds in memory.
SEPARATE, FUSED = "separate", "fused"
_INDEX = "model.safetensors.index.json"
#: Written last: a folder without them is not a model to anyone.
_LAST = (_INDEX, "config.json")
_GENERATION, _MARGS = "generation_config.json", "source_megatron_args.json"
#: What makes a folder a model to transformers, what names the other files first.
_OLD = (
    "config.json",
    "*.safetensors.index.json",
    "pytorch_model*.index.json",
    "model*.safetensors",
    "pytorch_model*.bin",
)
_LLAMA2_VOCABULARY, _LLAMA3_VOCABULARY = 32000, 128256


@dataclass(frozen=True)
class HFOptions:
    """How to write the folder. `max_shard_size` in bytes; `tokenizer` is a path that the user gave."""

    max_shard_size: int = 5 * 10**9
    overwrite: bool = False
    tokenizer: str | None = None
    instruct: bool = False
    source_model_type: str | None = None
    expert_layout: str = SEPARATE
    save_capacity_bins: bool = False


@dataclass(frozen=True)
class _Stored:
    """One tensor of the folder, and how many parts fill it."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    parts: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def split_shards(parts: list[_Stored], limit: int) -> dict[str, list[_Stored]]:
    """Files by name, in order: each takes tensors until the next would exceed `limit` bytes, as huggingface_hub does."""
    shards: list[list[_Stored]] = [[]]
    size = 0
    for part in parts:
        if shards[-1] and size + part.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


class HFTarget:
    """A Hugging Face folder that appears in `save_dir` when it is complete."""

    def __init__(self, save_dir: Path, options: HFOptions) -> None:
        self.save_dir = save_dir
        self._options = options
        self._file_of: dict[str, str] = {}
        self._notes: list[str] = []

    def prepare(self, spec: ModelSpec, origin: Origin, dtype_of: Callable[[Ref], DType]) -> Outline:
        """Lay out the shards."""
        _check_model_type(self._options.source_model_type, spec)
        self._spec = dataclasses.replace(spec, dtype=dtype_of(Ref(SLOTS["word_embeddings"])))
        self._names = HFNames(FAMILIES[spec.family], self._spec)
        self._origin = origin
        self._dtype_of = dtype_of
        self._config, self._changed = config_for(self._spec, origin.hf_config)
        self._model_type = self._options.source_model_type or _token_family(self._spec)
        stored: dict[str, _Stored] = {}
        for ref in refs(spec):
            for part in self._parts(ref):
                tensor = _Stored(part.name, dtype_of(ref), part.stored_shape, part.stored_parts)
                if stored.setdefault(part.name, tensor) != tensor:
                    raise ConversionError(
                        f"{ref} is {tensor.dtype}, but others in {part.name} are {stored[part.name].dtype}; "
                        "give one dtype for all, or write experts as separate tensors"
                    )
        shards = split_shards(list(stored.values()), self._options.max_shard_size)
        self._file_of = {tensor.name: file for file, shard in shards.items() for tensor in shard}
        self._total = sum(tensor.nbytes for tensor in stored.values())
        options = {
            **dataclasses.asdict(self._options),
            "overwrite": None,
            "tokenizer": recorded_name(self._options.tokenizer),
            "format": "hf",
            "dtype": self._spec.dtype.name,
        }
        layouts = {file: _layout(shard) for file, shard in shards.items()}
        return Outline(_NAME, layouts, options, content=self._small_files({}))

    @property
    def output(self) -> Path:
        """The folder itself."""
        return self.save_dir

    def shown(self) -> Path | None:
        """The folder itself, once its configuration is there."""
        there = (self.save_dir / "config.json").exists() and not self._options.overwrite
        return self.save_dir if there else None

    def refuse_existing(self) -> None:
        """A model in the folder, or a part of one, is replaced only when that is asked for."""
        if self._options.overwrite:
            return
        model, beside = self._old_files(), [path for path in self._beside() if os.path.lexists(path)]
        if model or beside:
            what = "a model" if model else "files of a model"
            names = ", ".join(path.name for path in [*model, *beside])
            raise ConversionError(f"{self.save_dir} already holds {what} ({names}); save elsewhere or pass --overwrite")

    def fills(self, ref: Ref) -> Iterator[Fill]:
        """The tensors of one slot."""
        for part in self._parts(ref):
            dtype = self._dtype_of(ref)
            start = part.number * math.prod(part.shape) * dtype.itemsize
            yield Fill(self._file_of[part.name], part.name, dtype, part.shape, part.rows, 0, start)

    def clear(self, staging: Staging) -> None:
        """Take away an older model's files, what names the others first, so that no mixture is ever complete."""
        beside = self._beside()
        if tokenizer_files(staging.files):  # an older tokenizer stays only where there is no newer one
            beside += tokenizer_files(self.save_dir)
        for path in [*self._old_files(), *beside]:
            path.unlink(missing_ok=True)

    def show(self, staging: Staging) -> list[str]:
        """Move the files into place, index and config last."""
        staging.move_into(self.save_dir, _LAST)
        files = len(set(self._file_of.values()))
        return [
            f"wrote {count(len(self._file_of), 'tensor')} ({size(self._total)}) in {count(files, 'file')} to {self.save_dir}",
            *self._notes,
        ]

    def _parts(self, ref: Ref) -> list[Part]:
        return self._names.parts(ref, fused=self._options.expert_layout == FUSED)

    def _old_files(self) -> list[Path]:
        return [path for pattern in _OLD for path in sorted(self.save_dir.glob(pattern))]

    def _beside(self) -> list[Path]:
        """Where small files of a model would be that no older one may leave behind."""
        return [self.save_dir / name for name in (_GENERATION, _MARGS, capacity_bins.FILE, MANIFEST)]

    def assets(self, folder: Path) -> None:
        """Write configuration, index, training arguments and tokenizer."""
        origin, options = self._origin, self._options
        notes = [*origin.notes]
        notes += [f"config.json differs from the reference in {change}" for change in self._changed]
        if len(set(self._file_of.values())) > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(self._file_of.items()))}
            write_json(folder / _INDEX, index)
        notes += self._write_bins(folder)
        notes += write_tokenizer(
            options.tokenizer or origin.tokenizer,
            folder,
            vocab_size=self._spec.vocab_size,
            source_model_type=self._model_type,
            instruct=options.instruct,
            explicit=options.tokenizer is not None,
        )
        tokens, notes_of_tokens = self._token_ids(folder)
        notes += notes_of_tokens
        for name, value in self._small_files(tokens).items():
            write_json(folder / name, value)
        self._notes = notes
        if not options.overwrite:
            self._refuse_tokenizer(folder)

    def _refuse_tokenizer(self, folder: Path) -> None:
        """Raise if the folder has another tokenizer, or a part of one, than will be written: it may be the user's own."""
        ours = {path.relative_to(folder): path for path in tokenizer_files(folder)}
        theirs = {path.relative_to(self.save_dir): path for path in tokenizer_files(self.save_dir)}
        other = [
            str(name) for name, path in theirs.items() if name not in ours or not cmp(path, ours[name], shallow=False)
        ]
        if ours and other:
            raise ConversionError(
                f"{self.save_dir} already holds another tokenizer ({', '.join(other)}); save elsewhere or pass --overwrite"
            )

    def _small_files(self, tokens: dict[str, Any]) -> dict[str, Any]:
        """Configuration with these tokens, generation settings and training arguments, by file."""
        origin = self._origin
        generation = generation_config(self._model_type) if self._options.instruct else origin.generation_config
        margs = None if origin.margs is None else margs_to_json(origin.margs)
        found = {"config.json": {**self._config, **tokens}, _GENERATION: generation, _MARGS: margs}
        return {name: value for name, value in found.items() if value is not None}

    def _token_ids(self, folder: Path) -> tuple[dict[str, Any], list[str]]:
        """What config.json is to say of the tokens that begin and end a text, where no configuration did, and notes on it.

        Without a word there transformers takes numbers of its own: generation by a Llama would end at token 2, whatever that is.
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
            return ids, ["config.json names no begin and end tokens, since no tokenizer tells them"]
        by = "the tokenizer" if found else f"{self._model_type}, whose vocabulary has this size"
        said = ", ".join(f"{key} {number}" for key, number in (found or typical).items())
        return ids, [f"config.json has {said} of {by}"]

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
    """Mistral has no name among Habana's, and its tokenizer is of Llama 2's kind."""
    if given is not None and spec.family not in (("mixtral",) if given == "mixtral" else ("llama", "mistral")):
        raise UsageError(
            f"--source-model-type {given} disagrees with the checkpoint, which holds a {spec.family} model"
        )


def _token_family(spec: ModelSpec) -> str | None:
    """Whose begin and end tokens a Llama has, by its vocabulary; None if that does not say."""
    if spec.family != "llama":
        return None
    if spec.vocab_size == _LLAMA3_VOCABULARY:
        return "llama3" if spec.rope_scaling is None else "llama3.1"
    return "llama2" if spec.vocab_size == _LLAMA2_VOCABULARY else None


def _layout(shard: list[_Stored]) -> FileLayout:
    layout = safetensors.layout({tensor.name: (tensor.dtype, tensor.shape) for tensor in shard}, {"format": "pt"})
    return dataclasses.replace(layout, parts={tensor.name: tensor.parts for tensor in shard if tensor.parts > 1})

"""Write a Hugging Face folder: sharded safetensors with index, config.json, generation config, tokenizer, training arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import capacity_bins
from ..dtypes import DType
from ..errors import ConversionError, UsageError
from ..execute import Executor, Target
from ..families import FAMILIES
from ..hf_config import config_for, write_json
from ..layouts import row_maps
from ..margs_json import margs_to_json
from ..plan import Sources
from ..slots import SLOTS, Ref, refs
from ..spec import ModelSpec
from ..staging import Staging, check_space, opened
from ..storage import safetensors
from ..storage.output import Layout, OutputFile
from ..tokenizer import generation_config, token_ids, tokenizer_files, write_tokenizer
from .base import Origin
from .hf_source import part_names, part_shapes

_NAME = "hf"
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
    save_capacity_bins: bool = False


@dataclass(frozen=True)
class _Part:
    """One tensor of the folder."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


def split_shards(parts: list[_Part], limit: int) -> dict[str, list[_Part]]:
    """Files by name, in order: each takes tensors until the next would exceed `limit` bytes, as huggingface_hub does."""
    shards: list[list[_Part]] = [[]]
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
        self._dir = save_dir
        self._options = options
        self._staging: Staging | None = None
        self._files: dict[str, OutputFile] = {}
        self._file_of: dict[str, str] = {}
        self._dtypes: dict[str, DType] = {}

    def prepare(self, spec: ModelSpec, origin: Origin, dtype_of: Callable[[Ref], DType]) -> int:
        """Write what is small and lay out the shards, in a hidden folder beside their final place."""
        self._refuse_existing()
        _check_model_type(self._options.source_model_type, spec)
        self._spec = dataclasses.replace(spec, dtype=dtype_of(Ref(SLOTS["word_embeddings"])))
        self._origin = origin
        self._config, self._changed = config_for(self._spec, origin.hf_config)
        self._model_type = self._options.source_model_type or _token_family(self._spec)
        if origin.hf_config is None or self._options.instruct:
            self._config.update(token_ids(self._model_type, self._options.instruct))
        family = FAMILIES[spec.family]
        parts = [
            _Part(name, dtype_of(ref), shape)
            for ref in refs(spec)
            for name, shape in zip(part_names(family, ref), part_shapes(family, ref, spec), strict=True)
        ]
        shards = split_shards(parts, self._options.max_shard_size)
        layouts = {file: _layout(shard) for file, shard in shards.items()}
        check_space(self._dir, sum(layout.nbytes for layout in layouts.values()))
        self._staging = staging = Staging(self._dir, _NAME)
        for file, layout in layouts.items():
            self._files[file] = layout.create(staging.path / file)
            self._file_of.update(dict.fromkeys(layout.regions, file))
        self._dtypes = {part.name: part.dtype for part in parts}
        self._total = sum(part.nbytes for part in parts)
        self._notes = self._write_assets(staging.path)
        return self._total

    def write(self, ref: Ref, sources: Sources, executor: Executor) -> None:
        """Fill the tensors of one slot."""
        family = FAMILIES[self._spec.family]
        maps = row_maps(family.tensors[ref.slot.name].layout, ref.slot, self._spec)
        shapes = part_shapes(family, ref, self._spec)
        for name, rows, shape in zip(part_names(family, ref), maps, shapes, strict=True):
            file = self._files[self._file_of[name]]
            executor.fill(Target(file, name, self._dtypes[name], shape, rows, 0), sources.pieces)

    def commit(self) -> list[str]:
        """Complete the files and move them into place, index and config last."""
        for file in self._files.values():
            file.close()
        self._remove_old()
        opened(self._staging).move_into(self._dir, _LAST)
        return [
            f"wrote {len(self._file_of)} tensors ({self._total / 1e9:.3f} GB) in {len(self._files)} file(s) to {self._dir}",
            *self._notes,
        ]

    def abort(self) -> None:
        """Remove the hidden folder."""
        for file in self._files.values():
            file.discard()
        if self._staging is not None:
            self._staging.discard()

    def _refuse_existing(self) -> None:
        found = [path.name for path in self._old_files()]
        if found and not self._options.overwrite:
            raise ConversionError(
                f"{self._dir} already holds a model ({', '.join(found)}); save elsewhere or pass --overwrite"
            )

    def _remove_old(self) -> None:
        """Take away an older model's files, what names the others first, so that no mixture is ever complete."""
        beside = [self._dir / name for name in (_GENERATION, _MARGS, capacity_bins.FILE)]
        if tokenizer_files(opened(self._staging).path):  # an older tokenizer stays only where there is no newer one
            beside += tokenizer_files(self._dir)
        for path in [*self._old_files(), *beside]:
            path.unlink(missing_ok=True)

    def _old_files(self) -> list[Path]:
        return [path for pattern in _OLD for path in sorted(self._dir.glob(pattern))]

    def _write_assets(self, folder: Path) -> list[str]:
        origin, options = self._origin, self._options
        notes = [*origin.notes]
        notes += [f"config.json differs from the reference in {change}" for change in self._changed]
        write_json(folder / "config.json", self._config)
        if len(self._files) > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(self._file_of.items()))}
            write_json(folder / _INDEX, index)
        generation = generation_config(self._model_type) if options.instruct else origin.generation_config
        if generation is not None:
            write_json(folder / _GENERATION, generation)
        if origin.margs is not None:
            write_json(folder / _MARGS, margs_to_json(origin.margs))
        notes += self._write_bins(folder)
        notes += write_tokenizer(
            options.tokenizer or origin.tokenizer,
            folder,
            vocab_size=self._spec.vocab_size,
            source_model_type=self._model_type,
            instruct=options.instruct,
            explicit=options.tokenizer is not None,
        )
        return notes

    def _write_bins(self, folder: Path) -> list[str]:
        bins, parallel, wanted = self._origin.capacity_bins, self._origin.parallel, self._options.save_capacity_bins
        if bins is None:
            return ["warning: there are no capacity bins to save"] if wanted else []
        if not wanted:
            return [capacity_bins.left_out(bins, "--save-capacity-bins")]
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


def _layout(shard: list[_Part]) -> Layout:
    return safetensors.layout({part.name: (part.dtype, part.shape) for part in shard}, {"format": "pt"})

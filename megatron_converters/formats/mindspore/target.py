"""Target for weights of MindSpore Transformers: parts as safetensors, a map of names, and the model's configuration as YAML.

Format: `mindspore.unified_safetensors` (mindspore 2.8 and 2.10), and the names of mindformers' training graphs (`names.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...assets.code_files import CODE_FOLDER, write_code_files
from ...assets.origin import Origin
from ...assets.tokenizer import recorded_name, refuse_other_tokenizer, tokenizer_files, write_tokenizer
from ...assets.training_args import margs_to_json
from ...basics.dtypes import DType, dtype_named
from ...basics.errors import ConversionError, UsageError, raise_all
from ...basics.folders import remove
from ...basics.json_files import write_json
from ...basics.quantities import count, size
from ...basics.yaml_files import write_yaml
from ...conversion.endpoint import main_dtype
from ...conversion.journal import MANIFEST, unchanged_beside
from ...conversion.outline import Fill, Outline
from ...conversion.staging import Staging
from ...conversion.stored_model import StoredModel, folded, has_multipliers
from ...families import FAMILIES
from ...model.layouts import row_maps
from ...model.slots import Precision, Ref, refs
from ...model.spec import ModelSpec
from ...storage import marks
from ...storage.shards import Stored, layout, split
from .limits import without_place
from .names import EXPERTS, MLP_LAYOUTS, QKV_LAYOUTS, Dialect
from .options import MindSporeOptions
from .recognising import MAP
from .row import limits, written
from .yaml_rows import LAYOUTS, ROWS

MODEL_CONFIG = "model_config.yaml"
#: What comes back as it was: configurations and training arguments of the source.
HF_CONFIG, HF_GENERATION_CONFIG, MARGS = "hf_config.json", "hf_generation_config.json", "source_megatron_args.json"
PARTS = "part*.safetensors"
_SMALL_FILES = (MODEL_CONFIG, HF_CONFIG, HF_GENERATION_CONFIG, MARGS, MANIFEST, CODE_FOLDER)
_FLOAT32 = dtype_named("float32")


class MindSporeTarget:
    """Folder that appears in `save_dir` only when it is complete; the map of names comes last."""

    def __init__(self, save_dir: Path, options: MindSporeOptions) -> None:
        for name, known in (("mlp_layout", MLP_LAYOUTS), ("qkv_layout", QKV_LAYOUTS)):
            if getattr(options, name) not in known:
                raise UsageError(f"{name} {getattr(options, name)!r} is not one of {', '.join(known)}")
        self.save_dir = save_dir
        self._options = options
        self._file_names: dict[str, str] = {}
        self._notes: list[str] = []

    def prepare(self, spec: ModelSpec, origin: Origin, dtype_of: Callable[[Ref], DType]) -> Outline:
        """Lay out all files; raises `ConversionError` for a model that has tensors or values without a place."""
        raise_all("MindSpore Transformers has no place for these:", without_place(spec))
        self._stored = self._stored_model(spec)
        self._source_dtype = dtype_of
        self._spec = dataclasses.replace(self._stored.spec, dtype=main_dtype(spec, dtype_of))
        self._dialect = Dialect(self._spec, self._options.mlp_layout, self._options.qkv_layout)
        self._origin = origin
        self._folded = self._stored.spec != spec
        tensors = list(self._tensors().values())
        shards = split(tensors, self._options.max_shard_size)
        files = {f"part{number}.safetensors": shard for number, shard in enumerate(shards)}
        self._file_names = {tensor.name: file for file, shard in files.items() for tensor in shard}
        self._total = sum(tensor.nbytes for tensor in tensors)
        options = {
            **dataclasses.asdict(self._options),
            "overwrite": None,
            "tokenizer": recorded_name(self._options.tokenizer),
            "format": "mindspore",
            "dtype": self._spec.dtype.name,
        }
        layouts = {file: layout(shard, {"format": "ms"}) for file, shard in files.items()}
        content = {MODEL_CONFIG: self._model_config(), **self._json_files()}
        return Outline("mindspore", layouts, options, content=content, notes=tuple(self._warnings()))

    def _stored_model(self, spec: ModelSpec) -> StoredModel:
        """Model as it is, or with folded multipliers where that is asked for."""
        model = StoredModel(spec)
        if not has_multipliers(spec):
            return model
        if not self._options.fold:
            raise ConversionError(
                f"the {spec.family} model multiplies activations by constants, for which MindSpore Transformers has no setting; "
                "fold them into weights with --mf-fold (fold=True in Python), which rounds them"
            )
        return folded(model)

    def _tensors(self) -> dict[str, Stored]:
        """Tensors of all files by name; one that holds a layer's experts belongs to several refs."""
        stored: dict[str, Stored] = {}
        for ref in refs(self._spec):
            tensor = self._tensor(ref)
            if stored.setdefault(tensor.name, tensor) != tensor:
                first = stored[tensor.name]
                raise ConversionError(
                    f"{ref} is {tensor.dtype}, but others in {tensor.name} are {first.dtype}; choose one dtype for all"
                )
        return stored

    def _tensor(self, ref: Ref) -> Stored:
        """Tensor that holds a ref: its own, or that of a layer's experts, whose transposed matrices follow each other."""
        name, dtype, shape = self._dialect.name(ref), self._dtype_of(ref), ref.shape(self._spec)
        if ref.slot.name not in EXPERTS:
            return Stored(name, dtype, shape, 1)
        experts, (rows, cols) = self._spec.num_experts, shape
        return Stored(name, dtype, (experts * cols, rows), experts)

    def _dtype_of(self, ref: Ref) -> DType:
        """Dtype to write a ref in."""
        return _FLOAT32 if ref.slot.precision is Precision.FLOAT32 else self._source_dtype(ref)

    def fills(self, ref: Ref) -> Iterator[Fill]:
        """The one fill of a ref."""
        name, dtype, shape = self._dialect.name(ref), self._dtype_of(ref), ref.shape(self._spec)
        (rows,) = row_maps(self._dialect.layout(ref.slot.name), ref.slot, self._spec, ref.kind(self._spec))
        stacked = ref.slot.name in EXPERTS
        start = (ref.expert or 0) * math.prod(shape) * dtype.itemsize if stacked else 0
        fill = Fill(self._file_names[name], name, dtype, shape, rows, 0, start, stacked)
        yield self._stored.fill(ref, fill)

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
        """Map of names, unless all is to be overwritten."""
        return None if self._options.overwrite else MAP

    def shown(self) -> Path | None:
        """Return the folder if it has a map of names that is not to be overwritten; else None."""
        there = (self.save_dir / MAP).exists() and not self._options.overwrite
        return self.save_dir if there else None

    def refuse_existing(self) -> None:
        """Raise if the folder holds a model of another format, or files of one of this, unless `overwrite` is set."""
        marks.refuse_others(self.save_dir, marks.HF, marks.META, marks.RANKS, marks.MODEL_PT)
        if not self._options.overwrite:
            marks.refuse_files(self.save_dir, self._paths())

    def _paths(self) -> list[Path]:
        """Paths of a model's files, first the one that makes them a model."""
        parts = sorted(self.save_dir.glob(PARTS))
        return [self.save_dir / MAP, *parts, *(self.save_dir / name for name in _SMALL_FILES)]

    def clear(self, staging: Staging) -> None:
        """Remove an older model's files, first what makes it one, so that a mixture of two models never looks complete."""
        # Without a new tokenizer the old one stays.
        beside = tokenizer_files(self.save_dir) if tokenizer_files(staging.files) else []
        for path in [*self._paths(), *beside]:
            remove(path)

    def show(self, staging: Staging) -> list[str]:
        """Move the files into place, the map of names last; returns lines for the user."""
        staging.move_into(self.save_dir, (MAP,))
        files = len(set(self._file_names.values()))
        switches = ", ".join(f"{key}: {str(value).lower()}" for key, value in written(LAYOUTS, self._dialect).items())
        return [
            f"wrote {count(len(self._file_names), 'tensor')} ({size(self._total)}) in {count(files, 'file')} to {self.save_dir}",
            f"rows lie as {MODEL_CONFIG} says ({switches}); the configuration that reads them must say the same",
            *self._notes,
            *self._warnings(),
        ]

    def assets(self, folder: Path) -> None:
        """Write the small files: map of names, configurations, training arguments, tokenizer, and the model's own code."""
        origin, options = self._origin, self._options
        write_json(
            folder / MAP,
            {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(self._file_names.items()))},
        )
        write_yaml(folder / MODEL_CONFIG, self._model_config())
        for name, value in self._json_files().items():
            write_json(folder / name, value)
        if not self._folded:
            write_code_files(origin.code_files, folder / CODE_FOLDER)
        notes = write_tokenizer(
            options.tokenizer or origin.tokenizer,
            folder,
            vocab_size=self._spec.vocab_size,
            explicit=options.tokenizer is not None,
        )
        self._notes = [*origin.notes, *notes, *self._left_out()]
        if not options.overwrite:
            refuse_other_tokenizer(folder, self.save_dir, ours=unchanged_beside(self.manifest))

    def _left_out(self) -> Iterator[str]:
        """Notes on what of the source is not written."""
        if self._folded:
            yield f"{HF_CONFIG} is left out: it would describe the model without the multipliers that its weights now have"
        if self._origin.capacity_bins is not None:
            bins = self._origin.capacity_bins
            yield f"{count(len(bins.tensors), 'capacity-bin buffer')} of {bins.where} are left out"

    def _json_files(self) -> dict[str, Any]:
        """Contents of small JSON files by name."""
        origin = self._origin
        margs = None if origin.margs is None else margs_to_json(origin.margs)
        config = None if self._folded else origin.hf_config
        found = {HF_CONFIG: config, HF_GENERATION_CONFIG: origin.generation_config, MARGS: margs}
        return {name: value for name, value in found.items() if value is not None}

    def _model_config(self) -> dict[str, Any]:
        """Configuration as MindSpore Transformers' YAML files have it."""
        family = FAMILIES[self._spec.family]
        named = {"model_type": family.model_type, "architectures": [family.architecture]}
        values = {**named, **written(ROWS, self._dialect), **written(LAYOUTS, self._dialect)}
        return {"use_legacy": False, "model": {"model_config": values}}

    def _warnings(self) -> Iterator[str]:
        """Warnings of what training graphs do not compute as the model does, and of rounded weights."""
        yield from (f"warning: MindSpore Transformers will not compute {reason}" for reason in limits(ROWS, self._spec))
        if self._folded:
            yield "multipliers are folded into weights (--mf-fold), which rounds them"

"""Conversions by numbers: a checkpoint that may lack args to one file of weights or to a folder, and the way back."""

from __future__ import annotations

import dataclasses
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..api import Result, run_job
from ..basics.errors import InvalidConfiguration, Unclear, UsageError
from ..basics.folders import existing_folder
from ..conversion.progress import Progress, Silent
from ..formats.huggingface.options import HFOptions
from ..formats.kinds import HF, MEGATRON
from ..formats.megatron.arguments import lacks_sizes
from ..formats.megatron.detecting import Detected, detect
from ..formats.megatron.flat_metadata import METADATA_FILE
from ..formats.megatron.options import MegatronOptions
from ..formats.megatron.shape_args import PLACEHOLDERS, shape_args, size_args
from ..formats.reading import ReadOptions
from ..request import Job, Request
from .numbers import UNSAID, Numbers, check_detected, check_spec, heads_of
from .presets import MINICPM, Preset, check_type, preset_of
from .recognising import FAMILIES_OF, Recognised, recognise_detected

LOG = logging.getLogger(__name__)
#: Forms of the Hugging Face side: one file of `torch.save`, or a folder with a configuration.
FILE, DIRECTORY = "pt", "directory"
_WARNING = "warning: "


@dataclass(frozen=True)
class Wishes:
    """What a caller says of a conversion beside its paths.

    `size` is a name of a preset, `preset` one that is given itself, under `preset_name`. `format` is that of the Hugging Face side.
    """

    numbers: Numbers = UNSAID
    model_type: str | None = None
    size: str | None = None
    preset: Preset | None = None
    preset_name: str = ""
    format: str = FILE
    hf_config: str | os.PathLike[str] | None = None
    dtype: str | None = None
    overwrite: bool = False
    true_vocab_size: int | None = None
    ckpt_dir_name: str | None = None
    transformer_impl: str = "transformer_engine"
    mup: str | None = None
    restart: bool = False
    download: bool = False
    #: Unknown fields of the reference's config.json that do not matter.
    ignore_config_fields: tuple[str, ...] = ()
    ignore_tensors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.format not in (FILE, DIRECTORY):
            raise UsageError(f"--format {self.format} is not one of {FILE}, {DIRECTORY}")
        if self.model_type is not None:
            check_type(self.model_type)
        if self.size is not None:
            preset_of(self.model_type, self.size)


def to_hf(
    checkpoint: str | os.PathLike[str], output: str | os.PathLike[str], wishes: Wishes, progress: Progress | None = None
) -> Result:
    """Convert a Megatron-LM checkpoint, with or without args, to Hugging Face's names; all or nothing.

    Raises `MissingPath` for a checkpoint that is not there, `InvalidConfiguration` for numbers that contradict it, and
    `ConversionError` for all else.
    """
    found = detect(existing_folder(checkpoint), wishes.ckpt_dir_name)
    _log_detected(found)
    check_detected(wishes.numbers, found)
    model = recognise_detected(found)
    _check_configuration(found, model, wishes)
    read, notes = _reading(found, model, wishes)
    job = _opened(
        Request(
            checkpoint,
            output,
            HF,
            wishes.dtype,
            wishes.overwrite,
            read,
            hf=HFOptions(single_file=wishes.format == FILE),
        ),
        notes,
    )
    check_spec(wishes.numbers, job.source.spec, found.directory)
    job.source.origin.notes += notes
    return _run(job, wishes, progress)


def to_megatron(
    source: str | os.PathLike[str], output: str | os.PathLike[str], wishes: Wishes, progress: Progress | None = None
) -> Result:
    """Convert a Hugging Face folder, or a file of weights beside a configuration, to a checkpoint; all or nothing."""
    preset = None if wishes.size is None else preset_of(wishes.model_type, wishes.size)
    numbers = wishes.numbers
    tp, pp = numbers.tp_size or (preset.tp if preset else 1), numbers.pp_size or (preset.pp if preset else 1)
    LOG.debug("%s: writing at tp=%d, pp=%d", source, tp, pp)
    job = Request(
        source,
        output,
        MEGATRON,
        wishes.dtype,
        wishes.overwrite,
        ReadOptions(
            hf_config=wishes.hf_config,
            ignore_config_fields=wishes.ignore_config_fields,
            ignore_tensors=wishes.ignore_tensors,
            download=wishes.download,
        ),
        MegatronOptions(tp=tp, pp=pp, impl=wishes.transformer_impl, allow_inexpressible=True, mup=wishes.mup),
    ).open()
    spec = job.source.spec
    LOG.debug("%s: a %s model of %d layers", source, spec.family, spec.num_layers)
    check_spec(numbers, spec, source)
    kv, queries = (spec.values.get(name) for name in ("num_query_groups", "num_attention_heads"))
    if type(queries) is int and type(kv) in (int, type(None)):  # and not one for each layer
        Numbers(spec.num_layers, tp, pp, kv, queries)
    return _run(job, wishes, progress)


def _log_detected(found: Detected) -> None:
    LOG.debug("%s: %s (by %s)", found.directory, found.sizes, found.decided_by)
    LOG.debug("%s: %s layers; on the stages %s", found.directory, found.num_layers, list(found.layers_of_stages))
    LOG.debug(
        "%s: hidden size %s, MLP %s, %d rows of embeddings, rows of queries and keys %s and %s",
        found.directory,
        found.hidden_size,
        found.ffn_hidden_size,
        found.vocab_rows,
        found.query_rows,
        found.kv_rows,
    )
    kinds = [name for name, held in (("multi-latent attention", found.is_latent), ("experts", found.is_moe)) if held]
    LOG.debug("%s: %s", found.directory, ", ".join(kinds) or "a dense model")


def _check_configuration(found: Detected, model: Recognised, wishes: Wishes) -> None:
    """Raise `UsageError` if a folder is to be written, and nothing says what config.json must say."""
    described = wishes.hf_config is not None or isinstance(found.arg("hf_config"), dict) or _has_metadata(found)
    if wishes.format != DIRECTORY or described:
        return
    is_minicpm = (wishes.model_type or (model.model_type if model.sure else "")) == MINICPM
    what = "no args that describe the model" if lacks_sizes(found.args) else ""
    if is_minicpm and found.arg("scale_emb") is None:
        what = what or "no args that say MiniCPM's scales"
    if what:
        raise UsageError(
            f"--format {DIRECTORY} writes config.json, but {found.directory} has {what}; give the folder of a reference model with "
            "--hf_config DIR"
        )


def _has_metadata(found: Detected) -> bool:
    """Whether the checkpoint is a whole model in one file, which a file beside it describes."""
    return found.is_flat and (found.directory / METADATA_FILE).exists()


def _reading(found: Detected, model: Recognised, wishes: Wishes) -> tuple[ReadOptions, list[str]]:
    """Options for reading the checkpoint, with what its args lack, and notes on what was assumed."""
    read = ReadOptions(
        ckpt_dir_name=wishes.ckpt_dir_name,
        hf_config=wishes.hf_config,
        true_vocab_size=wishes.true_vocab_size,
        download=wishes.download,
        ignore_config_fields=wishes.ignore_config_fields,
        ignore_tensors=wishes.ignore_tensors,
    )
    if _has_metadata(found):
        return read, []
    lacking = lacks_sizes(found.args)
    notes: list[str] = []
    if lacking and found.stages:
        _check_all_ranks(found, wishes)
        missing, notes = _missing_args(found, model, wishes)
        read = dataclasses.replace(read, missing_args=missing)
    if wishes.model_type is not None or (lacking and wishes.hf_config is None):
        families = FAMILIES_OF[wishes.model_type or model.model_type]
        LOG.debug(
            "%s: where no configuration is recorded, one of the families %s", found.directory, ", ".join(families)
        )
        read = dataclasses.replace(read, families=families)
    return dataclasses.replace(read, format=MEGATRON), notes


def _missing_args(found: Detected, model: Recognised, wishes: Wishes) -> tuple[dict[str, Any], list[str]]:
    """Args that tensors, numbers and presets say, and notes on what was assumed."""
    if wishes.hf_config is not None:
        LOG.debug("%s: the args lack sizes; the model is taken from %s", found.directory, wishes.hf_config)
        return size_args(found), []
    preset, name = _preset(found, model, wishes)
    heads = heads_of(found, _with_heads_of_args(found, wishes.numbers), preset, name)
    LOG.debug("%s: %d query heads and %d KV heads (by %s)", found.directory, heads.queries, heads.groups, heads.where)
    Numbers(None, found.sizes.tp, None, None if found.is_latent else heads.groups, heads.queries)
    LOG.debug("%s: these change no weight and are not known: %s", found.directory, ", ".join(PLACEHOLDERS))
    notes: list[str] = []
    if heads.assumed:
        notes.append(
            f"{_WARNING}neither args nor shapes say the number of query heads; {heads.queries} is taken from {heads.where} (say it "
            "with --num_query_heads)"
        )
    return shape_args(found, heads.queries, heads.groups), notes


def _with_heads_of_args(found: Detected, numbers: Numbers) -> Numbers:
    """Numbers with the query heads that args say, though they lack other sizes."""
    said, given = found.arg("num_attention_heads"), numbers.num_query_heads
    if type(said) is not int:
        return numbers
    if given not in (None, said):
        raise InvalidConfiguration(
            f"--num_query_heads {given} contradicts the args of {found.directory}, which have {said}"
        )
    return dataclasses.replace(numbers, num_query_heads=said)


def _preset(found: Detected, model: Recognised, wishes: Wishes) -> tuple[Preset | None, str]:
    """Preset that the caller names, or that has as many layers as the checkpoint; and its name."""
    if wishes.preset is not None:
        return wishes.preset, wishes.preset_name
    model_type = wishes.model_type or (None if wishes.size is not None and not model.sure else model.model_type)
    if wishes.size is not None:
        return preset_of(model_type, wishes.size), f"the preset {wishes.size.lower()}"
    try:
        preset = preset_of(model_type, model.size)
    except UsageError:
        return None, ""
    fits = preset.layers == found.num_layers
    return (preset, f"the preset {model_type} {model.size}, which has as many layers") if fits else (None, "")


def _check_all_ranks(found: Detected, wishes: Wishes) -> None:
    """Raise if a rank may be missing: without args only the shapes show it, where the heads together are not the hidden size."""
    numbers, rows = wishes.numbers, found.query_rows
    told = numbers.tp_size is not None or wishes.hf_config is not None or found.arg("tensor_model_parallel_size")
    if not told and found.head_dim is None and rows not in (None, found.hidden_size):
        raise InvalidConfiguration(
            f"{found.directory}: the heads on its {found.sizes.tp} tensor-parallel ranks have {rows} rows, but the hidden size is "
            f"{found.hidden_size}; is a rank missing? If not, give --tp_size {found.sizes.tp}"
        )


def _opened(request: Request, notes: list[str]) -> Job:
    """Opened conversion; where nothing tells where multipliers are, weights are taken as unscaled, which a note says."""
    try:
        return request.open()
    except Unclear:
        job = dataclasses.replace(request, read=dataclasses.replace(request.read, mup="raw")).open()
    note = "the args do not say where the model's multipliers are: its weights are taken as unscaled"
    notes.append(_WARNING + note)
    LOG.debug("%s: %s", request.src, note)
    return job


def _run(job: Job, wishes: Wishes, progress: Progress | None) -> Result:
    """Run a conversion and log what it says."""
    LOG.debug("writing %s", Path(job.target.save_dir))
    result = run_job(job, progress or Silent(), restart=wishes.restart)
    LOG.debug("wrote %s; where each tensor came from is in %s", result.path, result.manifest)
    return result

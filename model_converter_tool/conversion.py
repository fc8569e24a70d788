"""A task, from the input's name to the finished output, by calls of the library."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import megatron_converters.api as mc
from megatron_converters.basics.errors import (
    ConversionError,
    UnclearMultipliers,
    UnknownArchitecture,
    UsageError,
)
from megatron_converters.basics.quantities import size
from megatron_converters.cli.options.values import comma_separated

from .formats import HF, MEGATRON, SHOWN, SINGLE_FILE, OutputFormat, detected_format, output_format
from .model_types import AUTO, MINICPM, check_family, check_name, unsupported
from .options import SIZES, Task
from .settings import SOURCE
from .sources import output_name, resolve

_LOG = logging.getLogger(__name__)
#: Fields of the library's records by the options that they have from the user.
_HF_FIELDS = {"tokenizer_model": "tokenizer", "max_shard_size": "max_shard_size", "as_family": "as_family"}
_MEGATRON_FIELDS = {"tokenizer_model": "tokenizer", "mup": "mup", "transformer_impl": "impl"}
_RAW = (
    "warning: the checkpoint does not say where its multipliers are; they are taken for raw, that is its weights for unscaled; "
    "if they are not, say so with --mup"
)
#: Called with bytes done and bytes in all.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prepared:
    """Task whose input is there and is the model that was meant; `call` has the arguments of the library's `convert` and `plan`."""

    folder: Path
    source_format: str
    family: str
    call: dict[str, Any]
    notes: tuple[str, ...]


class Done(NamedTuple):
    """Finished conversion: what the library says of it, and what was planned."""

    result: mc.Result
    validation: dict[str, Any]
    notes: tuple[str, ...]


def output_of(task: Task, output_dir: str) -> str:
    """Folder to write: the task's, or one of the input's name in `output_dir`."""
    if task.output_path is not None:
        return task.output_path
    # A joined path would lose the "./" that users know from `./outputs/…`.
    return f"{output_dir.rstrip(os.sep)}{os.sep}{output_name(task.model, output_format(task.output_format).suffix)}"


def prepare(task: Task, settings: dict[str, Any]) -> Prepared:
    """Find the input and check that it is the model that is meant; writes nothing but the cache of downloads."""
    written = output_format(task.output_format)
    model_type = task.model_type if task.model_type != AUTO else settings["model_type"]
    check_name(model_type)
    folder, notes = resolve(task.model)
    found = task.options.get("source_format") or detected_format(folder)
    _LOG.debug("%s is of the format %s", folder, SHOWN[found])
    if found not in written.reads:
        raise ConversionError(
            f"Format detection failed: {task.model} is of the format {SHOWN[found]}, and {task.output_format} reads "
            f"{' or '.join(SHOWN[name] for name in written.reads)}; give another folder, or convert to hf or hf2megatron"
        )
    if task.device not in ("auto", "cpu"):
        notes = [*notes, f"conversions run on the CPU, also with the device {task.device}"]
    read = _read_options(task, found)
    try:
        family = _family(folder, read)
    except UnclearMultipliers:
        if model_type != MINICPM:
            raise
        read, notes = dataclasses.replace(read, mup="raw"), [*notes, _RAW]
        family = _family(folder, read)
    _LOG.debug("it holds a %s model", family)
    check_family(model_type, family, folder)
    call = {"read": read, **_writing(task, written, found)}
    dtype = task.options.get("dtype") or settings["dtype"]
    call |= {} if dtype == SOURCE else {"dtype": dtype}
    return Prepared(folder, found, family, call, tuple(notes))


def plan(prepared: Prepared, output: str) -> dict[str, Any]:
    """What the conversion would write and need, and what is in its way."""
    planned = mc.plan(prepared.folder, output, **prepared.call)
    problems = [planned.obstacle] if planned.obstacle else []
    if planned.left > planned.free:
        problems.append(
            f"{output} needs {size(planned.left)}, but its file system has {size(planned.free)} free; free some space or save "
            "elsewhere"
        )
    return {
        "valid": not problems,
        "problems": problems,
        "source": str(prepared.folder),
        "source_format": SHOWN[prepared.source_format],
        "family": prepared.family,
        "target": output,
        "files": {name: file.nbytes for name, file in planned.files.items()},
        "bytes": planned.nbytes,
        "bytes_left": planned.left,
        "bytes_free": planned.free,
        "memory": planned.memory,
        "casts": planned.casts,
        "computed": planned.computed,
        "complete": planned.complete,
        "notes": [*prepared.notes, *planned.notes],
    }


def run(task: Task, output: str, settings: dict[str, Any], progress: OnProgress | None) -> Done:
    """Convert; all or nothing, and the same task goes on after a kill."""
    _LOG.debug("converting %s to %s in %s", task.model, task.output_format, output)
    prepared = prepare(task, settings)
    validation = plan(prepared, output)
    _LOG.debug("planned %d files, %d bytes", len(validation["files"]), validation["bytes"])
    result = mc.convert(prepared.folder, output, progress=progress, **prepared.call)
    _LOG.debug("written; the manifest is %s", result.manifest)
    return Done(result, validation, prepared.notes)


def _read_options(task: Task, found: str) -> mc.ReadOptions:
    """Options for reading. Where the input and the output are checkpoints, `mup` is that of both, unless the input says its own."""
    names = ("hf_config", "mup") if found == MEGATRON else ("hf_config",)
    given = {name: task.options[name] for name in names if name in task.options}
    fields = comma_separated(task.options.get("ignore_config_fields"))
    tensors = tuple(task.options.get("ignore_tensors", ()))
    return mc.ReadOptions(format=found, ignore_config_fields=fields, ignore_tensors=tensors, **given)


def _family(folder: Path, read: mc.ReadOptions) -> str:
    """Family of the model in a folder."""
    try:
        family: str = mc.inspect(folder, read=read)["model"]["family"]
    except UnknownArchitecture as error:
        raise unsupported(error, folder) from error
    return family


def _writing(task: Task, written: OutputFormat, found: str) -> dict[str, Any]:
    """Arguments of the library for writing."""
    options = task.options
    call: dict[str, Any] = {name: options[name] for name in ("overwrite", "workers", *SIZES) if name in options}
    call["to"] = written.writes
    if written.writes == HF and "mup" in options and found != MEGATRON:
        raise UsageError(f"mup: neither {task.model} nor what is written is a checkpoint; leave it out")
    names = _HF_FIELDS if written.writes == HF else _MEGATRON_FIELDS
    fields: dict[str, Any] = {names[name]: value for name, value in options.items() if name in names}
    if written.writes == HF:
        folded = {"as_family": "llama"} if options.get("mup2llama") else {}
        return {**call, "hf": mc.HFOptions(**{**fields, **folded})}
    folded = {"mup": "fold"} if options.get("mup2llama") else {}
    one_file = {} if any(name in options for name in SIZES) else {"ckpt_format": SINGLE_FILE, "impl": "local"}
    fields = {**one_file, **fields, **folded, "allow_inexpressible": True}
    return {**call, "megatron": mc.MegatronOptions(**fields)}

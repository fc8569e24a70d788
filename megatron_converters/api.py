"""Python API: what the command lines do, as functions that return values, print nothing and raise `ConversionError`.

Importing it imports numpy; torch is imported only where values change type or logits are compared. What one function alone
needs is imported when it is called.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .basics.errors import ConversionError, UsageError, raise_all
from .conversion.crew import ALONE, Crew
from .conversion.dry_run import Forecast, forecast
from .conversion.journal import read_manifest
from .conversion.progress import Progress, Reported, Silent
from .conversion.run import convert as run_conversion
from .families import register_family
from .families.facts import Family
from .families.scope import family_of
from .formats.hub import located
from .formats.huggingface.options import HFOptions
from .formats.kinds import MEGATRON
from .formats.megatron.options import MegatronOptions
from .formats.mindspore.options import MindSporeOptions
from .formats.reading import AS_FOUND, ReadOptions, open_source, refuse_unused
from .request import Job, Request
from .sharding.stages import PipelineSplit

__all__ = [
    "ConversionError",
    "Difference",
    "Family",
    "Forecast",
    "HFOptions",
    "MegatronOptions",
    "MindSporeOptions",
    "PipelineSplit",
    "ReadOptions",
    "Result",
    "TrainingFlags",
    "UsageError",
    "Verification",
    "convert",
    "diff",
    "inspect",
    "plan",
    "register_family",
    "supported_families",
    "training_flags",
    "verify",
]

#: A folder as callers name it; a source may also be named as a model on the Hugging Face Hub, "owner/name[@revision]".
Folder = str | os.PathLike[str]
#: Called with bytes done and bytes in all, from several threads in turn. An exception that it raises ends the conversion.
OnProgress = Callable[[int, int], None]
_WARNING = "warning: "


@dataclass(frozen=True)
class Result:
    """Finished conversion.

    `path` is the folder with the files, of a checkpoint that of its iteration, or the one file. `flags` are what `pretrain_gpt.py`
    needs to load a checkpoint, quoted for a shell, empty for Hugging Face's side. `manifest` says where every tensor came from.
    `source` is the path, format and family of what was converted, `format` that of the result, `seconds` how long it took.
    """

    path: Path
    flags: tuple[str, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    manifest: Path
    source: dict[str, str]
    format: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The JSON of `convert --json`; reads the manifest."""
        files = [
            {"file": name, "bytes": entry["bytes"], "tensors": len(entry["tensors"])}
            for name, entry in read_manifest(self.manifest)["files"].items()
        ]
        return {
            "result": str(self.path),
            "format": self.format,
            "source": self.source,
            "manifest": str(self.manifest),
            "files": files,
            "bytes": sum(file["bytes"] for file in files),
            "seconds": self.seconds,
            "flags": shlex.split(" ".join(self.flags)),
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Verification:
    """Outcome of a verification: `findings` name what differs, or is damaged; `report` is the JSON of the command."""

    equal: bool
    findings: tuple[str, ...]
    report: dict[str, Any] = field(repr=False)

    def __bool__(self) -> bool:
        return self.equal


@dataclass(frozen=True)
class Difference:
    """Differences of two folders: settings by kind, and the JSON of `diff`, whose `tensors` are ordered by relative distance."""

    equal: bool
    settings: dict[str, list[str]]
    report: dict[str, Any] = field(repr=False)

    def __bool__(self) -> bool:
        return not self.equal


@dataclass(frozen=True)
class TrainingFlags:
    """Flags of `pretrain_gpt.py`, quoted for a shell, the values behind them by attribute, and what to know of them."""

    flags: tuple[str, ...]
    arguments: dict[str, Any]
    notes: tuple[str, ...]


def convert(
    src: Folder,
    dst: Folder,
    *,
    to: str | None = None,
    tp: int | None = None,
    pp: int | None = None,
    ep: int | None = None,
    etp: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    workers: int = 1,
    read: ReadOptions = AS_FOUND,
    megatron: MegatronOptions | None = None,
    hf: HFOptions | None = None,
    mindspore: MindSporeOptions | None = None,
    progress: OnProgress | None = None,
    download: bool = False,
) -> Result:
    """Convert the folder `src`, of any format, into the folder `dst`; all or nothing, and the same call goes on after a kill.

    `to` is "hf", "megatron" or "mindspore"; by default a checkpoint becomes a Hugging Face folder unless sizes or `megatron`
    options are given, everything else a checkpoint. `tp`, `pp`, `ep` and `etp` are parallel sizes, the source's or 1 where
    None. `dtype` ("bf16", "fp16", "fp32") is the source's where None. `workers` is the number of processes, which are spawned: a
    script that asks for several needs the usual `if __name__ == "__main__":`. A model named as on the Hub is read from the local
    cache; with `download`, what that lacks is fetched. Raises `ConversionError` and leaves nothing that looks complete.
    """
    request = _request(
        src, dst, to, (tp, pp, ep, etp), dtype, overwrite, _with(read, download), megatron, hf, mindspore
    )

    def lead(crew: Crew) -> Result:
        return _convert(crew, request, restart, Silent() if progress is None else Reported(progress))

    if workers == 1:
        return lead(ALONE)
    from .conversion import crew_local

    request = request.located()
    return crew_local.run(workers, _assist, (request, restart), lead)


def plan(
    src: Folder,
    dst: Folder,
    *,
    to: str | None = None,
    tp: int | None = None,
    pp: int | None = None,
    ep: int | None = None,
    etp: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    workers: int = 1,
    read: ReadOptions = AS_FOUND,
    megatron: MegatronOptions | None = None,
    hf: HFOptions | None = None,
    mindspore: MindSporeOptions | None = None,
    measured: bool = False,
    download: bool = False,
) -> Forecast:
    """What `convert` would write and need; nothing is written.

    With `measured`, about half a second is spent on samples that are flushed to the disk, from which follow `seconds_least` and
    `seconds_most`, an estimate.
    """
    read = _with(read, download)
    with family_of(read.family_file):
        job = _request(src, dst, to, (tp, pp, ep, etp), dtype, overwrite, read, megatron, hf, mindspore).open()
        result = forecast(job.source, job.target, job.dtype, workers)
        if measured:
            from .conversion.estimate import measure

            measure(result, job.source, job.target.save_dir, workers)
    return result


def inspect(src: Folder, *, read: ReadOptions = AS_FOUND, download: bool = False) -> dict[str, Any]:
    """What a folder of any format holds, from headers alone: the JSON of `inspect --json`, sizes in bytes."""
    from .inspection.in_json import as_json
    from .inspection.inventory import survey

    read = _with(read, download)
    with family_of(read.family_file):
        return as_json(survey(*_open(src, read)))


def verify(
    a: Folder,
    b: Folder | None = None,
    *,
    tolerance: float = 0.0,
    ignore_dtype: bool = False,
    as_cast: bool = False,
    read: ReadOptions = AS_FOUND,
    read_b_format: str | None = None,
    download: bool = False,
) -> Verification:
    """Whether two folders of any formats hold the same model, bit for bit or within `tolerance`.

    With `as_cast`: whether `b` is `a` rounded to the dtypes of `b`, bit for bit. Without `b`: whether the output `a` is as its
    manifest says.
    """
    from .comparison.report import check_json, findings, open_pair, verification_json
    from .comparison.tensors import Rules, compare

    read = _with(read, download)
    if b is None:
        from .comparison.manifest_check import check_output, find_output

        place = located(a, download=read.download).folder
        checked = check_output(find_output(place, read.ckpt_dir_name), Silent())
        return Verification(not checked.faults, tuple(map(str, checked.faults)), check_json(checked))
    rules = Rules(tolerance=tolerance, ignore_dtype=ignore_dtype, as_cast=as_cast)
    with family_of(read.family_file):
        pair = open_pair(a, b, read, read_b_format)
        comparison = compare(*pair.sources, rules, Silent())
    return Verification(comparison.equal, tuple(findings(comparison)), verification_json(pair, comparison, rules))


def diff(
    a: Folder,
    b: Folder,
    *,
    read: ReadOptions = AS_FOUND,
    read_b_format: str | None = None,
    download: bool = False,
) -> Difference:
    """What differs between two folders of any formats: settings, training arguments, and each tensor by how much."""
    from .comparison.report import difference_json, open_pair
    from .comparison.settings import settings_differences
    from .comparison.tensors import Rules, compare

    read = _with(read, download)
    with family_of(read.family_file):
        pair = open_pair(a, b, read, read_b_format)
        settings = settings_differences(*pair.sources)
        comparison = compare(*pair.sources, Rules(norms=True), Silent())
    equal = comparison.equal and not any(settings.values())
    return Difference(equal, settings, difference_json(pair, settings, comparison, equal))


def training_flags(
    src: Folder, *, allow_inexpressible: bool = False, read: ReadOptions = AS_FOUND, download: bool = False
) -> TrainingFlags:
    """All `pretrain_gpt.py` flags of a model or a checkpoint.

    Raises `ConversionError` where Megatron-LM's arguments cannot express the model, unless `allow_inexpressible`.
    """
    read = _with(read, download)
    with family_of(read.family_file):
        return _training_flags(src, allow_inexpressible, read)


def _training_flags(src: Folder, allow_inexpressible: bool, read: ReadOptions) -> TrainingFlags:
    from .formats.megatron.arguments import inexpressible
    from .formats.megatron.flags import all_flags, flag_warnings
    from .formats.megatron.rows_layers import layer_notes
    from .inspection.inventory import survey
    from .inspection.training_flags import arguments

    kind, source = _open(src, read)
    reasons = inexpressible(source.spec)
    if not allow_inexpressible:
        raise_all(
            "Megatron-LM's arguments cannot express this model (pass --allow-inexpressible to see them all the same):",
            reasons,
        )
    named = src if read.ckpt_dir_name is None else source.origin.described
    values, notes = arguments(survey(kind, source), source, Path(named))
    flags = all_flags(values)
    notes += [f"{_WARNING}Megatron-LM will not compute {reason}" for reason in reasons]
    notes += layer_notes(source.spec)
    notes += flag_warnings(source.spec, flags, values.get("tensor_model_parallel_size", 1))
    return TrainingFlags(tuple(flags), values, tuple(notes))


def supported_families(family_file: str | os.PathLike[str] | None = None) -> tuple[Family, ...]:
    """Every family that can be converted, with what is known of it; with `family_file` also the one of this file."""
    from .inspection import supported

    with family_of(family_file):
        return supported.supported_families()


def _with(read: ReadOptions, download: bool) -> ReadOptions:
    """Options that download models, too, if that is asked for."""
    return dataclasses.replace(read, download=True) if download else read


def _open(src: Folder, read: ReadOptions) -> tuple[str, Any]:
    opened = open_source(src, read)
    refuse_unused([opened.format], read)
    return opened


def _request(
    src: Folder,
    dst: Folder,
    to: str | None,
    sizes: tuple[int | None, int | None, int | None, int | None],
    dtype: str | None,
    overwrite: bool,
    read: ReadOptions,
    megatron: MegatronOptions | None,
    hf: HFOptions | None,
    mindspore: MindSporeOptions | None,
) -> Request:
    given: dict[str, Any] = {
        name: size for name, size in zip(("tp", "pp", "ep", "etp"), sizes, strict=True) if size is not None
    }
    if given:
        megatron = dataclasses.replace(megatron or MegatronOptions(), **given)
    return Request(src, dst, to, dtype, overwrite, read, megatron, hf, mindspore)


def _convert(crew: Crew, request: Request, restart: bool, progress: Progress) -> Result:
    with family_of(request.read.family_file):
        return run_job(request.open(), progress, restart=restart, crew=crew)


def run_job(job: Job, progress: Progress, *, restart: bool = False, crew: Crew = ALONE) -> Result:
    """Run an opened conversion, all or nothing."""
    begun = time.monotonic()
    lines = run_conversion(job.source, job.target, job.dtype, progress, restart=restart, crew=crew)
    return result_of(job, lines, time.monotonic() - begun)


def result_of(job: Job, lines: Sequence[str], seconds: float) -> Result:
    """Result of a finished conversion, from the lines that it has for the user."""
    warnings = [line.removeprefix(_WARNING) for line in lines if line.startswith(_WARNING)]
    notes = [line for line in lines if not line.startswith((_WARNING, "pretrain_gpt.py needs"))]
    origin, target = job.source.origin, job.target
    source = {"path": origin.described, "format": job.source_format, "family": job.source.spec.family}
    texts = (tuple(_flags(job)), tuple(notes), tuple(warnings))
    return Result(target.output, *texts, target.manifest, source, job.target_format, seconds)


def _flags(job: Job) -> list[str]:
    """What pretrain_gpt.py needs to load a checkpoint."""
    if job.target_format != MEGATRON:
        return []
    from .formats.megatron.writing import CheckpointTarget

    return job.target.flags if isinstance(job.target, CheckpointTarget) else []


def _assist(crew: Crew, work: tuple[Request, bool]) -> None:
    """In another process: its share of a conversion."""
    request, restart = work
    _convert(crew, request, restart, Silent())

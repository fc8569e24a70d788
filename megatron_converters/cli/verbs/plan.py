"""`plan SRC DST`: a conversion that writes nothing."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ...basics.quantities import count, duration, size
from ...conversion.dry_run import Forecast, forecast, measure
from ...request import Job
from ..console import put, put_json
from ..options.shared import add_shared
from ..options.values import positive
from .job import add_job_arguments, request_of

_SHOWN_FILES = 64
_SHOWN_IGNORED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    add_job_arguments(parser)
    parser.add_argument(
        "--workers", metavar="N", type=positive, default=1, help="Processes that the conversion would have."
    )
    parser.add_argument(
        "--no-measure", action="store_true", help="Do not measure a rate; the time is then not estimated."
    )
    add_shared(parser, "--json")


def run(args: argparse.Namespace) -> int:
    """Print the plan, also for `convert --dry-run`; 0 if the conversion is possible, 1 if something is in its way."""
    job = request_of(args).open()
    result = forecast(job.source, job.target, job.dtype, args.workers)
    if not getattr(args, "no_measure", False):
        measure(result, job.source, job.target.save_dir)
    if getattr(args, "json", False):
        put_json(result.to_json())
    else:
        put("\n".join(_lines(job, result)))
    return 0 if result.left <= result.free and not result.obstacle else 1


def _lines(job: Job, result: Forecast) -> Iterator[str]:
    spec, origin = job.source.spec, job.source.origin
    yield f"from  {origin.described} ({job.source_format}, {spec.family}, {spec.num_layers} layers)"
    yield f"to    {job.target.save_dir} ({job.target_format})"
    yield ""
    width = max(map(len, result.files))
    yield f"{'file':{width}}  tensors  {'bytes':>16}  padding rows"
    for file, plan in list(result.files.items())[:_SHOWN_FILES]:
        yield f"{file:{width}}  {plan.tensors:7d}  {plan.nbytes:16,d}  {plan.padding_rows:12d}"
    if len(result.files) > _SHOWN_FILES:
        yield f"… and {len(result.files) - _SHOWN_FILES} more files (--json lists all)"
    yield ""
    read, files = count(result.source_tensors, "source tensor"), count(len(result.files), "file")
    yield f"{read}, each read once, make {result.target_tensors} in {files}"
    for cast, number in result.casts.items():
        yield f"{number} are cast from {cast}"
    for computed, number in result.computed.items():
        yield f"{number} are {computed}"
    if result.padding_rows:
        yield f"{count(result.padding_rows, 'row')} of vocabulary padding, in all tensors together, repeat the vocabulary's last"
    if result.copies:
        share = result.copies / sum(plan.tensor_bytes for plan in result.files.values())
        yield f"{result.copies:,} bytes of tensors ({share:.0%}) are copies, which several ranks hold"
    for ignored in result.ignored[:_SHOWN_IGNORED]:
        yield f"left out: {ignored}"
    if len(result.ignored) > _SHOWN_IGNORED:
        yield f"… and {len(result.ignored) - _SHOWN_IGNORED} more are left out (--json lists all)"
    yield from result.notes
    yield from _state(result)
    room = "enough" if result.left <= result.free else "NOT ENOUGH"
    yield f"disk    {size(result.left)} needed, and a little for configuration and manifest; {size(result.free)} free: {room}"
    yield f"memory  about {size(result.memory)}, besides file pages that the system takes back when it needs them"
    if result.seconds is not None and result.rate is not None:
        yield f"time    about {duration(result.seconds)} at the measured {size(result.rate)}/s of one process"


def _state(result: Forecast) -> Iterator[str]:
    if result.complete:
        yield "this conversion is complete already; the command has nothing to do"
    elif result.obstacle:
        yield f"obstacle: {result.obstacle}"
    elif result.finished and result.left:
        some = f"{len(result.finished)} of {len(result.files)}"
        yield f"an interrupted run has finished {some} files, {size(result.nbytes - result.left)}; the command goes on from there"

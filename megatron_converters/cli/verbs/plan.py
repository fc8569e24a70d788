"""`plan SRC DST`: a conversion that writes nothing."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ...basics.quantities import count, duration, size
from ..console import put, put_json
from ..html_page import page_path, write_page
from ..options.shared import add_shared
from ..options.values import positive
from .job import add_job_arguments, request_of

if TYPE_CHECKING:
    from pathlib import Path

    from ...conversion.dry_run import FilePlan, Forecast
    from ...request import Job

#: Kinds of files that are listed.
_SHOWN_FILES = 32
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
    parser.add_argument(
        "--html", metavar="FILE", default=None, help="Write a page that stands alone, with the maps before and after."
    )
    add_shared(parser, "--json")


def run(args: argparse.Namespace) -> int:
    """Print the plan, also for `convert --dry-run`; 0 if the conversion is possible, 1 if something is in its way."""
    from ...conversion.dry_run import forecast
    from ...conversion.estimate import measure

    page = page_path(getattr(args, "html", None))
    job = request_of(args).open()
    result = forecast(job.source, job.target, job.dtype, args.workers)
    if not getattr(args, "no_measure", False):
        measure(result, job.source, job.target.save_dir, args.workers)
    if getattr(args, "json", False):
        put_json(result.to_json())
    else:
        put("\n".join(_lines(job, result)))
    if page is not None:
        _write_page(page, job, result)
    return 0 if result.left <= result.free and not result.obstacle else 1


def _write_page(page: Path, job: Job, result: Forecast) -> None:
    from ...inspection.inventory import survey
    from ...inspection.planned import planned
    from ...inspection.shard_map.page import conversion_page

    source = survey(job.source_format, job.source)
    target = planned(job.target_format, job.source.spec, job.target, result)
    write_page(page, conversion_page(source, target, result))


def _lines(job: Job, result: Forecast) -> Iterator[str]:
    spec, origin = job.source.spec, job.source.origin
    yield f"from  {origin.described} ({job.source_format}, {spec.family}, {spec.num_layers} layers)"
    yield f"to    {job.target.save_dir} ({job.target_format})"
    yield ""
    yield from _table(result.files)
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
    for name, file in [*result.backfilled.items()][:_SHOWN_IGNORED]:
        yield f"backfilled: {name} of {file}"
    if len(result.backfilled) > _SHOWN_IGNORED:
        yield f"… and {len(result.backfilled) - _SHOWN_IGNORED} more are backfilled (--json lists all)"
    yield from result.notes
    yield from _state(result)
    room = "enough" if result.left <= result.free else "NOT ENOUGH"
    yield f"disk    {size(result.left)} needed, and a little for configuration and manifest; {size(result.free)} free: {room}"
    yield f"memory  about {size(result.memory)}, besides file pages that the system takes back when it needs them"
    if result.seconds_most is not None:
        times = _range(duration, result.seconds_least, result.seconds_most)
        rates = _range(lambda rate: f"{size(rate)}/s", result.rate_least, result.rate_most)
        yield f"time    about {times}, an estimate: a short sample, flushed to this disk, took {rates}"


def _range(text: Callable[[float], str], *values: float | None) -> str:
    """The lowest and the highest value, or the one that both are, in words."""
    return " to ".join(dict.fromkeys(text(value) for value in values if value is not None))


def _table(files: dict[str, FilePlan]) -> Iterator[str]:
    """Rows of the files; those that differ only in their names, such as ranks of a stage, have one row."""
    alike: dict[tuple[int, int, int], list[str]] = {}
    for file, plan in files.items():
        alike.setdefault((plan.tensors, plan.nbytes, plan.padding_rows), []).append(file)
    named = {
        (names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} alike"): key for key, names in alike.items()
    }
    shown = list(named.items())[:_SHOWN_FILES]
    width = max(len(name) for name, _ in shown)
    yield f"{'file':{width}}  tensors  {'bytes each':>16}  padding rows"
    for name, (tensors, nbytes, padding) in shown:
        yield f"{name:{width}}  {tensors:7d}  {nbytes:16,d}  {padding:12d}"
    rest = sum(map(len, list(alike.values())[_SHOWN_FILES:]))
    if rest:
        yield f"… and {count(rest, 'more file')} (--json lists all)"


def _state(result: Forecast) -> Iterator[str]:
    if result.complete:
        yield "this conversion is complete already; the command has nothing to do"
    elif result.obstacle:
        yield f"obstacle: {result.obstacle}"
    elif result.finished and result.left:
        some = f"{len(result.finished)} of {len(result.files)}"
        yield f"an interrupted run has finished {some} files, {size(result.nbytes - result.left)}; the command goes on from there"

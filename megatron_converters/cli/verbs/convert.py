"""`convert SRC DST`: any format to any other, and checkpoints to other parallel sizes."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from ...basics.errors import ConversionError, UsageError
from ...conversion.crew import ALONE, Crew
from ...conversion.crew_cluster import crew_of_environment
from ..console import put_json, report
from ..interrupts import end_soon
from ..numpy_threads import single_threaded_blas
from ..options.shared import add_shared
from ..options.values import positive
from .job import add_job_arguments, request_of

if TYPE_CHECKING:
    from ...request import Job, Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    add_job_arguments(parser)
    parser.add_argument(
        "--workers",
        metavar="N",
        type=positive,
        default=1,
        help="Processes on this machine. On several, start the same command under torchrun or srun instead.",
    )
    parser.add_argument("--dry-run", action="store_true", help="Write nothing, and say what `plan` says.")
    add_shared(parser, "--restart", "--quiet", "--json")


def run(args: argparse.Namespace) -> int:
    """Convert; 0 if the output is complete."""
    begun = time.monotonic()
    crew = crew_of_environment()
    if args.dry_run:
        from . import plan

        crew.close()
        return plan.run(args) if crew.rank == 0 else 0
    if args.workers > 1 and crew.size > 1:
        raise UsageError("--workers is for one machine; under torchrun or srun, let them start more processes")
    try:
        asked = args, request_of(args)
        job, lines = work(crew, asked) if args.workers == 1 else _work_with_others(asked)
    finally:
        crew.close()
    if crew.rank == 0:
        for line in lines:
            report(args, line)
        if args.json:
            _put_result(job, lines, time.monotonic() - begun)
    return 0


def _work_with_others(asked: tuple[argparse.Namespace, Request]) -> tuple[Job, list[str]]:
    from ...conversion import crew_local  # which imports multiprocessing

    with single_threaded_blas():
        return crew_local.run(asked[0].workers, work, asked, lambda led: work(led, asked), end_soon)


def _put_result(job: Job, lines: list[str], seconds: float) -> None:
    from ...api import result_of  # which imports all that looks and compares, too

    try:
        put_json(result_of(job, lines, seconds).to_json())
    except ConversionError as error:
        error.hint = "; the output is complete all the same"
        raise


def work(crew: Crew, asked: tuple[argparse.Namespace, Request]) -> tuple[Job, list[str]]:
    """Do one process's part; returns the conversion, and lines for the user."""
    from ...families.scope import family_of

    args, request = asked
    with family_of(args.family_file):  # which another process does not have yet
        return _work(crew, args, request)


def _work(crew: Crew, args: argparse.Namespace, request: Request) -> tuple[Job, list[str]]:
    from ...conversion.progress import Progress, Silent, make_progress
    from ...conversion.run import convert

    job = request.open()
    if crew.rank == 0:
        origin, spec = job.source.origin, job.source.spec
        among = f", {crew.size} processes" if crew is not ALONE else ""
        report(
            args,
            f"reading {origin.described} ({job.source_format}, {spec.family}), writing {args.save_dir} "
            f"({job.target_format}){among}",
        )
        for line in job.source.origin.urgent:
            report(args, line)
    progress: Progress = Silent()
    if crew.rank == 0:
        share = f" (the share of process 0 of {crew.size})" if crew.size > 1 else ""
        progress = make_progress(args.quiet, f"copying{share}", f"copied{share}")
    return job, convert(job.source, job.target, job.dtype, progress, restart=args.restart, crew=crew)

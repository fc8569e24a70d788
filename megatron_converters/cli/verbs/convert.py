"""`convert SRC DST`: any format to any other, and checkpoints to other parallel sizes."""

from __future__ import annotations

import argparse

from ...basics.errors import UsageError
from ...conversion import crew_local
from ...conversion.crew import ALONE, Crew
from ...conversion.crew_cluster import crew_of_environment
from ...conversion.progress import Progress, Silent, make_progress
from ...conversion.run import convert
from ...families.scope import family_of
from ..console import report
from ..interrupts import end_soon
from ..options.shared import add_shared
from ..options.values import positive
from .job import add_job_arguments, request_of


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
    add_shared(parser, "--restart", "--quiet")


def run(args: argparse.Namespace) -> int:
    """Convert; 0 if the output is complete."""
    crew = crew_of_environment()
    if args.workers > 1 and crew.size > 1:
        raise UsageError("--workers is for one machine; under torchrun or srun, let them start more processes")
    try:
        lines = (
            crew_local.run(args.workers, work, args, lambda led: work(led, args), end_soon)
            if args.workers > 1
            else work(crew, args)
        )
    finally:
        crew.close()
    for line in lines if crew.rank == 0 else []:
        report(args, line)
    return 0


def work(crew: Crew, args: argparse.Namespace) -> list[str]:
    """Do one process's part; returns lines for the user."""
    with family_of(args.family_file):  # which another process does not have yet
        return _work(crew, args)


def _work(crew: Crew, args: argparse.Namespace) -> list[str]:
    job = request_of(args).open()
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
    return convert(job.source, job.target, job.dtype, progress, restart=args.restart, crew=crew)

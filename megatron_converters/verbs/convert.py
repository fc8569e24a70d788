"""`convert SRC DST`: any format to any other, and checkpoints to other parallel sizes."""

from __future__ import annotations

import argparse

from ..conversion import convert
from ..plugins import say
from ..progress import make_progress
from .job import add_job_arguments, job_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    add_job_arguments(parser)
    parser.add_argument(
        "--restart",
        action="store_true",
        help="Throw away what an interrupted run has finished, instead of going on from it.",
    )
    parser.add_argument("--quiet", action="store_true", help="Print errors and warnings only.")


def run(args: argparse.Namespace) -> int:
    """Convert; 0 if the output is complete."""
    job = job_of(args)
    say(
        args,
        f"reading {job.source.origin.described} ({job.source_format}, {job.source.spec.family}), writing {job.target_format}",
    )
    for line in convert(job.source, job.target, job.dtype, make_progress(args.quiet), restart=args.restart):
        say(args, line)
    return 0

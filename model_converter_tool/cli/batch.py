"""`modelconvert batch CONFIG`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_converters.basics.errors import ConversionError
from megatron_converters.basics.quantities import duration
from megatron_converters.cli.console import put, warn
from megatron_converters.cli.options.values import natural, positive

if TYPE_CHECKING:
    from ..pool import Outcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "config", metavar="CONFIG", help="YAML or JSON file with a list of conversions under models or tasks."
    )
    parser.add_argument(
        "--max-workers",
        metavar="N",
        type=positive,
        default=None,
        help="Conversions at once; the setting, or 1, by default.",
    )
    parser.add_argument(
        "--max-retries",
        metavar="N",
        type=natural,
        default=None,
        help="Further attempts at a conversion that failed; the setting, or 1, by default.",
    )
    parser.add_argument("--skip-disk-check", action="store_true", help="Begin without looking whether all outputs fit.")


def run(args: argparse.Namespace) -> int:
    """Convert everything; 0 if all is done, 1 if any failed."""
    from .. import settings
    from ..api import ModelConverterAPI
    from ..batch_config import check_disks, read_tasks
    from ..pool import run_all

    api = ModelConverterAPI(args.workspace)
    chosen = settings.read(api.workspace)
    tasks = read_tasks(Path(args.config), chosen["output_dir"])
    workers = args.max_workers or chosen["max_workers"]
    retries = chosen["max_retries"] if args.max_retries is None else args.max_retries
    for note in [] if args.skip_disk_check else check_disks(api, tasks):
        warn(f"note: {note}")

    def report(outcome: Outcome) -> None:
        with suppress(ConversionError):  # a full log does not end the batch
            put(_progress_line(outcome, len(tasks)))
        for line in outcome.result.extra_info.get("warnings", ()):
            warn(f"warning: {outcome.attempt.task.model}: {line}")

    outcomes = run_all(tasks, workers, retries, api, report)
    put("\n".join(["", *_table(outcomes)]))
    failed = sum(not outcome.result.success for outcome in outcomes)
    put(f"\n{len(outcomes) - failed} of {len(outcomes)} done, {failed} failed")
    return 1 if failed else 0


def _progress_line(outcome: Outcome, total: int) -> str:
    number, task, _ = outcome.attempt
    head = f"[{number}/{total}]"
    took = f"({duration(outcome.seconds)})"
    if outcome.result.success:
        return f"{head} done: {task.model} -> {outcome.result.output_path} {took}"
    return f"{head} {'failed, to be tried again' if outcome.again else 'failed'}: {task.model}: {outcome.result.error} {took}"


def _table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    rows = [("model", "format", "output", "result", "attempts", "time")]
    for outcome in outcomes:
        task = outcome.attempt.task
        result = "done" if outcome.result.success else "FAILED"
        attempts, seconds = str(outcome.attempt.tries), duration(outcome.seconds)
        rows.append((task.model, task.output_format, str(task.output_path), result, attempts, seconds))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()

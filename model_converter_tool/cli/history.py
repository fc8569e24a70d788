"""`modelconvert history`."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_converters.basics.quantities import duration
from megatron_converters.cli.console import put, put_json

from .. import history
from ..workspace import workspace
from . import add_json_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_json_argument(parser)
    parser.add_argument("--clear", action="store_true", help="Remove all entries.")


def run(args: argparse.Namespace) -> int:
    """List or clear the history."""
    place = workspace(args.workspace)
    if args.clear:
        history.clear(place)
        put(f"{place / history.FILE} is empty")
        return 0
    entries = history.entries(place)
    if args.json:
        put_json(entries)
    else:
        put("\n".join(map(_line, entries)) or f"no conversions are recorded in {place / history.FILE}")
    return 0


def _line(entry: dict[str, Any]) -> str:
    seconds = entry.get("seconds")
    took = duration(seconds) if isinstance(seconds, (int, float)) else "?"
    outcome = f"done -> {entry.get('output')}" if entry.get("success") else f"FAILED: {entry.get('error')}"
    return f"{entry.get('time')}  {entry.get('input')}  {entry.get('format')}  {took}  {outcome}"

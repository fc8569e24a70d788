"""The command line `modelconvert`: one module for each command, with `add_arguments(parser)` and `run(args) -> exit code`."""

from __future__ import annotations

import argparse


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --json."""
    parser.add_argument("--json", action="store_true", help="Print one JSON value instead of text.")

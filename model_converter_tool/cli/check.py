"""`modelconvert check PATH`."""

from __future__ import annotations

import argparse

from megatron_converters.basics.quantities import count, size
from megatron_converters.cli.console import put, put_json, warn

from . import add_json_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("model_path", metavar="PATH", help="Folder of any format.")
    parser.add_argument(
        "-f", "--format", metavar="FMT", default=None, help="Format that it must be of, such as huggingface, megatron."
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="Show what was found.")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Check a model; 0 if it is whole."""
    from ..api import ModelConverterAPI

    report = ModelConverterAPI(args.workspace).check_model(args.model_path, args.format)
    if args.json:
        put_json(report)
    elif report["success"]:
        compared = (
            f"every byte is as {report['manifest']} says"
            if report["manifest"]
            else "no manifest to compare its bytes with"
        )
        what = f"{report['format']}, {report['family']}, {count(report['tensors'], 'tensor')}, {size(report['bytes'])}"
        put(f"OK: {report['path']}: {what}; {compared}")
    if args.verbose and not args.json:
        for name in report.keys() - {"path", "problems", "success"}:
            put(f"  {name}: {report[name]}")
    for problem in [] if args.json else report["problems"]:
        warn(f"FAILED: {problem}")
    return 0 if report["success"] else 1

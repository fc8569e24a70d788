"""`modelconvert inspect PATH`."""

from __future__ import annotations

import argparse

from megatron_converters.cli.console import put, put_json

from . import add_json_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("model_path", metavar="PATH", help="Folder of any format, or a name on the Hub.")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print what a model holds; 0 if it can be read."""
    from ..api import ModelConverterAPI

    found = ModelConverterAPI(args.workspace).inspect_model(args.model_path)
    if args.json:
        put_json(found)
        return 0
    from megatron_converters.formats.reading import ReadOptions, open_source
    from megatron_converters.inspection.in_words import lines
    from megatron_converters.inspection.inventory import survey

    put("\n".join(lines(survey(*open_source(found["path"], ReadOptions(mup=found["mup"]))))))
    return 0

"""Options of `verify` and `diff`, and the two folders that they compare."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ...formats.kinds import FORMATS
from ..console import say
from ..options.reading import add_reading_arguments, read_options
from ..options.shared import add_shared

if TYPE_CHECKING:
    from ...comparison.report import Pair


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for reading two folders."""
    add_reading_arguments(parser)
    parser.add_argument(
        "--from-b", dest="b_format", choices=FORMATS, default=None, help="Format of B; --from is that of A."
    )
    add_shared(parser, "--json", "--quiet")


def pair_of(args: argparse.Namespace) -> Pair:
    """Open A and B; prints what they are, and their notes, unless JSON is wanted."""
    from ...comparison.report import open_pair

    pair = open_pair(args.a, args.b, read_options(args), args.b_format)
    if not args.json:
        for name, found, source in zip("AB", pair.formats, pair.sources, strict=True):
            say(args, f"{name}: {source.origin.described} ({found}, {source.spec.family})")
            for note in (*source.origin.notes, *(f"not compared: {ignored}" for ignored in source.origin.ignored)):
                say(args, f"  {note}")
    return pair

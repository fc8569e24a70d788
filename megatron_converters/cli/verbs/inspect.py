"""`inspect X`: what a folder holds, as text, as JSON, or as a page with a picture of the shards. Reads headers only."""

from __future__ import annotations

import argparse

from ..console import put, put_json
from ..html_page import page_path, write_page
from ..options.reading import add_reading_arguments, open_any
from ..options.shared import add_shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("folder", metavar="X", help="Folder to look at; its format is recognised.")
    add_shared(parser, "--json")
    parser.add_argument(
        "--html",
        metavar="FILE",
        default=None,
        help="Write a page that stands alone, with the map of layers and ranks.",
    )
    add_reading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Look at the folder; 0 if it can be read."""
    from ...inspection.inventory import survey

    target = page_path(args.html)
    kind, source = open_any(args.folder, args)
    found = survey(kind, source)
    if args.json:
        from ...inspection.in_json import as_json

        put_json(as_json(found))
    else:
        from ...inspection.in_words import lines

        put("\n".join(lines(found)))
    if target is not None:
        from ...inspection.shard_map.page import page

        write_page(target, page(found))
    return 0

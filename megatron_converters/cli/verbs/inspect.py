"""`inspect X`: what a folder holds, as text, as JSON, or as a page with a picture of the shards. Reads headers only."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...basics.errors import UsageError
from ...conversion.staging import write_text
from ...inspection.in_json import as_json
from ...inspection.in_words import lines
from ...inspection.inventory import survey
from ...inspection.shard_map.page import page
from ..console import put, put_json, warn
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
    target = None if args.html is None else _writable(Path(args.html))
    kind, source = open_any(args.folder, args)
    found = survey(kind, source)
    if args.json:
        put_json(as_json(found))
    else:
        put("\n".join(lines(found)))
    if target is not None:
        write_text(target, page(found)) if _replaceable(target) else target.write_text(page(found), encoding="utf-8")
        warn(f"wrote the page {target}")  # standard output has the result, which may be JSON
    return 0


def _replaceable(path: Path) -> bool:
    """Whether it is a file or will be one; a link and a device, such as /dev/stdout, must stay what they are."""
    return not path.is_symlink() and (path.is_file() or not path.exists())


def _writable(path: Path) -> Path:
    if path.is_dir() or not path.parent.is_dir():
        fault = "is a folder" if path.is_dir() else f"cannot be made: there is no folder {path.parent}"
        raise UsageError(f"--html {path} {fault}; name a file in a folder that exists")
    return path

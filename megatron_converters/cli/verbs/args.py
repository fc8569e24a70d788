"""`args X`: all `pretrain_gpt.py` flags of a model or a checkpoint."""

from __future__ import annotations

import argparse
import shlex

from ..console import put, put_json, warn
from ..options.reading import add_reading_arguments, read_options
from ..options.shared import add_shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("folder", metavar="X", help="Folder to look at; its format is recognised.")
    add_shared(parser, "--json", "--allow-inexpressible")
    add_reading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the flags on standard output and what to know of them on standard error; 0 if they express the model."""
    from ...api import training_flags

    found = training_flags(args.folder, allow_inexpressible=args.allow_inexpressible, read=read_options(args))
    if args.json:
        from ...assets.training_args import margs_to_json

        words = shlex.split(" ".join(found.flags))
        plain = margs_to_json(argparse.Namespace(**found.arguments))
        put_json({"flags": words, "arguments": plain, "notes": found.notes})
    else:
        from ...formats.megatron.flags import as_shell

        put(as_shell(found.flags))
        for note in found.notes:
            warn(note)
    return 0

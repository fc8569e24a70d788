"""`args X`: all `pretrain_gpt.py` flags of a model or a checkpoint."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ...assets.training_args import margs_to_json
from ...basics.errors import raise_all
from ...formats.megatron.flags import all_flags, as_shell, flag_warnings
from ...formats.megatron.limits import inexpressible
from ...inspection.inventory import survey
from ...inspection.training_flags import arguments
from ..console import put, put_json, warn
from ..options.reading import add_reading_arguments, open_any
from ..options.shared import add_shared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("folder", metavar="X", help="Folder to look at; its format is recognised.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object: flags as words, arguments, notes.")
    add_shared(parser, "--allow-inexpressible")
    add_reading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the flags on standard output and what to know of them on standard error; 0 if they express the model."""
    kind, source = open_any(args.folder, args)
    reasons = inexpressible(source.spec)
    if not args.allow_inexpressible:
        raise_all(
            "Megatron-LM's arguments cannot express this model (pass --allow-inexpressible to see them all the same):",
            reasons,
        )
    named = args.folder if args.ckpt_dir_name is None else source.origin.described
    said, notes = arguments(survey(kind, source), source, Path(named))
    shown = all_flags(said)
    notes += [f"warning: Megatron-LM will not compute {reason}" for reason in reasons]
    notes += flag_warnings(source.spec, shown, said.get("tensor_model_parallel_size", 1))
    if args.json:
        words = shlex.split(" ".join(shown))
        plain = margs_to_json(argparse.Namespace(**said))
        put_json({"flags": words, "arguments": plain, "notes": notes})
    else:
        put(as_shell(shown))
        for note in notes:
            warn(note)
    return 0

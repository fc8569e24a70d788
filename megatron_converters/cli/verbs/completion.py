"""`completion SHELL`: the script by which a shell completes this package's commands, made of their parsers as they are."""

from __future__ import annotations

import argparse

from ..completion import SHELLS, Command, Program
from ..console import put
from ..main import PROG, VERBS, verb_parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's operand."""
    parser.add_argument("shell", metavar="SHELL", choices=list(SHELLS), help=f"One of {', '.join(SHELLS)}.")


def run(args: argparse.Namespace) -> int:
    """Print the script; 0."""
    put(SHELLS[args.shell](programs()))
    return 0


def programs() -> list[Program]:
    """Commands that are completed. The scripts have the options of the plugins that they take by default."""
    from .. import mlm_to_hf, queue_convert

    verbs = [Command(name, verb.line, tuple(verb_parser(name).actions)) for name, verb in VERBS.items()]
    scripts = {"megatron-convert": queue_convert, "megatron-convert-mlm-to-hf": mlm_to_hf}
    alone = [Program(name, (Command("", "", tuple(module.parser().actions)),)) for name, module in scripts.items()]
    return [Program(PROG, tuple(verbs)), *alone]

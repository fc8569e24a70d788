"""`help [VERB]`: help of the command, or of a verb."""

from __future__ import annotations

import argparse

from ..console import put
from ..main import VERBS, parser_of, verb_parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's operand."""
    parser.add_argument("of", metavar="VERB", nargs="?", choices=list(VERBS), default=None, help="Verb to explain.")


def run(args: argparse.Namespace) -> int:
    """Print the help; 0."""
    parser = parser_of([]) if args.of is None else verb_parser(args.of)
    put(parser.format_help().rstrip())
    return 0

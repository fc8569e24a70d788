"""`megatron-converters VERB …`: one command over every format. A verb's module is imported when the verb is used."""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..basics.errors import UsageError
from ..basics.exit_codes import ANY, EXIT_CODES
from ..conversion.crew_cluster import is_first_process
from .console import exit_on_error, prepare_process

#: Verb: module in `verbs`, its operands, one line of help.
VERBS = {
    "convert": ("SRC DST", "Convert a model from any format to any other, or cut a checkpoint differently."),
    "plan": ("SRC DST", "Say what a conversion would write, and need; writes nothing."),
    "verify": ("A [B]", "Tell whether two folders hold the same model, or whether an output is as it was written."),
    "diff": ("A B", "Say what differs between two checkpoints: arguments, tensors, and by how much."),
    "inspect": (
        "X",
        "Show what a folder holds: sizes, dtypes, parallel layout, files; as a page with a picture of the shards.",
    ),
    "args": ("X", "Print the pretrain_gpt.py flags of a model or checkpoint."),
}
_PROG = "megatron-converters"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb; exits with a code of its row in `EXIT_CODES`."""
    prepare_process()
    arguments = list(sys.argv[1:] if argv is None else argv)
    codes = EXIT_CODES.get(arguments[0], ANY) if arguments else ANY
    with exit_on_error(_PROG, codes, as_json="--json" in arguments and is_first_process()):
        args = _parser(arguments).parse_args(arguments)
        from ..families.scope import family_of

        with family_of(getattr(args, "family_file", None)):
            code = _module(args.verb).run(args)
    raise SystemExit(code)


class _Parser(argparse.ArgumentParser):
    """Parser whose errors are `UsageError`, so that they are reported as all others are."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and raise."""
        self.print_usage(sys.stderr)
        raise UsageError(message)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=_PROG,
        description="Move language models between Hugging Face and Megatron-LM checkpoints, on a CPU, without building a model.",
        epilog="Formats are recognised by what a folder holds. `megatron-converters VERB --help` shows a verb's options. "
        f"{ANY}",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{_PROG} {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, (operands, line) in VERBS.items():
        usage = f"{_PROG} {verb} {operands} [options]"  # not a screen full of options before each error
        epilog = str(EXIT_CODES[verb])
        sub = verbs.add_parser(verb, help=line, description=line, usage=usage, epilog=epilog, allow_abbrev=False)
        if verb in arguments:
            _module(verb).add_arguments(sub)
    return parser


def _module(verb: str) -> types.ModuleType:
    return importlib.import_module(f"{__package__}.verbs.{verb}")


if __name__ == "__main__":
    main()

"""`megatron-converters VERB …`: one command over every format. A verb's module is imported when the verb is used."""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from collections.abc import Sequence

from .. import __version__
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
    """Run a verb; exits with its code: 0 done and equal, 1 failed or different, 2 wrong usage."""
    prepare_process()
    with exit_on_error(_PROG):
        arguments = list(sys.argv[1:] if argv is None else argv)
        args = _parser(arguments).parse_args(arguments)
        from ..families.scope import family_of

        with family_of(getattr(args, "family_file", None)):
            code = _module(args.verb).run(args)
    raise SystemExit(code)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG,
        description="Move language models between Hugging Face and Megatron-LM checkpoints, on a CPU, without building a model.",
        epilog="Formats are recognised by what a folder holds. `megatron-converters VERB --help` shows a verb's options. "
        "Exit codes: 0 done or equal, 1 failed or different, 2 wrong usage, 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{_PROG} {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, (operands, line) in VERBS.items():
        usage = f"{_PROG} {verb} {operands} [options]"  # not a screen full of options before each error
        sub = verbs.add_parser(verb, help=line, description=line, usage=usage, allow_abbrev=False)
        if verb in arguments:
            _module(verb).add_arguments(sub)
    return parser


def _module(verb: str) -> types.ModuleType:
    return importlib.import_module(f"{__package__}.verbs.{verb}")


if __name__ == "__main__":
    main()

"""`megatron-converters VERB …`: one command over every format. A verb's module is imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from collections.abc import Sequence

from . import __version__
from .console import errors_told, prepare_process

#: Verb: module in `verbs`, one line of help.
VERBS = {
    "convert": "Convert a model from any format to any other, or cut a checkpoint differently.",
    "plan": "Say what a conversion would write, and need; writes nothing.",
    "verify": "Tell whether two folders hold the same model, or whether an output is as it was written.",
    "diff": "Say what differs between two checkpoints: arguments, tensors, and by how much.",
    "inspect": "Show what a folder holds: sizes, dtypes, parallel layout, files; as a page with a picture of the shards.",
    "args": "Print the pretrain_gpt.py flags of a model or checkpoint.",
}
_PROG = "megatron-converters"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb; exits with its code: 0 done and equal, 1 failed or different, 2 wrong usage."""
    prepare_process()
    with errors_told(_PROG):
        arguments = list(sys.argv[1:] if argv is None else argv)
        args = _parser(arguments).parse_args(arguments)
        code = _module(args.verb).run(args)
    raise SystemExit(code)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG,
        description="Move language models between Hugging Face and Megatron-LM checkpoints, on a CPU, without building a model.",
        epilog="Formats are recognised by what a folder holds. `megatron-converters VERB --help` shows a verb's options.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{_PROG} {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, line in VERBS.items():
        sub = verbs.add_parser(verb, help=line, description=line, allow_abbrev=False)
        if verb in arguments:
            _module(verb).add_arguments(sub)
    return parser


def _module(verb: str) -> types.ModuleType:
    return importlib.import_module(f"{__package__}.verbs.{verb}")


if __name__ == "__main__":
    main()

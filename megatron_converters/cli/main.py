"""`megatron-converters VERB …`: one command over every format. A verb's module is imported when the verb is used."""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .. import __version__
from ..basics.exit_codes import ANY, EXIT_CODES
from ..conversion.crew_cluster import is_first_process
from .console import exit_on_error, prepare_process
from .numpy_threads import import_numpy
from .parser import Parser

PROG = "megatron-converters"


class Verb(NamedTuple):
    """What help says of a verb: its operands, one line, and two command lines (without the command's name)."""

    operands: str
    line: str
    examples: tuple[str, str]


#: By the name of the module in `verbs`.
VERBS = {
    "convert": Verb(
        "SRC DST",
        "Convert a model from any format to any other, or cut a checkpoint differently.",
        ("convert llama-hf llama-megatron --tp 2 --pp 2", "convert llama-megatron llama-back --to hf --dtype bf16"),
    ),
    "plan": Verb(
        "SRC DST",
        "Say what a conversion would write, and need; writes nothing.",
        ("plan llama-hf llama-tp4 --tp 4", "plan llama-megatron llama-again --to hf --json"),
    ),
    "verify": Verb(
        "A [B]",
        "Tell whether two folders hold the same model, or whether an output is as it was written.",
        ("verify llama-hf llama-megatron", "verify llama-megatron"),
    ),
    "diff": Verb(
        "A B",
        "Say what differs between two checkpoints: arguments, tensors, and by how much.",
        ("diff llama-hf llama-megatron", "diff llama-hf llama-back --top 5 --ignore-config-fields my_field"),
    ),
    "inspect": Verb(
        "X",
        "Show what a folder holds: sizes, dtypes, parallel layout, files; as a page with a picture of the shards.",
        ("inspect llama-megatron", "inspect llama-megatron --html shards.html"),
    ),
    "args": Verb(
        "X",
        "Print the pretrain_gpt.py flags of a model or checkpoint.",
        ("args llama-hf", "args llama-megatron --json"),
    ),
    "families": Verb(
        "",
        "Show the supported model families: classes, formats, least Megatron-LM release, and how each was proven.",
        ("families", "families --json"),
    ),
    "completion": Verb(
        "SHELL",
        "Print what makes a shell complete verbs, options and their values.",
        (
            "completion bash > ~/.local/share/bash-completion/completions/megatron-converters",
            "completion zsh > ~/.zfunc/_megatron-converters",
        ),
    ),
    "help": Verb("[VERB]", "Show help, of the command or of a verb.", ("help", "help convert")),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb; exits with a code of its row in `EXIT_CODES`."""
    prepare_process()
    arguments = list(sys.argv[1:] if argv is None else argv)
    codes = EXIT_CODES.get(arguments[0], ANY) if arguments else ANY
    with exit_on_error(PROG, codes, as_json="--json" in arguments and is_first_process()):
        args = parser_of(arguments[:1]).parse_args(arguments)
        code = _run(args)
    raise SystemExit(code)


def _run(args: argparse.Namespace) -> int:
    """Run the verb, with the family file that it is given where it reads models; returns its exit code."""
    run: Callable[[argparse.Namespace], int] = _module(args.verb).run
    if not hasattr(args, "family_file"):
        return run(args)
    import_numpy()
    from ..families.scope import family_of

    with family_of(args.family_file):
        return run(args)


def parser_of(verbs: Sequence[str]) -> Parser:
    """Parser of the command and of these verbs, whose modules it imports; where they are none, of all verbs without options."""
    parser = Parser(
        prog=PROG,
        description="Move language models between Hugging Face and Megatron-LM checkpoints, on a CPU, without building a model.",
        epilog=f"Formats are recognised by what a folder holds. `{PROG} help VERB` shows a verb's options.\n{ANY}",
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    named = [name for name in VERBS if name in verbs]
    for name in named or VERBS:
        verb = VERBS[name]
        examples = [f"{PROG} {line}" for line in verb.examples]
        usage = f"{PROG} {name} {verb.operands} [options]"  # not a screen full of options before each error
        epilog, line = str(EXIT_CODES[name]), verb.line
        sub = subparsers.add_parser(name, help=line, description=line, usage=usage, epilog=epilog, examples=examples)
        if named:
            _module(name).add_arguments(sub)
    return parser


def verb_parser(name: str) -> Parser:
    """Parser of one verb, complete."""
    (verbs,) = (action for action in parser_of([name]).actions if action.dest == "verb")
    parser: Parser = verbs.choices[name]  # type: ignore[index]
    return parser


def _module(verb: str) -> types.ModuleType:
    return importlib.import_module(f"{__package__}.verbs.{verb}")


if __name__ == "__main__":
    main()

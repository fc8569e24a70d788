"""`modelconvert COMMAND …`. A command's module is imported when the command is used."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Sequence

from megatron_converters import __version__
from megatron_converters.basics.exit_codes import EXIT_CODES
from megatron_converters.cli.console import exit_on_error, prepare_process
from megatron_converters.cli.parser import Parser

from ..debug import show_steps

#: Command: its operands, one line of help.
COMMANDS = {
    "convert": ("INPUT FORMAT", "Convert a model, a folder or a name on the Hugging Face Hub."),
    "batch": ("CONFIG", "Convert all models of a YAML or JSON file."),
    "inspect": ("PATH", "Show what a model holds."),
    "check": ("PATH", "Tell whether a model is whole, and as it was written."),
    "history": ("", "List the conversions that were made."),
    "config": ("ACTION", "Show and change settings."),
}
_PROG = "modelconvert"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; exits with a code of its row in `EXIT_CODES`."""
    prepare_process()
    with exit_on_error(_PROG):
        arguments = list(sys.argv[1:] if argv is None else argv)
        args = _parser(arguments).parse_args(arguments)
        show_steps()
        code = _module(args.command).run(args)
    raise SystemExit(code)


def _parser(arguments: Sequence[str]) -> Parser:
    parser = Parser(
        prog=_PROG,
        description="Convert language models between Hugging Face and Megatron-LM, on a CPU.",
        epilog=f"`{_PROG} COMMAND --help` shows a command's options. MODELCONVERT_DEBUG=1 shows each step. "
        f"{EXIT_CODES[_PROG]}",
        by_need=False,
    )
    parser.add_argument("--version", action="version", version=f"{_PROG} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, (operands, line) in COMMANDS.items():
        usage = " ".join(filter(None, (_PROG, name, operands, "[options]")))
        epilog = str(EXIT_CODES[f"{_PROG} {name}"])
        sub = commands.add_parser(name, help=line, description=line, usage=usage, epilog=epilog, by_need=False)
        if name in arguments:
            _module(name).add_arguments(sub)
            sub.add_argument(
                "--workspace",
                metavar="DIR",
                default=None,
                help="Folder of settings and history; by default MODELCONVERT_HOME, or modelconvert in XDG_DATA_HOME.",
            )
    return parser


def _module(name: str) -> types.ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


if __name__ == "__main__":
    main()

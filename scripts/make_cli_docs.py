#!/usr/bin/env python3
"""Write docs/cli.md, a list of all commands and options, from the parsers of the commands themselves.

python scripts/make_cli_docs.py            write the page
python scripts/make_cli_docs.py --check    exit with 1 if that would change it
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from unittest.mock import patch

if TYPE_CHECKING:
    from megatron_converters.cli.parser import Parser

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/cli.md"
_HEAD = """\
<!-- Made by scripts/make_cli_docs.py; run it after a change of options. -->

# All commands and options

`megatron-converters` is also `python -m megatron_converters`. `convert.py` and `convert_mlm_to_hf_checkpoint.py` are scripts of a
clone; installed, they are `megatron-convert` and `megatron-convert-mlm-to-hf`. `--help` of each command says what stands here.
[Exit codes](json.md#exit-codes) of all commands are in one table.
"""


class Command(NamedTuple):
    """Heading of a section, an entry point, and the words that stand before `--help`."""

    heading: str
    main: Callable[[Sequence[str]], None]
    words: tuple[str, ...] = ()


def commands() -> Iterator[Command]:
    """What the page describes, in its order."""
    from megatron_converters.cli import main, mlm_to_hf, queue_convert, tensor_parallel
    from model_converter_tool.cli import main as modelconvert

    for verb in main.VERBS:
        yield Command(f"megatron-converters {verb}", main.main, (verb,))
    yield Command("convert_mlm_to_hf_checkpoint.py", mlm_to_hf.main)
    for loader, saver in (("llama_mistral", "mcore"), ("core", "hf"), ("core_mf", "mf")):
        yield Command(
            f"convert.py from {loader} to {saver}", queue_convert.main, ("--loader", loader, "--saver", saver)
        )
    yield Command("megatron_converters.tp_pp_converter", tensor_parallel.main)
    yield Command("ckpt_to_hf_minicpm_with_tp_pp.py", tensor_parallel.main_direct)
    for name in modelconvert.COMMANDS:
        yield Command(f"modelconvert {name}", modelconvert.main, (name,))


def parser_of(command: Command) -> Parser:
    """Parser that answers `--help` of a command."""
    asked: list[Parser] = []
    answer = patch.object(argparse.ArgumentParser, "print_help", lambda parser, file=None: asked.append(parser))
    with answer, suppress(SystemExit):
        command.main([*command.words, "--help"])
    return asked[-1]


def page() -> str:
    """The whole page. A table that a section above has already is named, not repeated."""
    from megatron_converters.cli.options.groups import grouped
    from megatron_converters.cli.options.spellings import other_names

    lines, seen = [_HEAD], dict[tuple[str, ...], str]()
    for command in commands():
        parser = parser_of(command)
        usage = " ".join((parser.usage or "").replace("%(prog)s", parser.prog).split())
        lines += [f"## {command.heading}", "", _sentences(parser.description), ""]
        lines += ["```text", *filter(None, (usage, *parser.examples)), "```", ""]
        for title, actions in grouped(parser.actions):
            rows = tuple(_rows(parser, actions))
            if rows in seen:
                lines += [f"**{_capital(title)}:** as for [{seen[rows]}](#{_anchor(seen[rows])}).", ""]
            elif rows:
                seen[rows] = command.heading
                lines += [f"**{_capital(title)}**", "", "| option | meaning |", "|---|---|", *rows, ""]
        others = [f"`{own}`: {_code(names)}" for own, names in other_names(_names(parser)) if names]
        lines += [f"Other programs' names, which are understood, too: {'; '.join(others)}.", ""] if others else []
        lines += [_sentences(parser.epilog), ""] if parser.epilog else []
    return "\n".join(lines).rstrip() + "\n"


def _names(parser: Parser) -> list[str]:
    return [name for action in parser.actions for name in action.option_strings]


def _rows(parser: argparse.ArgumentParser, actions: Sequence[argparse.Action]) -> Iterator[str]:
    for action in actions:
        if action.help is argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        names = sorted(action.option_strings, key=len) or [str(action.metavar or action.dest)]
        value = _value(action) if action.option_strings and action.nargs != 0 else ""
        first = _code(names) + (f" {value}" if value else "")
        yield f"| {first} | {_cell(parser._get_formatter()._expand_help(action) if action.help else '')} |"


def _value(action: argparse.Action) -> str:
    if action.choices:
        return _code(map(str, action.choices))
    return f"`{action.metavar or action.dest.upper()}`".replace("|", "\\|")


def _cell(text: str) -> str:
    return _sentences(text).replace("|", "\\|")


def _sentences(text: str | None) -> str:
    """Text in one line, in which Markdown changes nothing but code."""
    words = " ".join((text or "").split()).split("`")
    return "`".join(word if number % 2 else word.replace("*", "\\*") for number, word in enumerate(words))


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _capital(title: str) -> str:
    return title[0].upper() + title[1:]


def _anchor(heading: str) -> str:
    kept = "".join(letter for letter in heading.lower() if letter.isalnum() or letter in " -_")
    return kept.replace(" ", "-")


if __name__ == "__main__":
    from made_pages import keep

    keep(PAGE, lambda _: page(), "the parsers")

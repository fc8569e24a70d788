"""Parser of every command line: it knows other programs' names of options, suggests what a typo means, and groups its help."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from ..basics.errors import UsageError
from .options.groups import grouped
from .options.spellings import VALUES, VERBS, did_you_mean, other_names, respelled, unknown_option

_HELP = ("-h", "--help")


class Parser(argparse.ArgumentParser):
    """Parser of a command, or of a verb. Options are never abbreviated, and unknown ones are errors of this command.

    `examples` are command lines that end its help. `by_need` says whether help groups options as `options/groups.py` does.
    """

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), by_need: bool = True, **options: Any) -> None:
        self._by_need = by_need
        super().__init__(*arguments, **{"allow_abbrev": False, "formatter_class": _Formatter, **options})
        self.examples = examples

    @property
    def actions(self) -> list[argparse.Action]:
        """Operands and options, in the order of their declaration."""
        return list(self._actions)

    # argparse calls this for a verb, too, and would let the command report what is unknown, with the command's usage
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse all arguments; raises `UsageError` if one is unknown."""
        known = self._option_string_actions
        try:
            arguments = respelled(sys.argv[1:] if args is None else list(args), known)
        except ValueError as error:
            self.error(str(error))
        self._refuse_unknown(arguments)
        found, extra = super().parse_known_args(arguments, namespace)
        if extra:
            self.error(f"{' '.join(extra)}: more than this command takes")
        return found, []

    def _refuse_unknown(self, arguments: Sequence[str]) -> None:
        """Raise if an option is unknown, which is said before anything that is missing."""
        known = self._option_string_actions
        if self._subparsers is not None:
            first = _option(arguments[0]) if arguments else None
            if not arguments:
                self.error(f"a verb is missing; {_HELP[1]} shows what there is")
            if first is not None and first not in known:
                self.error(f"there is no option {first} here; options stand behind the verb")
            return
        options = arguments[: arguments.index("--")] if "--" in arguments else arguments
        found = [option for word in options if (option := _option(word)) is not None]
        unknown = [option for option in found if option not in known and option[:2] not in known]  # -oPATH is -o PATH
        if unknown and not any(option in arguments for option in _HELP):
            self.error("; ".join(unknown_option(option, known) for option in dict.fromkeys(unknown)))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raise `ArgumentError` with a suggestion for a value that is none of the option's."""
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        table = VERBS if isinstance(action, argparse._SubParsersAction) else VALUES
        words = f"{value!r} is not one of {', '.join(known)}{did_you_mean(str(value), known, table)}"
        raise argparse.ArgumentError(action, words)

    def error(self, message: str) -> NoReturn:
        """Print the usage and raise `UsageError`, so that a wrong command line is reported as any other error is."""
        self.print_usage(sys.stderr)
        raise UsageError(message)

    def format_help(self) -> str:
        """Help: options by need, and examples at the end."""
        if not self._by_need:
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for title, actions in grouped(self._actions):
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(self._further_names())
        formatter.add_text(self.epilog)
        if self.examples:
            formatter.add_text("\n".join(["examples:", *(f"  {line}" for line in self.examples)]))
        return formatter.format_help()

    def _further_names(self) -> str:
        """Lines on the names by which other programs know this command's options."""
        rows = [f"  {own}: {', '.join(others)}" for own, others in other_names(self._option_string_actions) if others]
        return "\n".join(["other programs' names, which are understood, too:", *rows]) if rows else ""


def _option(word: str) -> str | None:
    """Option that a word of a command line is meant to be; None for a value, as argparse tells them apart."""
    if not word.startswith("-") or word in ("-", "--") or " " in word:
        return None
    try:
        float(word)
    except ValueError:
        return word.partition("=")[0]
    return None


class _Formatter(argparse.HelpFormatter):
    """Formatter whose text keeps indented lines, and that writes an option's value once, after its names, the shortest first."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        return "\n".join(
            indent + line if line.startswith(" ") else textwrap.fill(line, width, break_on_hyphens=False)
            for line in lines
        )

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        names = ", ".join(sorted(action.option_strings, key=len))
        return f"{names} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

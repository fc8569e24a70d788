"""Completion scripts for bash and zsh, made of parsers."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """Verb of a program, or the whole program where the name is empty: one line on it, its operands and options."""

    name: str
    line: str
    actions: tuple[argparse.Action, ...]


class Program(NamedTuple):
    """Command by its name on the path, and its verbs."""

    name: str
    commands: tuple[Command, ...]

    @property
    def has_verbs(self) -> bool:
        """Whether the first word is a verb."""
        return bool(self.commands[0].name)


#: What to offer for a value, by the name of values in help.
_FILES, _FOLDERS = ("FILE", "PATH"), ("DIR",)


def _options(command: Command) -> list[argparse.Action]:
    return [action for action in command.actions if action.option_strings and action.help is not argparse.SUPPRESS]


def _operand_words(command: Command) -> list[str]:
    """Words that an operand of the command can be, where it is one of a few."""
    return [str(word) for action in command.actions if not action.option_strings for word in action.choices or ()]


def bash(programs: Iterable[Program]) -> str:
    """Script for bash 3.2 and later. Where it offers nothing, bash completes file names."""
    lines = ["# bash completion; made by `megatron-converters completion bash`"]
    for program in programs:
        function = f"_{program.name.replace('-', '_')}"
        lines += [f"{function}() {{", *_BASH_BEGIN, f'    case "{"$verb" if program.has_verbs else ""}" in']
        if program.has_verbs:
            verbs = " ".join(command.name for command in program.commands)
            lines += ['        "")', f'            words="{verbs} --help --version" ;;']
        for command in program.commands:
            lines += _bash_case(command)
        lines += [*_BASH_END, f"complete -o bashdefault -o default -F {function} {program.name}"]
    return "\n".join(lines)


_BASH_BEGIN = """\
    local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" verb="" words="" options=""
    if [[ "$cur" == "=" ]]; then cur=""; elif [[ "$prev" == "=" ]]; then prev="${COMP_WORDS[COMP_CWORD-2]}"; fi
    (( COMP_CWORD > 1 )) && verb="${COMP_WORDS[1]}"
    COMPREPLY=()""".splitlines()
_BASH_END = """\
    esac
    [[ "$cur" == -* ]] && words="$words $options"
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}""".splitlines()


def _bash_case(command: Command) -> Iterator[str]:
    yield f"        {command.name or '*'})"
    names = [name for action in _options(command) for name in action.option_strings]
    yield f'            options="{" ".join(names)}"'
    yield f'            words="{" ".join(_operand_words(command))}"'
    yield '            case "$prev" in'
    for action in _options(command):
        if action.choices:
            yield f'                {"|".join(action.option_strings)}) words="{" ".join(map(str, action.choices))}" ;;'
    yield "            esac ;;"


def zsh(programs: Iterable[Program]) -> str:
    """Script for zsh: a file of `fpath`, or to be sourced once `compinit` has run."""
    listed = list(programs)
    names = " ".join(program.name for program in listed)
    lines = [f"#compdef {names}", "# made by `megatron-converters completion zsh`"]
    lines += ["_megatron_converters() {", "    case $service in"]
    for program in listed:
        lines += [
            f"    {program.name})",
            *(_zsh_verbs(program) if program.has_verbs else _zsh_arguments(program.commands[0])),
        ]
        lines += ["        ;;"]
    lines += ["    esac", "}"]
    # Within a file of fpath, this is the function's body, called for the first completion.
    lines += ["if [[ $zsh_eval_context[-1] == loadautofunc ]]; then", '    _megatron_converters "$@"', "else"]
    lines += [f"    compdef _megatron_converters {names}", "fi"]
    return "\n".join(lines)


def _zsh_verbs(program: Program) -> Iterator[str]:
    yield "        local -a verbs=("
    yield from (f"            {_quoted(f'{command.name}:{command.line}')}" for command in program.commands)
    yield "        )"
    yield "        if (( CURRENT == 2 )); then _describe -t verbs verb verbs; return; fi"
    yield "        shift words; (( CURRENT-- ))"
    yield "        case $words[1] in"
    for command in program.commands:
        yield f"        {command.name})"
        yield from _zsh_arguments(command)
        yield "            ;;"
    yield "        esac"


def _zsh_arguments(command: Command) -> Iterator[str]:
    yield "            _arguments \\"
    for action in _options(command):
        yield from (f"                {_quoted(spec)} \\" for spec in _zsh_option(action))
    words = _operand_words(command)
    operand = f"({' '.join(words)})" if words else "_files"
    yield f"                {_quoted(f'*: :{operand}')}"


def _zsh_option(action: argparse.Action) -> Iterator[str]:
    """An option for `_arguments`, under each of its names, which exclude each other."""
    words = re.sub(r"([\[\]:\\])", r"\\\1", _first_sentence(action.help or ""))
    for name in action.option_strings:
        others = f"({' '.join(action.option_strings)})"
        if action.nargs == 0:
            yield f"{others}{name}[{words}]"
        else:
            yield f"{others}{name}={'' if name.startswith('--') else '-'}[{words}]: :{_zsh_value(action)}"


def _zsh_value(action: argparse.Action) -> str:
    if action.choices:
        return f"({' '.join(map(str, action.choices))})"
    if action.metavar in _FILES:
        return "_files"
    return "_files -/" if action.metavar in _FOLDERS else ""


def _first_sentence(text: str) -> str:
    return re.split(r"\.(?:\s|$)", text, maxsplit=1)[0]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


#: Script of each shell.
SHELLS: Mapping[str, Callable[[Sequence[Program]], str]] = {"bash": bash, "zsh": zsh}

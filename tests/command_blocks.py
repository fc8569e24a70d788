"""Command blocks of the documentation, run as they are printed.

This project's own commands run in processes that are forked from this one, which saves each of them the start of Python and its
imports. All other lines run in bash, so variables that these set are seen by the lines next to them alone.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import string
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_converters.cli import main, mlm_to_hf, queue_convert
from tests.forked import forked
from tests.helpers import ROOT

#: By the first words of a line, the entry point that they start.
PROGRAMS: Mapping[tuple[str, ...], Callable[[Sequence[str]], None]] = {
    ("python", "-m", "megatron_converters"): main.main,
    ("python", "convert.py"): queue_convert.main,
    ("python", "convert_mlm_to_hf_checkpoint.py"): mlm_to_hf.main,
}
_PUNCTUATION = set("();<>|&`")


class Command(NamedTuple):
    """One of this project's commands: its entry point, its arguments, and the file that it is redirected to, if any."""

    program: Callable[[Sequence[str]], None]
    arguments: list[str]
    output: str | None


def blocks(text: str, language: str) -> list[str]:
    """Code blocks of a page that are marked with a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def lines_of(block: str) -> list[str]:
    """Lines of a block, each with those that it goes on in."""
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def command(line: str, variables: Mapping[str, str]) -> Command | None:
    """A line as one of this project's commands; None if it is another command, or more than one."""
    try:
        reader = shlex.shlex(string.Template(line).substitute(variables), posix=True, punctuation_chars=True)
        reader.whitespace_split = True
        words = list(reader)
    except (ValueError, KeyError):  # an expansion or a quotation that takes a shell
        return None
    redirected = len(words) > 2 and words[-2] == ">"
    output = words[-1] if redirected else None
    words = words[:-2] if redirected else words
    for first, program in PROGRAMS.items():
        if tuple(words[: len(first)]) == first and not any(set(word) <= _PUNCTUATION for word in words):
            return Command(program, words[len(first) :], output)
    return None


def run_block(block: str, variables: Mapping[str, str], programs: Path) -> None:
    """Run a block in the project's folder; every line must succeed. `programs` is a folder for a program `python`."""
    for ours, lines in itertools.groupby(lines_of(block), lambda line: command(line, variables) is not None):
        if ours:
            for line in lines:
                _run_forked(line, variables)
        else:
            path = f"{_with_python(programs)}{os.pathsep}{os.environ['PATH']}"
            run("\n".join(lines), {**variables, "PATH": path})


def _run_forked(line: str, variables: Mapping[str, str]) -> None:
    read = command(line, variables)
    assert read is not None
    done = forked(lambda: read.program(read.arguments), cwd=ROOT, env=variables)
    assert done.code == 0 and "Traceback" not in done.err, f"{line}\n{done.out}\n{done.err}"
    if read.output is not None:
        Path(read.output).write_text(done.out)


def run(lines: str, environment: Mapping[str, str]) -> str:
    """Run lines in bash, in the project's folder; returns what they print. Each must succeed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", lines],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{lines}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _with_python(programs: Path) -> Path:
    """The folder, with a program `python` that is this Python. A link would lose the virtual environment."""
    if not programs.exists():
        programs.mkdir()
        (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (programs / "python").chmod(0o755)
    return programs

"""Completion scripts, loaded into a real bash and a real zsh, with every verb and option as the parsers have them."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from megatron_converters.cli.main import VERBS, verb_parser
from tests.helpers import succeeded, verb

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
needs_zsh = pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, made = tmp_path_factory.mktemp("completion"), {}
    for shell in ("bash", "zsh"):
        made[shell] = folder / f"script.{shell}"
        made[shell].write_text(succeeded(verb("completion", shell)).out)
    return made


def completed(script: Path, *words: str) -> list[str]:
    """What bash offers for the last word; "=" is a word of its own, as in bash."""
    code = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); "_${1//-/_}"; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", code, "bash", script, *words], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@needs_bash
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("conv",), ["convert"]),
        (("",), [*VERBS, "--help", "--version"]),
        (("convert", "--tensor"), []),
        (("convert", "--target-tens"), ["--target-tensor-parallel-size"]),
        (("convert", "src", "dst", "--to", "me"), ["megatron"]),
        (("convert", "--to", "=", "h"), ["hf"]),
        (("convert", "--to", "="), ["hf", "megatron", "mindspore"]),
        (("verify", "a", "b", "--tol"), ["--tolerance"]),
        (("convert", "--tol"), []),
        (("help", "ins"), ["inspect"]),
        (("completion", ""), ["bash", "zsh"]),
    ],
)
def test_bash_completes(scripts: dict[str, Path], words: tuple[str, ...], expected: list[str]) -> None:
    assert completed(scripts["bash"], "megatron-converters", *words) == expected


@needs_bash
def test_bash_completes_the_scripts(scripts: dict[str, Path]) -> None:
    assert completed(scripts["bash"], "megatron-convert", "--load-d") == ["--load-dir"]
    assert completed(scripts["bash"], "megatron-convert-mlm-to-hf", "--target-params-dtype", "b") == ["bf16"]


@needs_bash
def test_every_option_of_every_verb_is_offered(scripts: dict[str, Path]) -> None:
    for name in VERBS:
        options = {option for action in verb_parser(name).actions for option in action.option_strings}
        assert set(completed(scripts["bash"], "megatron-converters", name, "-")) == options


@needs_zsh
@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("megatron-converters conv", "megatron-converters convert"),
        ("megatron-converters convert --target-tens", "megatron-converters convert --target-tensor-parallel-size="),
        ("megatron-converters convert a b --to meg", "megatron-converters convert a b --to megatron"),
        ("megatron-convert-mlm-to-hf --target-params-dtype=b", "megatron-convert-mlm-to-hf --target-params-dtype=bf16"),
    ],
)
def test_zsh_completes(scripts: dict[str, Path], tmp_path: Path, typed: str, line: str) -> None:
    """Typed into an interactive zsh, with a tab; a widget then writes the line to a file instead of running it."""
    (tmp_path / ".zshrc").write_text(
        f"autoload -Uz compinit; compinit -u -D; source {scripts['zsh']}; print ready\n"
        "accept() { print -r -- $BUFFER > $ZDOTDIR/line; BUFFER=exit; zle .accept-line }; zle -N accept-line accept\n"
    )
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"ZDOTDIR": str(tmp_path), "TERM": "dumb"}
        os.execvp("zsh", ["zsh", "-d", "-i"])
    try:
        assert "ready" in read_until(terminal, "ready")
        os.write(terminal, f"{typed}\t\n".encode())
        shown = read_until(terminal, "never shown")
        assert (tmp_path / "line").read_text().strip() == line, shown
    finally:
        os.close(terminal)
        os.waitpid(child, 0)


def read_until(terminal: int, text: str, seconds: float = 20.0) -> str:
    """What a terminal shows until it has shown a text, or until time is up."""
    found, deadline = "", time.monotonic() + seconds
    while text not in found and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                found += os.read(terminal, 4096).decode(errors="replace")
            except OSError:  # the shell has ended
                break
    return found

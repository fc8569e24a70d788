"""Streams that cannot be written: a conversion goes on without its log, a result that is lost is an error."""

from __future__ import annotations

import errno
import io
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_converters.basics.errors import ConversionError
from megatron_converters.basics.exit_codes import EXIT_CODES
from megatron_converters.cli import console
from megatron_converters.cli import main as cli
from megatron_converters.conversion.progress import Bar, Lines
from tests.helpers import CONVERT, ROOT, TRACKER, Run, succeeded, verb

HFModel = Callable[..., Path]
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")


def shell(redirect: str, *options: Any, **env: str) -> Run:
    """A command line with a redirection of bash behind it."""
    line = f'exec "$0" "$@" {redirect}'
    done = subprocess.run(
        ["bash", "-c", line, sys.executable, *map(str, options)],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return Run(done.returncode, done.stdout, done.stderr)


def of_verb(redirect: str, *options: Any, **env: str) -> Run:
    return shell(redirect, "-m", "megatron_converters", *options, **env)


@needs_full
@pytest.mark.parametrize("redirect", [">/dev/full", "2>/dev/full", ">&-", "2>&-", "<&- >&- 2>&-", "2>&1 | true"])
def test_a_conversion_goes_on_without_its_log(hf_model: HFModel, redirect: str, tmp_path: Path) -> None:
    pipe = "set -o pipefail; " if "|" in redirect else ""
    source, ours, older = hf_model("llama2"), tmp_path / "ours", tmp_path / "older"
    for command in (
        ("-m", "megatron_converters", "convert", source, ours, "--tp", "2"),
        (CONVERT, "--load-dir", source, "--save-dir", older),
    ):
        line = f'{pipe}"$0" "$@" {redirect}'
        done = subprocess.run(["bash", "-c", line, sys.executable, *map(str, command)], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done
        assert b"Traceback" not in done.stderr
    assert (ours / TRACKER).exists() and (older / TRACKER).exists()
    succeeded(verb("verify", ours))  # no file got a standard stream's number, and words into it


@needs_full
@pytest.mark.parametrize("name", ["inspect", "args", "plan", "diff"])
@pytest.mark.parametrize("redirect", [">/dev/full", ">&-"])
def test_a_result_that_is_lost_is_an_error(hf_model: HFModel, name: str, redirect: str, tmp_path: Path) -> None:
    second = {"plan": [tmp_path / "out"], "diff": [hf_model("llama2")]}.get(name, [])
    run = of_verb(redirect, name, hf_model("llama2"), *second)
    assert run.code == EXIT_CODES[name].failure
    assert run.err.splitlines()[-1].startswith("megatron-converters: error: cannot print the result: ")
    assert "Traceback" not in run.err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_that_the_output_cannot_spell(hf_model: HFModel, encoding: str, tmp_path: Path) -> None:
    """Names of other alphabets, and names that are no text at all."""
    link = Path(os.fsdecode(os.fsencode(tmp_path / "模型 ") + b"\xff"))
    link.symlink_to(hf_model("llama2"))
    out = Path(os.fsdecode(os.fsencode(tmp_path / "m\u00f6del ") + b"\xfe"))
    for options in (
        ("inspect", link, "--json"),
        ("plan", link, out, "--no-measure"),
        ("convert", link, out, "--tp", "2"),
        ("verify", out),
        ("inspect", out, "--html", tmp_path / "page.html"),
        ("verify", link, out, "--json"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "megatron_converters", *map(os.fspath, options)],
            cwd=ROOT,
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr
    flags = (out / "iter_0000001" / "pretrain_gpt_flags.txt").read_bytes()
    assert os.fsencode(out) in flags


def test_a_gone_terminal_stops_no_progress() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    class Tqdm:
        def __init__(self, **_: Any) -> None: ...
        def update(self, count: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        close = update

    for progress in (Lines(Gone()), Bar(Tqdm)):
        progress.start(2)
        progress(2)
        if isinstance(progress, Lines):
            progress.stop()


def test_a_reader_that_has_enough_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    class Enough(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Enough())
    console.put("more")
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(ConversionError, match="cannot print the result: the stream is closed"):
        console.put("more")


def test_the_limit_of_open_files_is_raised_as_far_as_it_goes(hf_model: HFModel, tmp_path: Path) -> None:
    """A checkpoint of hundreds of ranks has as many files; the usual limit is 1024."""
    many = tmp_path / "many"
    succeeded(verb("convert", hf_model("llama2", num_hidden_layers=8), many, "--to", "hf", "--max-shard-size", "1KB"))
    count = len(list(many.glob("*.safetensors")))
    assert count > 50
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 2 * count:
        pytest.skip("this system allows few open files")
    limited = 'ulimit -Sn 40; exec "$0" "$@"'
    command = [sys.executable, "-m", "megatron_converters", "verify", many, hf_model("llama2", num_hidden_layers=8)]
    done = subprocess.run(["bash", "-c", limited, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done
    done = subprocess.run(
        ["bash", "-c", limited.replace("-Sn", "-n"), *map(str, command)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "raise the limit of open files (ulimit -n)" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "a/b"),
            "a/b: Permission denied; give the user who runs this",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "the current folder has been removed"),
        (OSError(errno.EIO, "Input/output error", "a"), "a: Input/output error\n"),
    ],
)
def test_an_error_of_the_system_is_one_sentence(
    error: OSError, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, console.exit_on_error("verb"):
        raise error
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith(f"verb: error: {sentence}")


def test_a_folder_that_cannot_be_listed_is_not_one_of_no_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(SystemExit):
        cli.main(["inspect", str(tmp_path)])
    assert f"cannot list {tmp_path}: Permission denied" in capsys.readouterr().err

"""A stand-in for `python` in the job scripts: what it is asked to run is run in a process that is forked from the test.

The stand-in leaves a request in a folder, and waits; `run` starts a script and answers requests one by one until it ends.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_converters.cli import main
from tests.forked import forked
from tests.helpers import ROOT, Run

#: `python`: its process number names the request, and what comes back.
_CLIENT = """#!/usr/bin/env bash
cd "$(dirname "$0")"
printf '%s\\0' "$@" > $$.new && mkfifo $$.code && mv $$.new $$.request
read -r code < $$.code
cat $$.out; cat $$.err >&2
exit "$code"
"""
_TIMEOUT = 60.0
_PACKAGE = ["-m", "megatron_converters"]


class ServedPython:
    """Program `python` in a folder. `others` runs what is not this project's command; `asked` has all arguments it was given."""

    def __init__(self, folder: Path, others: Callable[[list[str]], Any]) -> None:
        folder.mkdir()
        self.program, self.asked = folder / "python", list[list[str]]()
        self._folder, self._others = folder, others
        self.program.write_text(_CLIENT)
        self.program.chmod(0o755)

    def run(self, command: Sequence[str | Path], env: Mapping[str, str]) -> Run:
        """Run a command whose environment says that PYTHON is this one."""
        environment = {**os.environ, **env, "PYTHON": str(self.program)}
        with (self._folder / "out").open("w+b") as out, (self._folder / "err").open("w+b") as err:
            process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=out, stderr=err)
            deadline = time.monotonic() + _TIMEOUT
            while process.poll() is None:
                for request in self._folder.glob("*.request"):
                    self._answer(request)
                if time.monotonic() > deadline:
                    process.kill()
                    raise TimeoutError(f"{command} asked for {self.asked}")
                time.sleep(0.005)
        return Run(process.returncode, *((self._folder / name).read_text() for name in ("out", "err")))

    def _answer(self, request: Path) -> None:
        words = request.read_text().split("\0")[:-1]
        self.asked.append(words)
        request.unlink()
        ours = words[:2] == _PACKAGE
        done = forked(lambda: main.main(words[2:]) if ours else self._others(words), cwd=ROOT)
        request.with_suffix(".out").write_text(done.out)
        request.with_suffix(".err").write_text(done.err)
        request.with_suffix(".code").write_text(f"{done.code}\n")

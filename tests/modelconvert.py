"""`modelconvert` as its tests run it: in this process, or as a process, always with a workspace of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from model_converter_tool.cli.main import main
from tests.helpers import ROOT, Run, finished, run_here, start


def run(*options: Any) -> Run:
    """Run `modelconvert …` in this process."""
    return run_here(main, options)


def begin(*options: Any, cwd: Path, env: dict[str, str] | None = None) -> Any:
    """Start `python -m model_converter_tool …`; returns the running process."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return start(Path("-m"), "model_converter_tool", *options, cwd=cwd, env={"PYTHONPATH": path, **(env or {})})


def process(*options: Any, cwd: Path, env: dict[str, str] | None = None) -> Run:
    """Run `python -m model_converter_tool …` to its end."""
    return finished(begin(*options, cwd=cwd, env=env), timeout=120)

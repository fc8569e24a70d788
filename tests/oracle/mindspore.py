"""The real mindspore, in processes of a Python of its own: $MINDSPORE_PYTHON, which `scripts/setup_mindspore.sh` prints.

A test that uses it is marked `mindspore`, and skipped where there is none.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a marked test without mindspore."""
    if item.get_closest_marker("mindspore") is not None and (reason := _missing()):
        pytest.skip(reason)


@cache
def _missing() -> str:
    """Why there is no mindspore; empty if there is one."""
    python = os.environ.get("MINDSPORE_PYTHON")
    if not python:
        return "MINDSPORE_PYTHON is not set; scripts/setup_mindspore.sh prints its value"
    try:
        done = subprocess.run([python, "-c", "import mindspore"], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"MINDSPORE_PYTHON={python} does not run: {error}"
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return f"MINDSPORE_PYTHON={python} has no mindspore: {last}" if done.returncode else ""


def run_in_mindspore(*arguments: str | Path) -> None:
    """Run mindspore's Python with these arguments in the root of the project; an error carries what it printed."""
    command = [os.environ["MINDSPORE_PYTHON"], *map(str, arguments)]
    quiet = {**os.environ, "GLOG_v": "3"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet, check=False, timeout=300)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")


def load_in_mindspore(path: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Dtype (`bfloat16`, `float32`), shape and CRC-32 of the bytes of each tensor that mindspore loads.

    From a file, `.safetensors` or `.ckpt`, or from all `.safetensors` of a folder. Each is loaded by `mindspore.load_checkpoint`
    and once more into a network with these names, for a folder with `param_name_map.json` by way of that map; a name that
    mindspore misses or leaves over, or a value that differs, is an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        run_in_mindspore("-m", "tests.oracle.mindspore_load", path.resolve(), result)
        found = json.loads(result.read_text(encoding="utf-8"))
    return {name: (dtype, tuple(shape), crc) for name, (dtype, shape, crc) in found.items()}

"""Start-up of the command lines: what each imports, in an interpreter of its own. Modules are counted, since seconds vary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.helpers import ROOT
from tests.small_hf import small_llama

#: Runs command lines one after the other, and writes the names of all modules that are then imported.
PROBE = """
import importlib, json, sys
for place, *argv in json.loads(sys.argv[1]):
    try:
        importlib.import_module(place).main(argv)
    except SystemExit as end:
        assert not end.code, (argv, end.code)
with open(sys.argv[2], "w") as file:
    json.dump([*sys.modules], file)
"""
OURS, SCRIPT, BACK, OTHER = (
    "megatron_converters.cli.main",
    "megatron_converters.cli.queue_convert",
    "megatron_converters.cli.mlm_to_hf",
    "model_converter_tool.cli.main",
)
VERBS = ("convert", "plan", "verify", "diff", "inspect", "args", "families", "completion", "help")
COMMANDS = ("convert", "batch", "inspect", "check", "history", "config")
#: What takes long to import, and no exact copy between folders here needs.
HEAVY = frozenset(
    """
    torch transformers tokenizers sentencepiece tiktoken safetensors huggingface_hub megatron mindspore yaml tqdm requests
    multiprocessing concurrent asyncio ssl socket http email importlib.metadata importlib.resources unittest pydoc tempfile
    """.split()
)
#: What help does not need either.
NOT_FOR_HELP = frozenset("numpy hashlib pickle zipfile ctypes decimal".split())
#: Modules besides numpy's and the package's own that an interpreter has which reads and writes tensors.
MOST_OTHERS = 175


class Allowed(NamedTuple):
    """Modules of the package that a command may import at most, those of `HEAVY`, and parts of names of needless ones."""

    most: int
    heavy: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


#: Folders of the package that no conversion of a folder needs.
_LOOKING = ("inspection", "comparison", "logits", "live", "bridge", "tensor_parallel", "queue", "meta")
_READING_MINDSPORE = ("mindspore.source", "mindspore.files", "mindspore.target", "mindspore.names")
_FORTH = (
    *_LOOKING,
    *_READING_MINDSPORE,
    "_source",
    "torch_dist_target",
    "flat_target",
    "huggingface.target",
    "mixtures",
)
_BACK = (*_LOOKING, *_READING_MINDSPORE, "megatron.torch_dist_target", "rank_files_target", "flat_target", "meta")
ROWS = {
    "convert": Allowed(152, without=_FORTH),
    "plan": Allowed(152, without=_FORTH),
    "back": Allowed(171, without=_BACK),
    "verify": Allowed(121, ("concurrent",), ("live", "bridge", "logits", "inspection", *_READING_MINDSPORE, "target")),
    "verify output": Allowed(113, ("concurrent",), ("live", "bridge", "logits", "inspection", *_READING_MINDSPORE)),
    "inspect": Allowed(149, without=("live", "bridge", "logits", "comparison", "shard_map", *_READING_MINDSPORE)),
    "diff": Allowed(167, ("concurrent",), ("live", "bridge", "logits", "inspection", *_READING_MINDSPORE)),
}


def run(out: Path, *commands: tuple[Any, ...]) -> set[str]:
    """Run command lines in an interpreter of their own; returns the names of all modules that these have imported."""
    texts = json.dumps([[str(word) for word in command] for command in commands])
    file = out / "modules.json"
    done = subprocess.run([sys.executable, "-c", PROBE, texts, str(file)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(file.read_text()))


def heavy(modules: set[str], names: frozenset[str]) -> set[str]:
    """Which of these modules, or packages, are imported."""
    return {name for name in names if name in modules}


def own(modules: set[str]) -> list[str]:
    return sorted(name for name in modules if name.startswith("megatron_converters"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("start")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return small_llama(folder / "hf")


@pytest.fixture(scope="module")
def converted(folder: Path, model: Path) -> set[str]:
    """Modules of the conversion whose output is in `megatron`."""
    return run(folder, (OURS, "convert", model, folder / "megatron", "--tp", 2, "--pp", 2, "--quiet"))


def test_help_imports_neither_numpy_nor_anything_heavy(tmp_path: Path) -> None:
    commands = [(OURS, "--help"), (OURS, "help"), (OURS, "help", "plan"), *((OURS, verb, "--help") for verb in VERBS)]
    commands += [(SCRIPT, "--help"), (BACK, "--help"), (OTHER, "--help")]
    modules = run(tmp_path, *commands, *((OTHER, command, "--help") for command in COMMANDS))
    # convert.py offers the ways to start a process that multiprocessing has on this system.
    allowed = {"multiprocessing", "socket", "tempfile"}
    assert heavy(modules, HEAVY | NOT_FOR_HELP) - {*allowed, "pickle"} == set()
    assert len(own(modules)) <= 60, own(modules)
    alone = run(tmp_path, (OURS, "--help"))
    assert heavy(alone, HEAVY | NOT_FOR_HELP) == set()
    assert len(own(alone)) <= 25, own(alone)


@pytest.mark.parametrize("name", ROWS)
def test_what_is_imported_is_what_is_used(name: str, folder: Path, model: Path, converted: set[str]) -> None:
    commands: dict[str, tuple[Any, ...]] = {
        "plan": ("plan", model, folder / "planned", "--tp", 2, "--no-measure"),
        "back": ("convert", folder / "megatron", folder / "back", "--quiet"),
        "verify": ("verify", model, model, "--quiet"),
        "verify output": ("verify", folder / "megatron", "--quiet"),
        "inspect": ("inspect", model),
        "diff": ("diff", model, folder / "megatron"),
    }
    modules = converted if name == "convert" else run(folder, (OURS, *commands[name]))
    row = ROWS[name]
    assert heavy(modules, HEAVY) - set(row.heavy) == set()
    found = own(modules)
    needless = [module for module in found for part in row.without if f"{part}." in f"{module}."]
    assert needless == []
    assert len(found) <= row.most, found
    others = [module for module in modules if module not in found and not module.startswith("numpy")]
    assert len(others) <= MOST_OTHERS, sorted(others)


def test_the_scripts_and_the_other_command_import_nothing_heavy(folder: Path, model: Path, converted: set[str]) -> None:
    queue = run(folder, (SCRIPT, "--load-dir", model, "--save-dir", folder / "queue", "--quiet"))
    assert heavy(queue, HEAVY) - {"multiprocessing", "socket", "tempfile"} == set()
    back = run(folder, (BACK, "--load-path", folder / "megatron", "--save-path", folder / "script", "--quiet"))
    assert heavy(back, HEAVY) == set()
    where = ("--workspace", folder / "place", "-o", folder / "other")
    other = run(folder, (OTHER, "convert", model, "hf2megatron", *where))
    assert heavy(other, HEAVY) == set()


def test_numpy_starts_no_threads_and_nothing_inherits_that(tmp_path: Path) -> None:
    code = """
import os, sys
from megatron_converters.cli.numpy_threads import import_numpy
import_numpy()
print(len(os.listdir("/proc/self/task")), os.environ.get("OPENBLAS_NUM_THREADS"))
"""
    unset = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    for given, printed in (({}, "1 None"), ({"OPENBLAS_NUM_THREADS": "2"}, "2 2")):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**unset, **given}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == printed

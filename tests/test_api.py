"""The Python API returns what the commands print, and leaves nothing behind in its process."""

from __future__ import annotations

import gc
import json
import locale
import os
import resource
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import megatron_converters as mc
from megatron_converters.basics.handover import receives_own_types
from tests.helpers import ROOT, hf_tensors, same_tensors, verb

HFModel = Callable[..., Path]


def test_importing_the_package_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, megatron_converters as mc; mc.__all__; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_converting_without_a_cast_needs_no_torch(hf_model: HFModel, tmp_path: Path) -> None:
    code = (
        "import sys, megatron_converters as mc; mc.convert(sys.argv[1], sys.argv[2], tp=2); mc.verify(*sys.argv[1:]);"
        "sys.exit('torch' in sys.modules)"
    )
    arguments = [str(hf_model("llama2")), str(tmp_path / "out")]
    assert subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, timeout=60).returncode == 0


def test_all_names_are_there_and_nothing_else() -> None:
    assert all(getattr(mc, name) for name in mc.__all__)
    assert set(mc.__all__) <= set(dir(mc))
    with pytest.raises(AttributeError, match="has no attribute 'covert'"):
        mc.covert  # type: ignore[attr-defined] # noqa: B018


def test_there_and_back(hf_model: HFModel, tmp_path: Path) -> None:
    source = hf_model("llama3.1")
    there = mc.convert(source, tmp_path / "megatron", tp=2, pp=2)
    assert there.path == tmp_path / "megatron/iter_0000001"
    assert there.manifest.is_file() and json.loads(there.manifest.read_text())["files"].keys()
    assert "--use-checkpoint-args" in there.flags and there.flags[0] == f"--load {tmp_path / 'megatron'}"
    assert any(note.startswith("wrote ") for note in there.notes)
    assert not any("pretrain_gpt.py needs" in note for note in there.notes)
    back = mc.convert(tmp_path / "megatron", tmp_path / "hf")
    assert back.path == tmp_path / "hf" and back.flags == ()
    same_tensors(hf_tensors(source), hf_tensors(back.path))
    assert mc.verify(source, there.path).equal
    assert mc.verify(tmp_path / "megatron").report["intact"]


def test_warnings_are_apart_from_notes(hf_model: HFModel, tmp_path: Path) -> None:
    result = mc.convert(hf_model("opt"), tmp_path / "out", megatron=mc.MegatronOptions(allow_inexpressible=True))
    assert any("Megatron-LM will not compute" in warning for warning in result.warnings)
    assert not any(line.startswith("warning") for line in (*result.notes, *result.warnings))


def test_the_plan_is_the_commands(hf_model: HFModel, tmp_path: Path) -> None:
    source, out = hf_model("mixtral"), tmp_path / "out"
    planned = mc.plan(source, out, tp=2, ep=2, dtype="bf16", megatron=mc.MegatronOptions(ckpt_format="torch_dist"))
    options = ("--tp", 2, "--ep", 2, "--dtype", "bf16", "--ckpt-format", "torch_dist", "--json", "--no-measure")
    said = json.loads(verb("plan", source, out, *options).out)
    assert {**planned.to_json(), "free": 0} == {**said, "free": 0}
    assert not out.exists()
    assert mc.plan(source, out, measured=True).free > 0


def test_looking_is_the_commands(megatron_model: Callable[..., Any]) -> None:
    source, checkpoint = megatron_model("llama3.1")
    assert json.loads(json.dumps(mc.inspect(checkpoint))) == json.loads(verb("inspect", checkpoint, "--json").out)
    flags = mc.training_flags(source)
    assert [word for flag in flags.flags for word in flag.split()] == json.loads(verb("args", source, "--json").out)[
        "flags"
    ]
    assert flags.arguments["num_layers"] == mc.inspect(source)["model"]["num_layers"]
    with pytest.raises(mc.UsageError, match="--untie is for reading a Hugging Face folder"):
        mc.inspect(checkpoint, read=mc.ReadOptions(untie=True))


def test_what_differs_is_named(hf_model: HFModel, tmp_path: Path) -> None:
    one, other = hf_model("llama2"), hf_model("llama2", seed=1)
    found = mc.verify(one, other)
    assert not found and not found.equal and found.report["different"]
    assert any("word_embeddings" in line for line in found.findings)
    difference = mc.diff(one, other)
    assert difference and difference.report["tensors"][0]["relative"] > 0
    assert mc.verify(one, other, tolerance=1e9) and not mc.diff(one, one)


def test_progress_counts_all_bytes(hf_model: HFModel, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    mc.convert(hf_model("llama2"), tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert calls[0][0] == 0 and calls[-1][0] == calls[-1][1] > 0
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_a_caller_can_stop_a_conversion(hf_model: HFModel, tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done:
            raise Enough

    with pytest.raises(Enough):
        mc.convert(hf_model("llama2"), tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_several_processes(hf_model: HFModel, tmp_path: Path) -> None:
    result = mc.convert(hf_model("llama2"), tmp_path / "out", tp=2, workers=2)
    assert mc.verify(hf_model("llama2"), result.path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sizes of a folder": (dict(to="hf", tp=2), "options for writing a Megatron-LM checkpoint are given"),
    "options of a folder": (dict(hf=mc.HFOptions()), "options for writing a Hugging Face folder are given"),
    "an unknown format": (dict(to="gguf"), "to='gguf': the formats that can be written are hf, megatron"),
    "an unknown layout": (dict(megatron=mc.MegatronOptions(ckpt_format="zarr")), "ckpt_format 'zarr' is not one of"),
    "an unknown source format": (dict(read=mc.ReadOptions(format="onnx")), "format 'onnx' is not one of hf, meta"),
    "an unheeded option": (dict(read=mc.ReadOptions(hf_config="x")), "--hf-config is for reading a Megatron-LM"),
    "an unknown dtype": (dict(dtype="int3"), "unknown dtype 'int3'"),
    "sizes that do not fit": (dict(tp=3), "cannot be cut over tp=3"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what: str, hf_model: HFModel, tmp_path: Path) -> None:
    options, message = REFUSED[what]
    for act in (mc.plan, mc.convert):
        with pytest.raises(mc.ConversionError, match=message):
            act(hf_model("llama2"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def _switches() -> dict[str, Any]:
    """What a process has once, and a library must leave as it found it."""
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "blocked signals": signal.pthread_sigmask(signal.SIG_BLOCK, set()),
        "collector": (gc.isenabled(), gc.get_threshold()),
        "open files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "numpy": np.geterr(),
        "locale": locale.setlocale(locale.LC_ALL),
        "warnings": list(warnings.filters),
        "streams": (sys.stdout, sys.stderr, sys.excepthook),
        "path": list(sys.path),
        "queue": receives_own_types(),
    }


def _held(folder: Path) -> dict[str, Any]:
    """Threads, files and mappings of this process, those of the conversions by name."""
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "files": len(os.listdir("/proc/self/fd")),
        "mappings": [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder.parent) in line],
    }


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what a process holds")
def test_a_hundred_conversions_leave_nothing_behind(hf_model: HFModel, tmp_path: Path) -> None:
    source, other = hf_model("llama3.2-tied"), hf_model("mixtral")
    mc.convert(source, tmp_path / "first", dtype="bf16")  # imports torch, which keeps threads of its own
    gc.collect()  # what tests before have left, a mapping perhaps
    switches, held = _switches(), _held(tmp_path)
    for number in range(25):
        out = tmp_path / str(number)
        mc.convert(source, out / "torch", tp=2, pp=1 + number % 2)
        mc.convert(other, out / "dist", ep=2, megatron=mc.MegatronOptions(ckpt_format="torch_dist"))
        mc.convert(out / "torch", out / "hf")
        mc.convert(out / "dist", out / "cast", dtype="bf16")
        mc.plan(source, out / "more", tp=2, measured=number == 0)
        assert (
            mc.verify(source, out / "torch")
            and mc.verify(out / "hf")
            and not mc.diff(other, out / "dist").report["different"]
        )
        with pytest.raises(mc.ConversionError):
            mc.convert(source, out / "torch", tp=4)
    assert _held(tmp_path) == held
    assert _switches() == switches

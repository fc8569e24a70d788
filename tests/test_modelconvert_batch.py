"""`modelconvert batch`: one failure does not stop the rest, whatever it is, and what is left can be done later."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

import megatron_converters.api as mc
from model_converter_tool import batch_config
from model_converter_tool.api import ModelConverterAPI
from tests.helpers import Run, finished, nothing_complete, succeeded
from tests.hub_server import Hub, serving
from tests.modelconvert import begin, process, run

HFModel = Callable[..., Path]
#: File that a Hub on loopback holds back, so that a conversion is under way for as long as a test wants.
HELD = "model.safetensors"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MODELCONVERT_HOME", str(tmp_path / "workspace"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hub(hf_model: HFModel) -> Iterator[Hub]:
    """Hub with the model acme/slow, whose weights do not arrive before they are released."""
    with serving(acme__slow=hf_model("llama2")) as served:
        served.held.add(HELD)
        yield served
        served.released.set()


def write(place: Path, *items: dict[str, Any], key: str = "models") -> Path:
    path = place / "batch.yaml"
    path.write_text(yaml.safe_dump({key: list(items)}))
    return path


def item(model: object, output: str, **more: Any) -> dict[str, Any]:
    return {"model_path": str(model), "output_path": output, "output_format": "hf2megatron", **more}


def history(place: Path) -> list[dict[str, Any]]:
    return ModelConverterAPI(place / "workspace").get_history()


def workers_of(running: Any) -> list[psutil.Process]:
    """Workers of a batch; the process that keeps track of multiprocessing's resources is none."""
    children = psutil.Process(running.pid).children(recursive=True)
    return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]


def gone(processes: list[psutil.Process], seconds: float) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


def test_one_failure_does_not_stop_the_rest(hf_model: HFModel, place: Path) -> None:
    damaged = shutil.copytree(hf_model("llama2"), place / "damaged")
    (damaged / "model.safetensors").write_bytes(b"no safetensors")
    config = write(
        place,
        item(damaged, "out/damaged"),
        item(hf_model("llama2"), "out/ranks", tp=2, pp=2, dtype="bf16"),
        item(hf_model("mistral"), "out/mistral", model_type="llama"),
        {"model_name": str(hf_model("qwen2")), "output_format": "hf"},
    )
    done = process("batch", config, "--max-workers", 2, "--max-retries", 2, cwd=place)
    assert done.code == 1 and "Traceback" not in done.err, done
    lines = done.out.splitlines()
    assert sum(line.startswith("[1/4] failed, to be tried again: ") for line in lines) == 2
    assert sum(line.startswith("[1/4] failed: ") and "model.safetensors" in line for line in lines) == 1
    assert {line[:12] for line in lines if "done: " in line} == {"[2/4] done: ", "[3/4] done: ", "[4/4] done: "}
    table = lines[lines.index("") + 1 :]
    assert table[0].split() == ["model", "format", "output", "result", "attempts", "time"]
    assert [row.split()[3:5] for row in table[1:5]] == [["FAILED", "3"], ["done", "1"], ["done", "1"], ["done", "1"]]
    assert lines[-1] == "3 of 4 done, 1 failed"
    assert (place / "out/ranks/iter_0000001/mp_rank_01_001").is_dir() and not (place / "out/damaged").exists()
    assert mc.verify(hf_model("mistral"), place / "out/mistral") and mc.verify(
        "outputs/qwen2_huggingface", hf_model("qwen2")
    )
    assert sorted(entry["success"] for entry in history(place)) == [False, False, False, True, True, True]


def test_the_same_batch_again(hf_model: HFModel, place: Path) -> None:
    config = place / "batch.json"
    config.write_text(json.dumps({"tasks": [item(hf_model("llama2"), "out/a"), item(hf_model("qwen2"), "out/b")]}))
    for _ in range(2):
        assert process("batch", config, cwd=place).out.endswith("2 of 2 done, 0 failed\n")


BAD: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown key": (
        "models: [{model_path: a, output_format: hf, out: b}]",
        ("models 1: there is no option out; known are",),
    ),
    "no format": ("models: [{model_path: a}]", ("models 1: output_format is missing",)),
    "no model": ("tasks: [{output_format: hf}]", ("tasks 1: model_path is missing",)),
    "same outputs": (
        "models: [{model_path: ./x/a, output_format: hf}, {model_path: ./y/a, output_format: huggingface}]",
        ("./x/a and ./y/a have the same output ./outputs/a_huggingface",),
    ),
    "wrong values": (
        "models: [{model_path: a, output_format: gguf}, {model_path: a, output_format: hf2megatron, tp: two}, x]",
        ("models 1: the format gguf", "models 2: tp: 'two' is no whole number", "models 3: 'x' is no mapping"),
    ),
    "two models": ("models: [{model_path: a, model_name: b, output_format: hf}]", ("model_path is a, and model_name",)),
    "no list": ("models: {a: b}", ("models is no list of conversions",)),
    "nothing": ("models: []", ("models is no list",)),
    "another key": ("model: []", ("has model at the top; it needs one key, models or tasks",)),
    "two keys": ("models: []\ntasks: []", ("has models, tasks at the top",)),
    "no YAML": ("models: [", ("batch.yaml, line",)),
    "no type": (
        "models: [{model_path: a, output_format: hf, model_type: bert}]",
        ("models 1: Model type not supported",),
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files(what: str, place: Path) -> None:
    text, words = BAD[what]
    (place / "batch.yaml").write_text(text)
    refused(run("batch", "batch.yaml"), *words)
    assert not (place / "outputs").exists()


def refused(done: Run, *words: str, code: int = 2) -> None:
    assert done.code == code and "Traceback" not in done.err, done
    assert all(word in done.err for word in words), (words, done.err)


def test_a_file_that_is_not_there(place: Path) -> None:
    refused(run("batch", "absent.yaml"), "absent.yaml is missing")


def test_the_disk_is_looked_at_first(hf_model: HFModel, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = ModelConverterAPI.plan

    def nearly_full(api: ModelConverterAPI, task: Any) -> dict[str, Any]:
        planned = plan(api, task)
        return {**planned, "bytes_free": planned["bytes_left"] + 1}  # room for one, not for two

    monkeypatch.setattr(ModelConverterAPI, "plan", nearly_full)
    config = write(place, item(hf_model("llama2"), "a"), item(hf_model("llama2"), "b"))
    refused(run("batch", config), "the outputs need ", "--skip-disk-check", code=1)
    api = ModelConverterAPI()
    tasks = batch_config.read_tasks(write(place, item(hf_model("llama2"), "a"), item("acme/absent", "b")), ".")
    (note,) = batch_config.check_disks(api, tasks)
    assert "leaves out acme/absent" in note


def test_settings_are_defaults(hf_model: HFModel, place: Path) -> None:
    run("config", "set", "preset", "parallel")
    config = write(place, item("./absent", "a"))
    assert process("batch", config, cwd=place).out.count("[1/1] failed") == 3
    assert process("batch", config, "--max-retries", 0, cwd=place).out.count("[1/1] failed") == 1


def test_a_killed_worker_fails_its_own_task_alone(hf_model: HFModel, hub: Hub, place: Path) -> None:
    config = write(place, item("acme/slow", "slow"), item(hf_model("llama2"), "a"), item(hf_model("qwen2"), "b"))
    running = begin("batch", config, "--max-retries", 0, cwd=place, env=hub.environment(place / "hf_home"))
    assert hub.reached.wait(60)
    (worker,) = workers_of(running)
    worker.kill()
    done = finished(running)
    assert done.code == 1 and "Traceback" not in done.err, done
    assert "[1/3] failed: acme/slow: its worker process was ended by signal 9; was it short of memory?" in done.out
    assert done.out.endswith("2 of 3 done, 1 failed\n")
    assert [entry["success"] for entry in history(place)] == [False, True, True]
    nothing_complete(place / "outputs")


def test_a_killed_worker_is_replaced(hub: Hub, hf_model: HFModel, place: Path) -> None:
    config = write(place, item("acme/slow", "slow"))
    running = begin("batch", config, "--max-retries", 1, cwd=place, env=hub.environment(place / "hf_home"))
    assert hub.reached.wait(60)
    (worker,) = workers_of(running)
    worker.kill()
    hub.held.clear()
    hub.released.set()
    done = succeeded(finished(running))
    assert "[1/1] failed, to be tried again: " in done.out and done.out.endswith("1 of 1 done, 0 failed\n")
    assert mc.verify(hf_model("llama2"), place / "slow")


def test_ctrl_c_ends_all_workers(hf_model: HFModel, hub: Hub, place: Path) -> None:
    config = write(place, item(hf_model("llama2"), "a"), item("acme/slow", "slow"), item(hf_model("qwen2"), "b"))
    environment = hub.environment(place / "hf_home")
    running = begin("batch", config, "--max-workers", 2, cwd=place, env=environment)
    assert hub.reached.wait(60)
    workers = workers_of(running)
    start = time.monotonic()
    os.killpg(running.pid, signal.SIGINT)
    done = finished(running)
    assert done.code == 130 and "Traceback" not in done.err and "interrupted before the end" in done.err, done
    assert gone(workers, 3 - (time.monotonic() - start)) and time.monotonic() - start < 3


def test_after_a_kill_the_same_batch_does_what_is_left(hf_model: HFModel, hub: Hub, place: Path) -> None:
    config = write(place, item(hf_model("llama2"), "a"), item("acme/slow", "slow"), item(hf_model("qwen2"), "b"))
    environment = hub.environment(place / "hf_home")
    running = begin("batch", config, cwd=place, env=environment)
    assert hub.reached.wait(60)  # one worker: the first is done, the third not begun
    workers = workers_of(running)
    running.kill()
    finished(running)
    assert workers and gone(workers, 5)
    before = (place / "a/model.pt").stat()
    assert not (place / "b").exists()
    hub.held.clear()
    hub.released.set()
    again = succeeded(process("batch", config, cwd=place, env=environment))
    assert again.out.endswith("3 of 3 done, 0 failed\n")
    after = (place / "a/model.pt").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    for family, output in (("llama2", "a"), ("llama2", "slow"), ("qwen2", "b")):
        assert mc.verify(hf_model(family), place / output)

"""A run that is killed, or runs out of disk, never looks complete; the same command finishes it, and the result is the same."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_converters.basics.errors import ConversionError, Interrupted
from megatron_converters.cli import main
from megatron_converters.conversion import run as conversion
from megatron_converters.conversion.composing import Sources
from megatron_converters.conversion.crew import Alone, Report
from megatron_converters.conversion.journal import Journal
from megatron_converters.conversion.progress import Silent
from megatron_converters.conversion.staging import Staging
from megatron_converters.formats.huggingface.source import HFSource
from megatron_converters.formats.megatron.rank_files_target import MegatronTarget
from megatron_converters.formats.megatron.writing import MegatronOptions
from megatron_converters.model.slots import SLOTS, Ref
from tests.forked import forked
from tests.helpers import (
    ROOT,
    TRACKER,
    Run,
    args_of,
    convert,
    edit_rank,
    file_bytes,
    finished,
    refused,
    small_disk,
    start_verb,
    succeeded,
    verb,
)

HFModel = Callable[..., Path]
#: Source, what an undisturbed run makes of it, and the options.
Job = tuple[Path, Path, tuple[str, ...]]
SMALL = {"num_hidden_layers": 8}
#: Ends the process at the n-th of the calls that change the disk, or counts them.
KILLER = """
import os, signal, sys
limit = int(os.environ["KILL_AT"])
calls = 0
def counted(real):
    def call(*args, **more):
        global calls
        calls += 1
        if calls == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("CALLS"):
            open(os.environ["CALLS"], "w").write(str(calls))
        return real(*args, **more)
    return call
for name in ("pwrite", "fsync", "replace", "unlink", "mkdir", "ftruncate"):
    setattr(os, name, counted(getattr(os, name)))
"""
#: A disk that gets full. On one core files are filled one after the other, so that some are finished by then.
FULL = """
import errno, os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
left = int(os.environ["BYTES_LEFT"])
real = os.pwrite
def pwrite(fd, data, offset):
    global left
    left -= len(data)
    if left < 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return real(fd, data, offset)
os.pwrite = pwrite
"""
SLOW = """
import os, time
real = os.{call}
def slow(*args):
    time.sleep({seconds})
    return real(*args)
os.{call} = slow
"""
DIRECTIONS = {
    "HF to Megatron": ("--tp", "2", "--pp", "4"),
    "Megatron to HF": ("--max-shard-size", "100KB"),
    "HF to torch_dist": ("--tp", "2", "--pp", "4", "--ckpt-format", "torch_dist"),
}


#: How the files end that a manifest lists.
WRITTEN = (".pt", ".safetensors", ".distcp", ".metadata")


def not_a_model(folder: Path) -> None:
    """No reader finds a model: a tracker and a configuration come last."""
    assert not (folder / TRACKER).exists() and not (folder / "config.json").exists()


def site(folder: Path, code: str, **env: Any) -> dict[str, str]:
    """An environment in which Python runs `code` first."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder), **{name: str(value) for name, value in env.items()}}


@pytest.fixture(scope="module", params=DIRECTIONS)
def job(request: pytest.FixtureRequest, hf_model: HFModel, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Source, the result of an undisturbed run, and its options. Results name their folder, so runs use one path."""
    root = tmp_path_factory.mktemp("resume")
    source = hf_model("llama2", **SMALL)
    if request.param == "Megatron to HF":
        succeeded(verb("convert", source, root / "megatron", "--tp", "2", "--pp", "2", "--quiet"))
        source = root / "megatron"
    options = DIRECTIONS[request.param]
    succeeded(verb("convert", source, root / "out", *options))
    (root / "out").rename(root / "whole")
    return source, root / "whole", options


@pytest.fixture(autouse=True)
def _clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a failed test left must not fail the next."""
    yield
    if "job" in request.fixturenames:
        shutil.rmtree(request.getfixturevalue("job")[1].parent / "out", ignore_errors=True)


def attempt(job: Job, **more: Any) -> tuple[Path, Run]:
    source, whole, options = job
    return whole.parent / "out", verb("convert", source, whole.parent / "out", *options, **more)


def attempt_with(job: Job, code: str, **env: Any) -> tuple[Path, Run]:
    """An attempt in a process that runs `code` first."""
    source, whole, options = job
    command = ("convert", source, whole.parent / "out", *options)

    def call() -> None:
        exec(compile(code, "code", "exec"), {})
        main.main([str(part) for part in command])

    return whole.parent / "out", forked(call, env={name: str(value) for name, value in env.items()})


@pytest.mark.xdist_group("resume")
def test_kills_at_random_moments(job: Job, tmp_path: Path) -> None:
    _, whole, _ = job
    out, run = attempt_with(job, KILLER, KILL_AT=0, CALLS=tmp_path / "calls")
    succeeded(run)
    assert file_bytes(out) == file_bytes(whole)
    shutil.rmtree(out)
    total = int((tmp_path / "calls").read_text())
    assert total > 50
    moments = random.Random(7).sample(range(1, total), 12)
    kept = 0
    for moment in moments:
        out, run = attempt_with(job, KILLER, KILL_AT=moment)
        assert run.code == -signal.SIGKILL
        seen = {name: data for name, data in file_bytes(out).items() if not name.startswith(".")}
        assert seen == file_bytes(whole) or (
            TRACKER not in seen and "config.json" not in seen
        )  # shown, if killed at the very end
        before = {path: path.stat().st_ino for path in out.rglob("*.pt")}
        out, run = attempt(job)
        succeeded(run)
        kept += len({path.stat().st_ino for path in out.rglob("*.pt")} & set(before.values()))
        assert file_bytes(out) == file_bytes(whole), f"killed at call {moment} of {total}"
        assert not list(out.glob(".*"))
        shutil.rmtree(out)


KILLED_BEFORE = """
import os, signal
real = os.replace
def replace(source, target, **more):
    if os.path.basename(target) == os.environ["LAST"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(source, target, **more)
os.replace = replace
"""


@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize("last", ["model.safetensors.index.json", "config.json", "conversion.json"])
def test_a_kill_while_the_files_of_a_folder_are_shown(hf_model: HFModel, last: str, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ("--to", "hf", "--max-shard-size", "200KB")
    command = ("convert", hf_model("llama2"), out, *options)
    run = verb(*command, env=site(tmp_path / "site", KILLED_BEFORE, LAST=last))
    assert run.code == -signal.SIGKILL
    assert not (out / "config.json").exists()
    succeeded(verb(*command))
    succeeded(verb("convert", hf_model("llama2"), tmp_path / "whole", *options))
    assert file_bytes(out) == file_bytes(tmp_path / "whole")


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.parametrize("action", ["discard", "empty"])
def test_a_kill_while_the_hidden_folder_is_removed_leaves_no_half_truth(
    action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a journal would have the next run, with --overwrite, put half a checkpoint in the place of a whole one."""
    for moment in itertools.count(1):
        staging, journal = _finished_staging(tmp_path / str(moment))
        calls = itertools.count(1)
        with monkeypatch.context() as patch:
            for name in ("unlink", "rmdir", "replace"):
                patch.setattr(os, name, _killed_at(getattr(os, name), calls, moment))
            try:
                getattr(staging, action)()
            except Killed:
                assert journal.run() is None or (journal.complete and len(journal.finished()) == 3)
                continue
        assert moment > 5
        return


def _killed_at(real: Callable[..., Any], calls: Iterator[int], moment: int) -> Callable[..., Any]:
    def call(*args: Any, **more: Any) -> Any:
        if next(calls) == moment:
            raise Killed
        return real(*args, **more)

    return call


def _finished_staging(folder: Path) -> tuple[Staging, Journal]:
    staging = Staging(folder, "model")
    staging.open()
    staging.empty()
    journal = Journal(staging.state)
    journal.begin({"tool": "this"})
    for name in "abc":
        (staging.files / name).write_text(name)
        journal.finish(name, 1, "", {})
    journal.mark_complete()
    journal.mark_cleared()
    return staging, journal


def test_an_interrupt_after_the_result_is_shown_says_that_it_is_complete(
    hf_model: HFModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Staging) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "discard", interrupted)
    target = MegatronTarget(tmp_path, MegatronOptions(tp=2))
    with pytest.raises(Interrupted) as caught:
        conversion.convert(HFSource(hf_model("llama2")), target, None, Silent())
    assert caught.value.hint == "; the output is complete all the same"
    assert (tmp_path / TRACKER).exists()


@pytest.mark.xdist_group("resume")
def test_an_output_that_lacks_a_small_file_is_not_complete_already(hf_model: HFModel, tmp_path: Path) -> None:
    options = ("convert", hf_model("llama2"), tmp_path / "out", "--to", "hf")
    succeeded(verb(*options))
    assert "complete already" in succeeded(verb(*options)).out
    (tmp_path / "out" / "generation_config.json").unlink()
    refused(verb(*options), "already holds a model", "--overwrite")


@pytest.mark.xdist_group("resume")
def test_a_full_disk_keeps_what_is_finished(job: Job, tmp_path: Path) -> None:
    source, whole, options = job
    size = sum(len(data) for name, data in file_bytes(whole).items() if name.endswith(WRITTEN))
    out, run = attempt(job, env=site(tmp_path / "site", FULL, BYTES_LEFT=size * 3 // 4))
    refused(run, os.strerror(28), "files are finished and kept, run the same command again to go on")
    not_a_model(out)
    files = [path for path in (out).rglob("files/**/*") if path.name.endswith(WRITTEN)]
    inodes = {path.stat().st_ino for path in files}
    assert files
    other = (*options, "--dtype", "bf16")
    refused(
        verb("convert", source, out, *other),
        "finished file(s) of another run",
        "options dtype: float32, not bfloat16",
        "--restart",
    )
    out, run = attempt(job)
    assert f"went on from an interrupted run, with {len(files)} of " in succeeded(run).out
    assert file_bytes(out) == file_bytes(whole)
    assert inodes <= {path.stat().st_ino for path in out.rglob("*")}
    shutil.rmtree(out)


BALLAST = """
import os
real, left = os.pwrite, int(os.environ["BALLAST_AFTER"])
def pwrite(fd, data, offset):
    global left
    left -= 1
    if left == 0:
        with open(os.environ["BALLAST"], "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass  # the disk is full
    return real(fd, data, offset)
os.pwrite = pwrite
"""


@pytest.mark.xdist_group("resume")
def test_a_disk_that_others_fill(hf_model: HFModel, tmp_path: Path) -> None:
    """A real file system without room, as the system reports it."""
    source = hf_model("llama2", **SMALL)
    disk = small_disk(tmp_path, 16)
    if disk is None:
        pytest.skip("no file system can be mounted here")
    try:
        options = ("convert", source, disk / "out", "--tp", "2", "--pp", "4", "--quiet")
        env = site(tmp_path / "site", BALLAST, BALLAST=disk / "ballast", BALLAST_AFTER=60)
        refused(verb(*options, env=env), "No space left on device")
        not_a_model(disk / "out")
        (disk / "ballast").unlink()
        succeeded(verb(*options))
        succeeded(verb("convert", source, tmp_path / "out", *options[3:]))
        ours, theirs = (file_bytes(folder) for folder in (disk / "out", tmp_path / "out"))
        assert {name: data for name, data in ours.items() if name.endswith(".pt")} == {
            name: data for name, data in theirs.items() if name.endswith(".pt")
        }
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.xdist_group("resume")
def test_a_changed_source_is_refused_with_the_difference(hf_model: HFModel, tmp_path: Path) -> None:
    source = shutil.copytree(hf_model("llama2", **SMALL), tmp_path / "hf")
    options = ("convert", source, tmp_path / "out", "--tp", "2", "--pp", "4")
    size = (source / "model.safetensors").stat().st_size
    env = site(tmp_path / "site", FULL, BYTES_LEFT=size * 3 // 4)
    refused(verb(*options, env=env), "are finished and kept")
    os.utime(source / "model.safetensors", (1, 1))
    refused(verb(*options), "source files model.safetensors", "--restart")
    succeeded(verb(*options, "--restart", "--quiet"))
    succeeded(verb("convert", source, tmp_path / "again", "--tp", "2", "--pp", "4", "--quiet"))
    names = [name for name in file_bytes(tmp_path / "again") if name.endswith(".pt")]
    assert [file_bytes(tmp_path / "out")[name] for name in names] == [
        file_bytes(tmp_path / "again")[name] for name in names
    ]


@pytest.mark.xdist_group("resume")
def test_the_queue_goes_on_too(hf_model: HFModel, tmp_path: Path) -> None:
    source = hf_model("llama2", **SMALL)
    options = ("--load-dir", source, "--save-dir", tmp_path / "out")
    sizes = ("--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 4)
    size = (source / "model.safetensors").stat().st_size
    run = convert(*options, *sizes, env=site(tmp_path / "site", FULL, BYTES_LEFT=size * 3 // 4))
    refused(run, "files are finished and kept")
    inodes = {path.stat().st_ino for path in tmp_path.rglob("files/*/*.pt")}
    assert inodes
    succeeded(convert(*options, *sizes))
    assert "is complete already; nothing to do" in succeeded(convert(*options, *sizes)).out
    assert inodes <= {path.stat().st_ino for path in (tmp_path / "out").rglob("*.pt")}


@pytest.mark.xdist_group("resume")
def test_an_error_of_the_source_keeps_nothing(hf_model: HFModel, tmp_path: Path) -> None:
    """Repeating the command would not help."""
    source = shutil.copytree(hf_model("llama3.2-tied", **SMALL), tmp_path / "hf")
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    refused(verb("convert", source, tmp_path / "out", "--tp", "2", "--pp", "4"), "lm_head.weight")
    assert not list((tmp_path / "out").iterdir())


# --- several processes


@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize("workers", [2, 5])
def test_workers_write_what_one_process_writes(job: Job, workers: int) -> None:
    source, whole, options = job
    out = whole.parent / "out"
    succeeded(verb("convert", source, out, *options, "--workers", workers))
    assert file_bytes(out) == file_bytes(whole)
    shutil.rmtree(out)


def _slow_workers(job: Job, tmp_path: Path) -> tuple[Any, list[int]]:
    """A run of three slow processes that has begun to write, and the two workers of the first."""
    source, whole, options = job
    out = whole.parent / "out"
    slow = SLOW.format(call="pwrite", seconds=0.1)
    process = start_verb("convert", source, out, *options, "--workers", 3, env=site(tmp_path / "site", slow))
    deadline = time.monotonic() + 60
    while not list(out.rglob("files/**/*.*")) or len(workers := _children(process.pid)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process, workers


@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize("job", ["Megatron to HF"], indirect=True)
def test_a_lost_worker_fails_the_run_and_the_next_goes_on(job: Job, tmp_path: Path) -> None:
    _, whole, _ = job
    out = whole.parent / "out"
    process, workers = _slow_workers(job, tmp_path)
    os.kill(workers[-1], signal.SIGKILL)
    run = finished(process)
    refused(run, "worker", "signal 9")
    not_a_model(out)
    _, run = attempt(job)
    succeeded(run)
    assert file_bytes(out) == file_bytes(whole)
    shutil.rmtree(out)


def _children(pid: int) -> list[int]:
    """The workers of a process, those that multiprocessing started for conversions."""
    listed = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    rows = [row.split(None, 1) for row in listed.stdout.splitlines()]
    return [int(number) for number, command in rows if "spawn_main" in command]


#: Holds workers at their very beginning, and says that they have begun.
HELD = """
import os, sys, time
if "--multiprocessing-fork" in sys.orig_argv:
    open(os.path.join(os.environ["BEGUN"], str(os.getpid())), "w").close()
    while not os.path.exists(os.path.join(os.environ["BEGUN"], "go")):
        time.sleep(0.01)
"""


@pytest.mark.xdist_group("resume")
def test_an_interrupt_while_workers_start_is_two_lines(hf_model: HFModel, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    env = site(tmp_path / "site", HELD, BEGUN=begun)
    process = start_verb("convert", hf_model("llama2"), tmp_path / "out", "--workers", 3, env=env)
    _wait_for(lambda: len(list(begun.iterdir())) == 2)
    os.killpg(process.pid, signal.SIGINT)
    (begun / "go").touch()
    run = finished(process)
    assert run.code == 130
    first, last = run.err.splitlines()
    assert first.startswith("megatron-converters: interrupted; stopping")
    assert last == "megatron-converters: error: interrupted before the end"


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize("job", ["HF to torch_dist", "Megatron to HF"], indirect=True)
def test_srun_writes_what_one_process_writes(job: Job) -> None:
    """The variables that srun sets, without Slurm. The other direction, and torchrun, are in `test_scripts`."""
    source, whole, options = job
    out = whole.parent / "out"
    env = {"SLURM_STEP_NUM_TASKS": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": str(_port())}
    tasks = [
        start_verb("convert", source, out, *options, "--quiet", env={**env, "SLURM_PROCID": str(rank)})
        for rank in range(3)
    ]
    for task in tasks:
        succeeded(finished(task, 120))
    assert file_bytes(out) == file_bytes(whole)
    shutil.rmtree(out)


@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize("job", ["HF to Megatron"], indirect=True)
def test_processes_with_different_commands_are_refused(job: Job) -> None:
    """Before anything that depends on the direction."""
    source, whole, options = job
    out = whole.parent / "out"
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(_port())}
    more: tuple[tuple[str, ...], ...] = ((), ("--dtype", "bf16"))
    tasks = [
        start_verb("convert", source, out, *options, *more[rank], env={**env, "RANK": str(rank)}) for rank in range(2)
    ]
    for task in tasks:
        refused(finished(task, 120), "sees another conversion than process 0")
    assert not out.exists()


@pytest.mark.parametrize("job", ["HF to Megatron"], indirect=True)
def test_processes_without_a_meeting_place_are_told_so(job: Job) -> None:
    """Before anything that depends on the direction."""
    source, whole, options = job
    out = whole.parent / "nowhere"
    run = verb("convert", source, out, *options, env={"RANK": "1", "WORLD_SIZE": "2"})
    refused(run, "process 1 of 2", "MASTER_ADDR and MASTER_PORT", code=2)
    run = verb("convert", source, out, *options, "--workers", 2, env={"RANK": "x", "WORLD_SIZE": "2"})
    refused(run, "must be numbers", code=2)
    run = verb(
        "convert", source, out, *options, env={"RANK": "3", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    )
    refused(run, "RANK=3 must be below WORLD_SIZE=2", code=2)


def test_a_file_system_without_locks_will_do(job: Job, tmp_path: Path) -> None:
    source, _, options = job
    code = "import errno, fcntl\ndef flock(*_):\n    raise OSError(errno.ENOSYS, 'no locks')\nfcntl.flock = flock\n"
    succeeded(verb("convert", source, tmp_path / "out", *options, "--quiet", env=site(tmp_path / "site", code)))
    assert not list((tmp_path / "out").glob(".*"))


def _port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
    return port


def test_the_manifest_says_where_everything_came_from(job: Job) -> None:
    _, whole, _ = job
    manifest = json.loads(next(whole.rglob("conversion.json")).read_text())
    tensors = [tensor for file in manifest["files"].values() for tensor in file["tensors"].values()]
    assert all(tensor["holds"] and tensor["from"] and len(tensor["crc32"]) == 8 for tensor in tensors)
    files = {path.name for path in whole.rglob("*") if path.name.endswith(WRITTEN)}
    assert {Path(file).name for file in manifest["files"]} == files


class OtherFolder(Alone):
    """A crew whose first process has opened a folder that this one, the second, does not see."""

    rank, size = 1, 2

    def __init__(self) -> None:
        self._leader: list[Any] = [False, ([], "mark"), None]

    def exchange(self, report: Report) -> list[Report]:
        return [report if report.value is not None else Report(self._leader.pop(0)), report]


def test_a_folder_that_is_not_shared_is_named(
    hf_model: HFModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "_PATIENCE", 0.0)
    target = MegatronTarget(tmp_path / "out", MegatronOptions(tp=2))
    with pytest.raises(ConversionError, match=r"process 1 does not see .*all must share that folder"):
        conversion.convert(HFSource(hf_model("llama2")), target, None, Silent(), crew=OtherFolder())
    assert not (tmp_path / "out").exists()


# --- what is the same run, and what is another


def _stopped(source: Path, out: Path, tmp_path: Path, *options: Any, **more: Any) -> None:
    """Leave a run with some of its files finished."""
    size = sum(path.stat().st_size for path in source.rglob("*") if path.name.endswith(WRITTEN))
    env = site(tmp_path / "site", FULL, BYTES_LEFT=size * 3 // 4)
    refused(verb("convert", more.get("named", source), out, *options, env=env), "are finished and kept")


@pytest.mark.xdist_group("resume")
def test_options_that_mean_the_same_go_on(hf_model: HFModel, tmp_path: Path) -> None:
    source = shutil.copytree(hf_model("llama2", **SMALL), tmp_path / "hf")
    (source / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}))
    near = os.path.relpath(source, ROOT)
    _stopped(source, tmp_path / "out", tmp_path, "--tp", "2", "--pp", "4", named=near)
    same = ("--pp", "4", "--ep", "1", "--etp", "2", "--make-vocab-size-divisible-by", "128", "--to", "megatron")
    run = verb("convert", f"{source}/", f"{tmp_path}/./out/", *same, "--tp", "2", "--dtype", "fp32", cwd=ROOT)
    succeeded(run)
    assert args_of(tmp_path / "out", rank="mp_rank_00_000").tokenizer_model == str(source)
    flags = (tmp_path / "out" / "iter_0000001" / "pretrain_gpt_flags.txt").read_text()
    assert flags.startswith(f"--load {tmp_path / 'out'} ")


@pytest.mark.xdist_group("resume")
def test_a_changed_setting_of_the_source_is_named(hf_model: HFModel, tmp_path: Path) -> None:
    source = shutil.copytree(hf_model("llama2", **SMALL), tmp_path / "hf")
    options = ("--tp", "2", "--pp", "4")
    _stopped(source, tmp_path / "out", tmp_path, *options)
    generation = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps({**generation, "use_cache": "never"}))
    run = refused(verb("convert", source, tmp_path / "out", *options), "args hf_generation_config use_cache", "never")
    assert "structure" not in run.err


@pytest.mark.xdist_group("resume")
def test_another_reference_is_another_run(hf_model: HFModel, tmp_path: Path) -> None:
    """Of an output whose tensors are the same to the bit."""
    meg, out = tmp_path / "meg", tmp_path / "out"
    succeeded(verb("convert", hf_model("llama2"), meg, "--tp", "2", "--quiet"))
    references = [shutil.copytree(hf_model("llama2"), tmp_path / name) for name in ("one", "other")]
    config = json.loads((references[1] / "config.json").read_text())
    (references[1] / "config.json").write_text(json.dumps({**config, "bos_token_id": 3}))
    succeeded(verb("convert", meg, out, "--hf-config", references[0]))
    assert "complete already" in succeeded(verb("convert", meg, out, "--hf-config", references[0])).out
    refused(verb("convert", meg, out, "--hf-config", references[1]), "already holds a model")


@pytest.mark.xdist_group("resume")
def test_a_setting_that_is_no_number_is_the_same_each_time(hf_model: HFModel, tmp_path: Path) -> None:
    """NaN equals nothing, and a set has another order in each process."""
    meg, out = tmp_path / "meg", tmp_path / "out"
    succeeded(verb("convert", hf_model("llama2"), meg, "--tp", "2", "--quiet"))
    for rank in ("mp_rank_00", "mp_rank_01"):
        args = args_of(meg, rank=rank)
        args.loss_scale, args.recompute_modules = float("nan"), {"core_attn", "mlp", "norm"}
        edit_rank(meg, rank, args=args)
    succeeded(verb("convert", meg, out, "--workers", "2"))
    assert "complete already" in succeeded(verb("convert", meg, out)).out


def _overwritten(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(path, (1, 1))  # clocks of file systems may be coarse


def _replaced(path: Path) -> None:
    shutil.copyfile(path, path.with_name("new"))
    path.with_name("new").replace(path)


CHANGES: dict[str, Callable[[Path], None]] = {"in place": _overwritten, "by another": _replaced, "gone": Path.unlink}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_source_that_changes_while_it_is_read(
    hf_model: HFModel, tmp_path: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written then may be of two models."""
    source = shutil.copytree(hf_model("llama2"), tmp_path / "hf")
    made = HFSource(source)
    real = HFSource.read

    def read(self: HFSource, ref: Ref) -> Sources:
        if ref == Ref(SLOTS["final_norm"]):
            change(source / "model.safetensors")
        return real(self, ref)

    monkeypatch.setattr(HFSource, "read", read)
    monkeypatch.setattr(HFSource, "close", lambda _: None)
    with pytest.raises(ConversionError, match=r"model\.safetensors"):
        conversion.convert(made, MegatronTarget(tmp_path / "out", MegatronOptions(tp=2)), None, Silent())
    assert not list((tmp_path / "out").iterdir())

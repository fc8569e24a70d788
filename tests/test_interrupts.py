"""Ctrl-C and lost processes: a line at once, every process gone within three seconds, and the next run goes on."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_converters.basics.errors import Stopped
from megatron_converters.cli import interrupts
from megatron_converters.conversion.copying import Executor
from megatron_converters.storage import flushing
from tests.helpers import CONVERT, ROOT, convert, file_bytes, succeeded, verb, wait_for
from tests.test_resume import not_a_model, site

HFModel = Callable[..., Path]
SIZES = ("--tp", "2", "--pp", "4")
SCRIPT_SIZES = ("--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "4")
#: Seconds in which every process must be gone, in which the first line must be there, and in which a second Ctrl-C must act.
GONE, AT_ONCE = 3.0, 1.0
#: Processes that stop at a stage and stay there, as on a disk that does not answer: in a call that no signal ends where `STUCK` is
#: set. They leave their numbers. They copy until a file is finished. Where `FULL` is set, the disk is then full for workers.
HELD = """
import errno, glob, multiprocessing, os, sys, time
stage, folder = os.environ["STAGE"], os.environ["BEGUN"]
def hold():
    open(os.path.join(folder, str(os.getpid())), "w").close()
    if os.environ.get("STUCK"):
        import ctypes
        lock = ctypes.create_string_buffer(64)
        while True:
            ctypes.CDLL(None).pthread_mutex_lock(lock)
    time.sleep(60)
def held(real, first):
    def call(*args, **more):
        if not first:
            hold()
        result = real(*args, **more)
        if first:
            hold()
        return result
    return call
if "resource_tracker" in str(sys.orig_argv):
    stage = ""
if stage == "planning":
    from megatron_converters.conversion import run
    run.check_target = held(run.check_target, False)
if stage == "committing":
    from megatron_converters.conversion.staging import Staging
    Staging.move_to = held(Staging.move_to, True)
if stage == "copying":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # so that files are filled one after the other
    from megatron_converters.conversion import copying
    copying._SMALL_BYTES = -1  # by a lane: the thread that plans must see what happens to others
    real = os.pwrite
    def pwrite(*args):
        time.sleep(0.002)
        if glob.glob(os.environ["OUT"] + "/.*.incomplete/state/finished/*.json"):
            if os.environ.get("FULL") and multiprocessing.parent_process() is not None:
                while not os.listdir(folder):
                    time.sleep(0.01)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            hold()
        return real(*args)
    os.pwrite = pwrite
"""


class Held:
    """A run that is held at a stage, in a process group of its own."""

    def __init__(self, folder: Path, stage: str, command: tuple[Any, ...], out: Path, **env: str) -> None:
        (folder / "begun").mkdir(parents=True)
        self._begun, self._err = folder / "begun", folder / "err"
        held = site(folder / "site", HELD, STAGE=stage, BEGUN=self._begun, OUT=out, **env)
        held["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
        with open(self._err, "w") as err:
            self._process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=ROOT,
                env={**os.environ, **held},
                stdout=subprocess.DEVNULL,
                stderr=err,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        self.pid = self._process.pid

    @property
    def err(self) -> str:
        return self._err.read_text()

    def held(self, count: int) -> list[int]:
        """Wait until so many processes have got to the stage; returns their numbers, the first one's first."""
        wait_for(lambda: len(list(self._begun.iterdir())) >= count or self._process.poll() is not None, 60)
        found = sorted(int(path.name) for path in self._begun.iterdir())
        assert len(found) >= count, self.err
        return sorted(found, key=lambda pid: (pid != self.pid, pid))

    def group(self) -> list[int]:
        """Processes of the group that run."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(group) == self.pid and state != "Z":
                found.append(int(path.parent.name))
        return found

    def interrupt(self) -> None:
        """What a terminal does on Ctrl-C; the first line is there at once."""
        os.killpg(self.pid, signal.SIGINT)
        wait_for(lambda: "interrupted; stopping" in self.err, AT_ONCE)

    def ends(self, within: float = GONE) -> int:
        """Wait until every process is gone; returns the exit code."""
        wait_for(lambda: self._process.poll() is not None and not self.group(), within)
        assert "Traceback" not in self.err, self.err
        return self._process.wait()

    def kill(self) -> None:
        if self.group():
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


class Jobs:
    """Runs of one conversion into one folder, and what an undisturbed run makes of it."""

    def __init__(self, root: Path, source: Path) -> None:
        self.root, self.source, self.out = root, source, root / "out"
        self.held: Held | None = None
        succeeded(verb(*self.command()))
        self.whole = file_bytes(self.out)
        shutil.rmtree(self.out)

    def command(self, *more: Any) -> tuple[Any, ...]:
        return ("convert", self.source, self.out, *SIZES, "--quiet", *more)

    def start(self, stage: str, workers: int, **env: str) -> Held:
        command = ("-m", "megatron_converters", *self.command("--workers", workers))
        self.held = Held(self.root / "run", stage, command, self.out, **env)
        return self.held

    def script(self) -> tuple[Any, ...]:
        return ("--load-dir", self.source, "--save-dir", self.out, *SCRIPT_SIZES)

    def start_script(self, stage: str, **env: str) -> Held:
        self.held = Held(self.root / "run", stage, (CONVERT, *self.script()), self.out, **env)
        return self.held

    def clear(self) -> None:
        if self.held is not None:
            self.held.kill()
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.rmtree(self.root / "run", ignore_errors=True)

    def goes_on(self) -> None:
        """Nothing looks complete, and the same command ends with the same bytes, of which finished files are kept."""
        not_a_model(self.out)
        done = {path.stat().st_ino for path in self.out.rglob("files/*/*.pt") if self._recorded(path)}
        again = succeeded(verb(*[part for part in self.command() if part != "--quiet"]))
        assert file_bytes(self.out) == self.whole
        assert done <= {path.stat().st_ino for path in self.out.rglob("*.pt")}
        assert not done or "went on from an interrupted run" in again.out

    def _recorded(self, path: Path) -> bool:
        return (path.parents[2] / "state" / "finished" / f"{path.parent.name}~{path.name}.json").exists()


@pytest.fixture(scope="module")
def _jobs(hf_model: HFModel, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("interrupts"), hf_model("llama2", num_hidden_layers=8))


@pytest.fixture
def jobs(_jobs: Jobs) -> Iterator[Jobs]:
    yield _jobs
    _jobs.clear()


pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked at in /proc")


@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize("stage", ["planning", "copying", "committing"])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_ctrl_c(workers: int, stage: str, jobs: Jobs) -> None:
    """On a disk that does not answer while files are copied. The workers have ended before the result is shown."""
    run = jobs.start(stage, workers)
    begun = run.held(1 if stage == "committing" else workers)
    assert begun[0] == run.pid
    run.interrupt()
    assert run.ends() == 130
    error = "megatron-converters: error: interrupted before the end"
    kept = {
        "planning": "",
        "copying": "files are finished and kept, ",
        "committing": "8 of 8 files are finished and kept, ",
    }
    assert [kept[stage] in line for line in run.err.splitlines() if line.startswith(error)] == [True]
    jobs.goes_on()


@pytest.mark.xdist_group("resume")
def test_ctrl_c_in_a_call_that_does_not_end(jobs: Jobs) -> None:
    """Such as a wait for another process, by a library that no signal interrupts: the first Ctrl-C ends it after a while."""
    run = jobs.start("planning", 2, STUCK="1")
    run.held(2)
    run.interrupt()
    assert run.ends() == 130
    assert run.err.splitlines()[-1] == "megatron-converters: error: interrupted before the end"


@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_ctrl_c_ends_at_once(workers: int, jobs: Jobs) -> None:
    run = jobs.start("copying", workers, STUCK="1")
    run.held(workers)
    run.interrupt()
    time.sleep(0.4)  # what comes sooner is taken for the same signal, doubled
    os.killpg(run.pid, signal.SIGINT)
    assert run.ends(AT_ONCE) == 130
    jobs.goes_on()


@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize(("workers", "stage"), [(2, "planning"), (2, "copying"), (4, "copying")])
def test_a_killed_worker_is_noticed_at_once(workers: int, stage: str, jobs: Jobs) -> None:
    """While the first process plans or copies, which takes it longer than three seconds."""
    run = jobs.start(stage, workers)
    os.kill(run.held(workers)[-1], signal.SIGKILL)
    assert run.ends() == 1
    found = re.search(r"error: process (\d) of the conversion failed: worker (\d) was ended by signal 9", run.err)
    assert found and found[1] == found[2] and 1 <= int(found[1]) < workers, run.err
    assert ("are finished and kept, run the same command again" in run.err) == (stage == "copying")
    jobs.goes_on()


@pytest.mark.xdist_group("resume")
def test_a_worker_that_fails_is_noticed_at_once(jobs: Jobs) -> None:
    run = jobs.start("copying", 2, FULL="1")
    run.held(1)
    assert run.ends() == 1
    assert "process 1 of the conversion failed: cannot write" in run.err and os.strerror(errno.ENOSPC) in run.err
    assert "are finished and kept, run the same command again" in run.err
    jobs.goes_on()


@pytest.mark.xdist_group("resume")
def test_workers_end_with_the_first_process(jobs: Jobs) -> None:
    """Also in a call that does not end."""
    run = jobs.start("copying", 2, STUCK="1")
    os.kill(run.held(2)[0], signal.SIGKILL)
    assert run.ends() == -signal.SIGKILL
    jobs.goes_on()


@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize("stage", ["planning", "copying", "committing"])
def test_ctrl_c_of_the_script(stage: str, jobs: Jobs) -> None:
    """Loader and saver, of which the saver is held."""
    run = jobs.start_script(stage)
    run.held(1)
    run.interrupt()
    assert run.ends() == 130
    assert run.err.count("interrupted; stopping") == 1
    assert "loader: error: interrupted" in run.err or "convert: error: interrupted" in run.err
    not_a_model(jobs.out)
    if stage == "planning":  # nothing has been written yet
        return
    succeeded(convert(*jobs.script()))
    assert {name: data for name, data in file_bytes(jobs.out).items() if name.endswith(".pt")} == {
        name: data for name, data in jobs.whole.items() if name.endswith(".pt")
    }


# --- the parts


def test_a_flush_goes_in_steps_and_reports_what_the_disk_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(flushing, "_STEP", 1 << 20)
    with open(tmp_path / "file", "wb") as file:
        file.write(bytes(5 << 20))
        file.flush()
        flushing.flush(file.fileno(), 5 << 20, lambda: steps.append(1))
        assert len(steps) == 6
        with pytest.raises(Stopped):
            flushing.flush(file.fileno(), 5 << 20, _stop)
        monkeypatch.setattr(flushing, "_system_call", lambda: _failing(errno.EIO))
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            flushing.flush(file.fileno(), 1, _ignore)
        for call in (_failing(errno.ENOSYS), None):
            monkeypatch.setattr(flushing, "_system_call", lambda call=call: call)
            flushing.flush(file.fileno(), 1, _ignore)


def _stop() -> None:
    raise Stopped("enough")


def _ignore() -> None:
    pass


def _failing(number: int) -> Callable[..., int]:
    def call(*_: Any) -> int:
        ctypes.set_errno(number)
        return -1

    return call


def test_lanes_that_hang_are_not_waited_for(tmp_path: Path) -> None:
    """They end when what they wait for does, and write no more."""
    begun, release = threading.Event(), threading.Event()
    executor: Executor[Any] = Executor(lanes=2)

    def hang() -> None:
        begun.set()
        release.wait(60)

    executor._submit(0, hang)
    begun.wait(60)
    assert not executor.cancel(0.1)
    release.set()
    assert executor.cancel()


def test_a_check_that_raises_ends_the_wait(tmp_path: Path) -> None:
    release = threading.Event()

    def hang() -> None:
        release.wait(60)

    executor: Executor[Any] = Executor(check=_stop, lanes=1)
    executor._lanes[0].put(hang)
    with pytest.raises(Stopped, match="enough"):
        executor.finish()
    release.set()
    assert executor.cancel()


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_ctrl_c_that_a_caller_handles_stays_the_callers(handler: Any) -> None:
    """Such as nohup, which ignores it."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        with interrupts.watched("verb"):
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_nothing_is_left_of_a_watch() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    try:
        with interrupts.watched("verb"), interrupts.watched("inner"):
            assert threading.active_count() == threads + 1
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, files)
    finally:
        signal.signal(signal.SIGINT, before)

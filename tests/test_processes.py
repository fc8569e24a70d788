"""Loader and saver are two processes: whichever ends, the other notices, says so, and nothing looks complete."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_converters.basics.errors import ConversionError
from megatron_converters.cli.queue_convert import make_queue
from tests.helpers import (
    BACK,
    CONVERT,
    TRACKER,
    Run,
    convert,
    finished,
    hf_tensors,
    nothing_complete,
    refused,
    start,
    succeeded,
)
from tests.oracle.checkpoint import load_rank

HFModel = Callable[..., Path]
#: Seconds in which a process must notice that its partner is gone: it looks every second, and the machine may be busy.
NOTICED = 15.0
LAYERS = 60

#: A saver like ours that takes its time, and leaves its process id once it has received `MESSAGES` messages.
SLOW_SAVER = """
import os, time
from megatron_converters.formats.queue import source as queue_source
from savers import saver_mcore

add_arguments = saver_mcore.add_arguments
receive = queue_source.receive
left = int(os.environ["MESSAGES"])

def slowly(queue):
    global left
    left -= 1
    if left < 0:
        report()
        if left > -int(os.environ["NAPS"]) - 1:
            time.sleep(float(os.environ["NAP"]))
    return receive(queue)

def report():
    path = os.environ["PID_FILE"]
    with open(path + ".new", "w") as file:
        file.write(str(os.getpid()))
    os.replace(path + ".new", path)

def save_checkpoint(queue, args):
    queue_source.receive = slowly
    saver_mcore.save_checkpoint(queue, args)
"""
#: Put before everything else: writing takes long, and the process id is left once it has begun.
SLOW_DISK = """
import os, time
real = os.pwrite
def slow(*args):
    with open(os.environ["PID_FILE"], "w") as file:
        file.write(str(os.getpid()))
    time.sleep(0.05)
    return real(*args)
os.pwrite = slow
"""
SAVER = "def add_arguments(parser):\n    pass\n\ndef save_checkpoint(queue, args):\n    "


@pytest.fixture(scope="session")
def deep(hf_model: HFModel) -> Path:
    """A model of many small layers: its messages do not fit into a pipe."""
    return hf_model("llama2", num_hidden_layers=LAYERS, hidden_size=32, intermediate_size=32, head_dim=4)


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    """A folder for plugins of others."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "saver_slow.py").write_text(SLOW_SAVER)
    return folder


class Conversion:
    """A conversion that goes on, the process id of its saver once that has begun, and what must be left."""

    def __init__(self, tmp_path: Path, script: Path, *options: Any, messages: int = 0, **env: str) -> None:
        self.save_dir = tmp_path / "out"
        self._pid_file = tmp_path / "pid"
        slow = {"PID_FILE": str(self._pid_file), "MESSAGES": str(messages), "NAPS": "1000", "NAP": "0.05"}
        self.process = start(script, *options, env={"PYTHONPATH": str(tmp_path / "plugins"), **slow, **env})

    def saver(self) -> int:
        """Wait for the saver to have begun."""
        deadline = time.monotonic() + 60
        while not (self._pid_file.exists() and self._pid_file.read_text()):
            assert time.monotonic() < deadline, "the saver has not begun"
            assert self.process.poll() is None, finished(self.process)
            time.sleep(0.01)
        return int(self._pid_file.read_text())

    def ends(self, within: float = NOTICED) -> Run:
        """Both processes end soon: the pipes of the output are held by both."""
        try:
            return finished(self.process, within)
        except BaseException:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise


def conversion(tmp_path: Path, source: Path, *options: Any, messages: int = 0, **env: str) -> Conversion:
    common = ("--loader", "llama_mistral", "--saver", "slow", "--load-dir", source, "--save-dir", tmp_path / "out")
    return Conversion(tmp_path, CONVERT, *common, *options, messages=messages, **env)


def nothing_shown(folder: Path) -> None:
    """A killed saver leaves its hidden folder; nothing else."""
    left = [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.exists() else []
    assert not left


@pytest.mark.parametrize(("messages", "queue_size"), [(0, 1), (20, 1), (0, 200), (20, 50)])
def test_a_killed_saver_is_noticed(messages: int, queue_size: int, deep: Path, plugins: Path, tmp_path: Path) -> None:
    running = conversion(tmp_path, deep, "--max-queue-size", queue_size, messages=messages)
    os.kill(running.saver(), signal.SIGKILL)
    refused(running.ends(), "saver ended")
    nothing_shown(running.save_dir)
    succeeded(convert("--load-dir", deep, "--save-dir", running.save_dir))
    assert not list(running.save_dir.glob(".*"))


def test_a_saver_killed_while_the_loader_only_waits_is_noticed(deep: Path, tmp_path: Path) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "sitecustomize.py").write_text(SLOW_DISK)
    running = Conversion(tmp_path, CONVERT, "--load-dir", deep, "--save-dir", tmp_path / "out", "--max-queue-size", 500)
    os.kill(running.saver(), signal.SIGKILL)
    refused(running.ends(), "signal 9")
    nothing_shown(running.save_dir)


@pytest.mark.parametrize(
    ("sign", "method"),
    [(signal.SIGKILL, "fork"), (signal.SIGTERM, "fork"), (signal.SIGKILL, "spawn"), (signal.SIGTERM, "forkserver")],
)
def test_a_killed_loader_is_noticed(
    sign: signal.Signals, method: str, deep: Path, plugins: Path, tmp_path: Path
) -> None:
    running = conversion(tmp_path, deep, "--max-queue-size", 500, "--start-method", method, messages=3)
    running.saver()
    os.kill(running.process.pid, sign)
    run = running.ends()
    assert "the loader ended before" in run.err
    assert "Traceback" not in run.err
    nothing_complete(running.save_dir)


def test_a_loader_killed_with_a_message_half_sent(plugins: Path, tmp_path: Path) -> None:
    """What fits into the queue's pipe is there, and the saver must not wait for the rest."""
    loader = (
        "def add_arguments(parser):\n    pass\n\ndef load_checkpoint(queue, args):\n    queue.put('x' * 1_000_000)\n"
    )
    (plugins / "loader_other.py").write_text(loader)
    options = ("--loader", "other", "--saver", "slow", "--load-dir", tmp_path, "--save-dir", tmp_path / "out")
    running = Conversion(tmp_path, CONVERT, *options, NAPS="1", NAP="1")
    running.saver()
    time.sleep(0.3)  # for the loader to fill the pipe
    os.kill(running.process.pid, signal.SIGKILL)
    refused(running.ends(), "the loader ended", code=-signal.SIGKILL)
    nothing_complete(running.save_dir)


@pytest.mark.parametrize("queue_size", [1, 50])
def test_an_interrupt_ends_both_in_order(queue_size: int, deep: Path, plugins: Path, tmp_path: Path) -> None:
    running = conversion(tmp_path, deep, "--max-queue-size", queue_size, messages=3)
    running.saver()
    os.killpg(running.process.pid, signal.SIGINT)
    run = running.ends()
    assert run.code not in (0, 2)
    assert "Traceback" not in run.err, run.err
    nothing_complete(running.save_dir)


def test_an_interrupt_with_a_saver_that_does_not_listen(deep: Path, plugins: Path, tmp_path: Path) -> None:
    body = (
        "import os, signal, time\n    signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "    open(os.environ['PID_FILE'], 'w').write(str(os.getpid()))\n    time.sleep(600)\n"
    )
    (plugins / "saver_deaf.py").write_text(SAVER + body)
    running = Conversion(
        tmp_path, CONVERT, "--saver", "deaf", "--load-dir", deep, "--save-dir", tmp_path / "out", "--max-queue-size", 1
    )
    running.saver()
    time.sleep(1)
    os.killpg(running.process.pid, signal.SIGINT)
    try:
        run = finished(running.process, 3 * NOTICED)
    finally:
        if running.process.poll() is None:
            os.killpg(running.process.pid, signal.SIGKILL)
    assert run.code != 0


@pytest.mark.parametrize("queue_size", [1, 2, 0])
def test_any_queue_size_will_do(queue_size: int, deep: Path, tmp_path: Path) -> None:
    succeeded(convert("--load-dir", deep, "--save-dir", tmp_path, "--max-queue-size", queue_size))
    assert (tmp_path / TRACKER).exists()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_start_methods_agree(method: str, deep: Path, tmp_path: Path) -> None:
    succeeded(convert("--load-dir", deep, "--save-dir", tmp_path / "meg", "--start-method", method, anew=True))
    options = ("--loader", "core", "--saver", "hf", "--load-dir", tmp_path / "meg", "--save-dir", tmp_path / "hf")
    succeeded(convert(*options, "--start-method", method, anew=True))
    ours, theirs = hf_tensors(tmp_path / "hf"), hf_tensors(deep)
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)
    assert load_rank(tmp_path / "meg" / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt")["iteration"] == 1


THIRD_PARTY = {
    "dies at once": ("import os; os._exit(3)", 1, "exit code 3"),
    "is killed": ("import os; os.kill(os.getpid(), 9)", 1, "signal 9"),
    "raises": ("raise RuntimeError('third party')", 1, "third party"),
    "exits with 1": ("queue.get(); raise SystemExit(1)", 1, "exit code 1"),
    "exits with 2": ("queue.get(); raise SystemExit(2)", 2, "exit code 2"),
    "exits with text": ("raise SystemExit('out of luck')", 1, "out of luck"),
    "returns at once": ("return", 1, "saver ended"),
    "returns midway": ("[queue.get() for _ in range(5)]", 1, "saver ended"),
    "exits with 0 midway": ("queue.get(); raise SystemExit(0)", 1, "saver ended"),
}


@pytest.mark.parametrize(
    ("queue_size", "case"), [*((500, case) for case in THIRD_PARTY), (2, "raises"), (2, "returns midway")]
)
def test_a_saver_of_others_that_fails(queue_size: int, case: str, deep: Path, plugins: Path, tmp_path: Path) -> None:
    body, code, word = THIRD_PARTY[case]
    (plugins / "saver_other.py").write_text(SAVER + body)
    options = ("--saver", "other", "--load-dir", deep, "--save-dir", tmp_path / "out", "--max-queue-size", queue_size)
    run = Conversion(tmp_path, CONVERT, *options).ends(within=4 * NOTICED)  # it imports torch
    if queue_size == 2:  # the loader may notice first, and then does not know with which code
        assert run.code in (1, code)
        assert "saver ended" in run.err or word in run.err
    else:
        assert run.code == code
        assert word in run.err
    assert "loader_llama_mistral.py" not in run.err, "the loader must not end with a traceback of its own"


def test_a_saver_of_others_that_reads_everything(deep: Path, plugins: Path, tmp_path: Path) -> None:
    body = "*_, last = iter(queue.get, 'done')\n    print('LAST', last['name'], flush=True)"
    (plugins / "saver_other.py").write_text(SAVER + body)
    run = Conversion(tmp_path, CONVERT, "--saver", "other", "--load-dir", deep, "--save-dir", tmp_path / "out").ends(
        4 * NOTICED
    )
    succeeded(run)
    assert "LAST output layer" in run.out


def test_a_saver_of_others_that_sleeps_is_ended_when_the_loader_fails(
    deep: Path, plugins: Path, tmp_path: Path
) -> None:
    (plugins / "saver_other.py").write_text(SAVER + "import time; time.sleep(600)")
    options = ("--saver", "other", "--load-dir", tmp_path / "nothing", "--save-dir", tmp_path / "out")
    run = finished(Conversion(tmp_path, CONVERT, *options).process, 3 * NOTICED)
    refused(run, tmp_path / "nothing", code=2)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("import nosuchmodule", "nosuchmodule"),
        ("x = 1", "add_arguments"),
        ("raise ValueError('broken plugin')", "broken plugin"),
    ],
)
def test_a_plugin_that_is_none(text: str, word: str, deep: Path, plugins: Path, tmp_path: Path) -> None:
    (plugins / "saver_broken.py").write_text(text)
    run = Conversion(tmp_path, CONVERT, "--saver", "broken", "--load-dir", deep, "--save-dir", tmp_path / "out").ends()
    assert run.code != 0
    assert word in run.err


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda sign: sign.name)
def test_the_script_is_ended_midway_and_run_again(sign: signal.Signals, deep: Path, tmp_path: Path) -> None:
    meg = tmp_path / "meg"
    succeeded(convert("--load-dir", deep, "--save-dir", meg))
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "sitecustomize.py").write_text(SLOW_DISK)
    options = ("--load-path", meg, "--save-path", tmp_path / "out")
    running = Conversion(tmp_path, BACK, *options)
    running.saver()
    os.kill(running.process.pid, sign)
    run = running.ends()
    assert run.code not in (0, 2)
    assert "Traceback" not in run.err, run.err
    nothing_shown(running.save_dir)
    if sign == signal.SIGINT:
        nothing_complete(running.save_dir)
    shutil.rmtree(tmp_path / "plugins")
    succeeded(Conversion(tmp_path, BACK, *options).ends())
    assert sorted(path.name for path in running.save_dir.iterdir())[0] == "config.json"


def test_where_semaphores_have_no_place_the_way_around_is_named() -> None:
    """A container with a /dev/shm that is read-only, or none."""

    class Context:
        def Queue(self, maxsize: int) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with pytest.raises(ConversionError, match="Read-only file system; make /dev/shm writable, or use"):
        make_queue(Context(), 5)

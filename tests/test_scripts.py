"""The job scripts: what they run, with stand-ins for Slurm's commands that start real processes, and torchrun on loopback."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, Run, file_bytes, finished, succeeded
from tests.served_python import ServedPython

HFModel = Callable[..., Path]
SLURM, TORCHRUN = ROOT / "scripts/slurm", ROOT / "scripts/torchrun"
SCRIPTS = sorted([*SLURM.iterdir(), *TORCHRUN.iterdir(), ROOT / "scripts/install_dropin.sh"])
#: Starts TASKS processes with the variables that srun sets, or waits to be ended.
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$CALLS"
while [[ "$1" == --* ]]; do shift; done
if [ "${TASKS:-1}" = wait ]; then trap 'echo "srun ended" >> "$CALLS"; exit 143' TERM; while :; do sleep 0.05; done; fi
code=0
for ((rank = 0; rank < ${TASKS:-1}; rank++)); do
    SLURM_PROCID=$rank SLURM_STEP_NUM_TASKS=${TASKS:-1} "$@" & pids[rank]=$!
done
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> "$CALLS"
[ "$1" != show ] || printf '%s\\n' localhost node2 node3
"""
SBATCH = """#!/usr/bin/env bash
echo "sbatch $*" >> "$CALLS"
echo "$(wc -l < "$CALLS");cluster"
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job, with stand-ins first on the path."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "PORT": str(_port()),
    }


def _port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
        return port


def start(script: Path, *options: Any, env: dict[str, str]) -> Any:
    return subprocess.Popen(
        ["bash", str(script), *map(str, options)],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(script: Path, *options: Any, env: dict[str, str]) -> Run:
    return finished(start(script, *options, env=env), 120)


def calls(env: dict[str, str]) -> list[str]:
    path = Path(env["CALLS"])
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    "script", [*SCRIPTS, ROOT / "scripts/there_and_back.sh"], ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_scripts_are_sound(script: Path) -> None:
    text = script.read_text()
    assert os.access(script, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    subprocess.run(["bash", "-n", str(script)], check=True)
    if script.suffix == ".sbatch":  # Slurm reads its lines up to the first command
        assert text.rindex("#SBATCH") < text.index("set -euo")
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--external-sources", str(script)], cwd=ROOT, check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_without_folders_they_say_how_they_are_used(script: Path, slurm: dict[str, str]) -> None:
    result = run(script, env=slurm)
    assert result.code == 2 and "usage: " in result.err
    assert calls(slurm) == []


@pytest.fixture
def python(tmp_path: Path) -> ServedPython:
    return ServedPython(tmp_path / "served", lambda words: pytest.fail(f"asked for {words}"))


def test_slurm_converts_and_verifies(
    hf_model: HFModel, slurm: dict[str, str], python: ServedPython, tmp_path: Path
) -> None:
    source, out = hf_model("llama3"), tmp_path / "my out"
    options = ("--tp", "2", "--pp", "2")
    job = succeeded(run(SLURM / "convert.sbatch", source, out, *options, env={**slurm, "TASKS": "2"}))
    assert "job 4711, run 1, on localhost node2 node3" in job.out and "2 processes" in job.out
    step = f"srun --kill-on-bad-exit=1 {sys.executable} -m megatron_converters convert {source} {out} --tp 2 --pp 2"
    assert calls(slurm) == ["scontrol show hostnames node[1-3]", step]
    again = succeeded(python.run([SLURM / "convert.sbatch", source, out, *options], slurm))
    assert "run 1" in again.out
    for folders in ((source, out), (out,)):
        succeeded(python.run([SLURM / "verify.sbatch", *folders], slurm))
    with open(next(out.rglob("*.pt")), "r+b") as file:
        file.seek(-2000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-2000, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    assert python.run([SLURM / "verify.sbatch", out], slurm).code == 1


def test_a_failure_of_the_step_is_the_job_s(slurm: dict[str, str], python: ServedPython, tmp_path: Path) -> None:
    result = python.run([SLURM / "convert.sbatch", tmp_path, tmp_path / "out", "--tp", "2"], slurm)
    assert result.code == 2 and "is of no known format" in result.err
    assert not any("requeue" in call for call in calls(slurm))


@pytest.mark.parametrize(("restarts", "code"), [("0", 0), ("3", 0), ("20", 1)])
def test_near_its_time_limit_a_job_goes_back_into_the_queue(
    slurm: dict[str, str], tmp_path: Path, restarts: str, code: int
) -> None:
    env = {**slurm, "TASKS": "wait", "SLURM_RESTART_COUNT": restarts}
    job = start(SLURM / "convert.sbatch", tmp_path, tmp_path / "out", env=env)
    deadline = time.monotonic() + 60
    while len(calls(slurm)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)  # until the stand-in has set its trap
    os.kill(job.pid, signal.SIGUSR1)
    result = finished(job, 20)
    assert result.code == code, result
    assert calls(slurm)[2:] == ["srun ended", *(["scontrol requeue 4711"] if code == 0 else [])]


def test_submit_chains_tries_and_the_check(slurm: dict[str, str]) -> None:
    env = {**slurm, "RETRIES": "2", "SBATCH_OPTIONS": "--partition=cpu --nodes=4"}
    succeeded(run(SLURM / "submit.sh", "a b", "out", "--tp", "8", env=env))
    convert, verify = f"{SLURM}/convert.sbatch", f"{SLURM}/verify.sbatch"
    first = "sbatch --parsable --partition=cpu --nodes=4"
    assert calls(slurm) == [
        f"{first} {convert} a b out --tp 8",
        f"{first} --dependency=afterany:1 {convert} a b out --tp 8",
        f"{first} --dependency=afterany:2 {convert} a b out --tp 8",
        f"{first} --nodes=1 --ntasks=1 --dependency=afterok:3 --kill-on-invalid-dep=yes {verify} a b out",
    ]


def test_torchrun_on_two_machines_and_on_one(hf_model: HFModel, python: ServedPython, tmp_path: Path) -> None:
    source, alone, together = hf_model("llama3"), tmp_path / "one" / "out", tmp_path / "two" / "out"
    env = {"PYTHON": sys.executable, "PROCS_PER_NODE": "2", "MASTER_PORT": str(_port())}
    options = ("--tp", "2", "--pp", "2", "--quiet")
    succeeded(python.run([TORCHRUN / "convert.sh", source, alone, *options], env))
    machines = {"NNODES": "2", "PROCS_PER_NODE": "1"}
    nodes = [
        start(TORCHRUN / "convert.sh", source, together, *options, env={**env, **machines, "NODE_RANK": str(rank)})
        for rank in (0, 1)
    ]
    for node in nodes:
        assert finished(node, 120).code == 0
    ranks = [
        {name: data for name, data in file_bytes(folder).items() if name.endswith(".pt")}
        for folder in (alone, together)
    ]
    assert len(ranks[0]) == 4 and ranks[0] == ranks[1]
    succeeded(python.run([TORCHRUN / "verify.sh", source, together], env))
    assert python.run([TORCHRUN / "verify.sh", source, hf_model("qwen2")], env).code == 1


@pytest.mark.parametrize(
    ("codes", "ends", "tries"), [("1 1 0", 0, 3), ("1 1 1", 1, 3), ("2 0 0", 2, 1), ("130 0 0", 130, 1)]
)
def test_torchrun_s_script_tries_again(tmp_path: Path, codes: str, ends: int, tries: int) -> None:
    """With a Python that ends with the given codes, one after the other."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/usr/bin/env bash\necho "$*" >> {tmp_path}/calls\ncodes=({codes})\n'
        f"exit ${{codes[$(wc -l < {tmp_path}/calls) - 1]}}\n"
    )
    python.chmod(0o755)
    env = {"PYTHON": str(python), "ATTEMPTS": "3", "PAUSE": "0"}
    assert run(TORCHRUN / "convert.sh", "a", "b", "--tp", "2", env=env).code == ends
    expected = "-m megatron_converters convert a b --tp 2 --workers 4"
    assert (tmp_path / "calls").read_text().splitlines() == [expected] * tries

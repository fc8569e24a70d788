"""Nobody waits for a process of a live model that is lost or gives up: the others say which one it is, and leave nothing behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_converters.live import heartbeat
from tests import bridge_lost_jobs as jobs
from tests.bridge_oracle_jobs import FILE_SIZE
from tests.logits_processes import PreloadedContext

Models = Callable[..., Path]
PROCESSES = PreloadedContext("tests.live_preload")


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    """The server of these processes has started, which takes longer than the tests wait."""
    process = PROCESSES.Process(target=int)
    process.start()
    process.join()


#: Victim, how it ends, and what the others say.
EARLY = [
    (2, "stopped", "process 2 is lost"),
    (2, "killed", "process 2 is lost"),
    (2, "failed", "process 2 has given up"),
    (2, "left", "process 2 has given up"),
    (0, "stopped", "process 0 is lost"),
    (0, "killed", "process 0 is lost"),
    (0, "failed", "process 0 has given up"),
]
#: Interval and patience of heartbeats in the tests.
QUICK = (0.2, 1.5)


@pytest.mark.parametrize(("victim", "how", "text"), EARLY)
def test_nobody_waits_for_a_process_that_ends_early(
    hf_model: Models, tmp_path: Path, victim: int, how: str, text: str
) -> None:
    """Each says which process it is, also where the first one, which holds the store of the process group, ends at once."""
    found = outcomes(tmp_path, QUICK, jobs.export_until, hf_model("llama3.1"), victim, how)
    check_others(found, victim, text)


def check_others(found: dict[int, str | None], victim: int, text: str) -> None:
    for process, outcome in found.items():
        assert process == victim or (outcome is not None and text in outcome), found


@pytest.mark.parametrize(
    ("victim", "how", "options"),
    [(1, "killed", {}), (0, "killed", {}), (0, "failed", "two"), (2, "failed", "two"), (2, "stopped", "two")],
)
def test_nothing_that_looks_complete_is_left(
    hf_model: Models, tmp_path: Path, victim: int, how: str, options: Any
) -> None:
    out = tmp_path / "out"
    two = dict(distributed_save=True, save_every_n_ranks=2, max_shard_size=FILE_SIZE) if options else {}
    found = outcomes(tmp_path, QUICK, jobs.save_until, hf_model("llama3.1"), victim, how, out, two)
    check_others(found, victim, f"process {victim} ")
    left = [path for path in out.rglob("*") if not path.relative_to(out).parts[0].startswith(".")]
    assert left == []
    assert victim == 0 or list(out.iterdir()) == []  # the first process clears up


@pytest.mark.slow
def test_a_lost_process_is_named_in_time(hf_model: Models, tmp_path: Path) -> None:
    """With the times that users have, within 30 seconds."""
    times = (heartbeat.INTERVAL, heartbeat.PATIENCE)
    found = outcomes(tmp_path, times, jobs.export_until, hf_model("llama3.1"), 2, "stopped", limit=30)
    check_others(found, 2, "process 2 is lost")


def outcomes(
    folder: Path, times: tuple[float, float], job: Callable[..., Any], *args: Any, limit: float = 20
) -> dict[int, str | None]:
    """Texts of the errors of four processes that do a job, which all but a stopped one do within `limit` seconds.

    They are forked from a server that has imported megatron-core.
    """
    processes = [
        PROCESSES.Process(target=jobs.own_process, args=(rank, 4, folder, times, job, args), daemon=True)
        for rank in range(4)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + limit + 10  # they need some time to begin
    victim, how = args[1:3]
    for rank, process in enumerate(processes):
        if not (how == "stopped" and rank == victim):
            process.join(max(0.0, deadline - time.monotonic()))
    waiting = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert waiting == ([victim] if how == "stopped" else [])
    return {rank: path.read_text() if (path := folder / f"{rank}.txt").exists() else None for rank in range(4)}

"""Benchmark of live megatron-core models from and to a Hugging Face folder, against `cp` of the same bytes and against mbridge.

    python scripts/bench/live.py FOLDER [--layers 16] [--hidden 2048] [--runs 3] [--peer-python PEER/bin/python]

Each round runs a flushed `cp`, `build_gpt.py` (megatron-core alone), our import, our export, and with `--peer-python` mbridge's: as
its guide has it, and its import without the random initialisation that comes first. `peer_mbridge.py` says how to make its
environment. Each is a process of its own and measures itself (`watch.py`). A first round, which warms the page cache and fresh
memory, is not counted; its exports are compared with the source bit for bit. We flush what we write and mbridge does not: what is
left is flushed after each run, and rows say "flushed" where that is counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from inputs import PROGRAMS
from measuring import measure, remove, size_of
from pairs import flushed_copy, median_and_range
from same_tensors import check_same

_HERE = Path(__file__).resolve().parent
_BUILD, _OURS, _PEER, _PEER_UNINITIALISED = "megatron-core alone", "ours", "mbridge", "mbridge, uninitialised"


class Seen(NamedTuple):
    """What a process reported of itself, and the seconds that it took afterwards to flush what it wrote."""

    report: dict[str, Any]
    flush: float

    def phase(self, name: str) -> dict[str, float]:
        """Seconds and memory of a phase."""
        return dict(self.report["phases"][name])


class Side(NamedTuple):
    """One of the compared programs: how it is run, without command and folders; its commands, and options after the folders."""

    program: list[str]
    commands: tuple[str, ...] = ("import", "export", "stream")
    options: tuple[str, ...] = ()

    def rows(self) -> list[Row]:
        """Rows of the table that show its commands."""
        return [row for row in _ROWS if row.command in self.commands]


class Row(NamedTuple):
    """Row of the table: what it shows of one side's process that ran this command."""

    label: str
    command: str
    seconds: Callable[[Seen], float]
    phase: str | None = None  # whose memory it shows; that of the whole process without one


_ROWS = (
    Row("import, whole process", "import", lambda seen: float(seen.report["wall_seconds"])),
    Row(
        "import, after Python's imports",
        "import",
        lambda seen: float(seen.report["wall_seconds"]) - seen.phase("imports")["seconds"],
    ),
    Row("export", "export", lambda seen: seen.phase("export")["seconds"], "export"),
    Row("export, flushed", "export", lambda seen: seen.phase("export")["seconds"] + seen.flush, "export"),
    Row("import and export, whole process", "export", lambda seen: float(seen.report["wall_seconds"])),
    Row("export in memory", "stream", lambda seen: seen.phase("stream")["seconds"], "stream"),
)


class Round(NamedTuple):
    """One round: seconds of the flushed copy, what megatron-core alone took, and what each side took by its name and command."""

    copy: float
    build: Seen
    seen: dict[tuple[str, str], Seen]


def run_round(folder: Path, sides: dict[str, Side], check: bool) -> Round:
    """Run everything once."""
    hf, out, copied = folder / "hf", folder / "out", folder / "cp"
    remove(copied)
    copy = measure(flushed_copy(hf, copied)).wall
    remove(copied)
    build = _run([sys.executable, str(_HERE / "build_gpt.py"), str(hf)], folder)
    seen = {}
    for name, side in sides.items():
        for command in side.commands:
            remove(out)
            outputs = [str(out)] if command == "export" else []
            seen[name, command] = _run([*side.program, command, str(hf), *outputs, *side.options], folder)
            if outputs and check:
                check_same(hf, out)
            remove(out)
    return Round(copy, build, seen)


def _run(command: list[str], folder: Path) -> Seen:
    """Run a process that reports on itself, then flush what it wrote, so that the next one need not."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed with {done.returncode}: {done.stderr}")
    start = time.monotonic()
    subprocess.run(["sync", "-f", str(folder)], check=True)
    return Seen(json.loads(done.stdout.splitlines()[-1]), time.monotonic() - start)


def print_table(rounds: list[Round], sides: dict[str, Side]) -> None:
    """Print medians as a Markdown table, each with its ratio to the copy of its round, and memory above that of the imports."""
    print(
        "| run | seconds | / flushed cp | anonymous MiB | above imported megatron-core | resident MiB |\n|---|---|---|---|---|---|"
    )
    _print_row("cp of HF, flushed", [each.copy for each in rounds], rounds)
    walls = [float(each.build.report["wall_seconds"]) for each in rounds]
    _print_row(f"{_BUILD}, whole process", walls, rounds, [each.build.report for each in rounds])
    builds = [each.build.phase("build") for each in rounds]
    _print_row(f"{_BUILD}, build", [build["seconds"] for build in builds], rounds, builds)
    for name, side in sides.items():
        for row in side.rows():
            seen = [each.seen[name, row.command] for each in rounds]
            memory = [one.phase(row.phase) if row.phase else one.report for one in seen]
            _print_row(f"{name}: {row.label}", [row.seconds(one) for one in seen], rounds, memory)


def _print_row(
    label: str, seconds: list[float], rounds: list[Round], memory: list[dict[str, float]] | None = None
) -> None:
    ratios = [one / each.copy for one, each in zip(seconds, rounds, strict=True)]
    cells = [median_and_range(seconds, "{:.2f}"), median_and_range(ratios, "{:.2f}")]
    if memory is None:
        cells += ["", "", ""]
    else:
        anonymous = [one["peak_anonymous_mib"] for one in memory]
        imported = [each.build.phase("imports")["anonymous_mib"] for each in rounds]
        above = [one - base for one, base in zip(anonymous, imported, strict=True)]
        resident = [one["peak_resident_mib"] for one in memory]
        cells += [median_and_range(values, "{:.0f}") for values in (anonymous, above, resident)]
    print(f"| {label} | {' | '.join(cells)} |")


def print_comparisons(rounds: list[Round], sides: dict[str, Side]) -> None:
    """Print how many copies our import takes beyond what megatron-core alone does, and how many times as long each peer takes."""
    beyond = [
        (each.seen[_OURS, "import"].report["wall_seconds"] - each.build.report["wall_seconds"]) / each.copy
        for each in rounds
    ]
    print(f"\n{_OURS}: import beyond {_BUILD}, / flushed cp: {median_and_range(beyond, '{:.2f}')}")
    for name, side in sides.items():
        for row in side.rows() if name != _OURS else ():
            times = [row.seconds(each.seen[name, row.command]) / _ours(row, each) for each in rounds]
            print(f"{name} / {_OURS}: {row.label}: {median_and_range(times, '{:.1f}')}")


def _ours(row: Row, each: Round) -> float:
    return row.seconds(each.seen[_OURS, row.command])


def main() -> None:
    """Make the model if it is missing, run all in turn several times, and print a table of medians and the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, default in {"layers": 16, "hidden": 2048, "runs": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peer-python", help="python of an environment that has mbridge")
    args = parser.parse_args()
    folder = args.folder.absolute()
    if not (folder / "hf" / "config.json").exists():
        subprocess.run(
            [*PROGRAMS["make_model"], str(folder / "hf"), str(args.layers), str(args.hidden), "0"], check=True
        )
    sides = {_OURS: Side([sys.executable, str(_HERE / "ours_bridge.py")])}
    if args.peer_python:
        peer = [args.peer_python, str(_HERE / "peer_mbridge.py")]
        sides |= {_PEER: Side(peer), _PEER_UNINITIALISED: Side(peer, ("import",), ("--uninitialised",))}
    rounds = [run_round(folder, sides, check=not number) for number in range(args.runs + 1)][1:]
    size = size_of(folder / "hf")
    print(
        f"{size / 1e9:.2f} GB ({size / 2**20:.0f} MiB), {args.runs} runs, median (minimum-maximum); "
        "anonymous and resident memory are peaks\n"
    )
    print_table(rounds, sides)
    print_comparisons(rounds, sides)


if __name__ == "__main__":
    main()

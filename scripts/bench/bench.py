"""Benchmark of conversions of a random Llama against `cp` of the same bytes, run alternately, with their memory.

    python scripts/bench/bench.py FOLDER [--layers 16] [--hidden 2048] [--experts 0] [--runs 5] [--tp 2] [--pp 2] [--ep 1]
                                  [--workers 1] [--ckpt-format torch]

16 layers of 2048 are 1.1 billion parameters, 2.2 GB. Quote ratios: the speed of a machine drifts, and `cp` drifts with it.
Anonymous memory is the processes' own (the sum of RssAnon); total memory also counts pages of mapped files, which the
kernel reclaims when it needs memory. Needs Linux.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_SAMPLE_SECONDS = 0.02


class Measured(NamedTuple):
    """Measurements of one run: wall and CPU seconds, and the peaks in MiB of the memory of all its processes."""

    wall: float
    cpu: float
    anonymous: float
    total: float


def measure(command: list[str]) -> Measured:
    """Run a command, and sample the memory of the processes in its session."""
    before = os.times()
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    anonymous = total = 0.0
    while process.poll() is None:
        sampled = _memory(process.pid)
        anonymous, total = max(anonymous, sampled[0]), max(total, sampled[1])
        time.sleep(_SAMPLE_SECONDS)
    wall = time.monotonic() - start
    after = os.times()
    errors = process.communicate()[1].decode()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with {process.returncode}: {errors}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Measured(wall, cpu, anonymous, total)


def _memory(session: int) -> tuple[float, float]:
    """Sums of RssAnon and VmRSS over the processes of a session, in MiB."""
    sums = [0.0, 0.0]
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[3]) != session:
                continue
            for line in (entry / "status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    sums[0] += int(line.split()[1]) / 1024
                elif line.startswith("VmRSS"):
                    sums[1] += int(line.split()[1]) / 1024
        except (FileNotFoundError, ProcessLookupError):
            continue  # the process ended between two reads
    return sums[0], sums[1]


class Timed(NamedTuple):
    """Command, the folder that it reads and the one that it writes; `kept` if a later command reads the output."""

    source: Path
    output: Path
    command: list[str]
    kept: bool = False


def commands(args: argparse.Namespace) -> dict[str, Timed]:
    """Commands to run, by name: each conversion after copies of the folder that it reads."""
    hf, megatron, back = args.folder / "hf", args.folder / "megatron", args.folder / "back"
    to_megatron, back_command = _conversions(args, hf, megatron, back)
    return {
        **copies("HF", hf, args.folder / "cp"),
        "HF to Megatron": Timed(hf, megatron, to_megatron, kept=True),
        **copies("Megatron", megatron, args.folder / "cp"),
        "Megatron to HF": Timed(megatron, back, back_command),
    }


def copies(name: str, source: Path, output: Path) -> dict[str, Timed]:
    """Commands that copy a folder, without and with a flush."""
    flushed = f"cp -r {shlex.quote(str(source))} {shlex.quote(str(output))} && sync -f {shlex.quote(str(output))}"
    return {
        f"cp of {name}": Timed(source, output, ["cp", "-r", str(source), str(output)]),
        f"cp of {name}, flushed": Timed(source, output, ["sh", "-c", flushed]),
    }


def _conversions(args: argparse.Namespace, hf: Path, megatron: Path, back: Path) -> tuple[list[str], list[str]]:
    """Commands of both directions. Only the `convert` verb can use more than one worker."""
    short = ["--tp", str(args.tp), "--pp", str(args.pp), "--ep", str(args.ep), "--ckpt-format", args.ckpt_format]
    if args.workers > 1:
        verb = [sys.executable, "-m", "megatron_converters", "convert", "--quiet", "--workers", str(args.workers)]
        return [*verb, str(hf), str(megatron), *short], [*verb, str(megatron), str(back)]
    convert = [sys.executable, str(ROOT / "convert.py"), "--quiet", "--loader", "hf", "--saver", "mcore"]
    script = [sys.executable, str(ROOT / "convert_mlm_to_hf_checkpoint.py"), "--quiet"]
    return (
        [*convert, "--load-dir", str(hf), "--save-dir", str(megatron), *short],
        [*script, "--load-path", str(megatron), "--save-path", str(back)],
    )


def run_in_turn(commands: dict[str, Timed], runs: int) -> dict[str, list[Measured]]:
    """Run all commands in turn several times; returns the measurements by name."""
    found: dict[str, list[Measured]] = {}
    for number in range(runs + 1):  # the first run warms the page cache
        for name, timed in commands.items():
            remove(timed.output)
            measured = measure(timed.command)
            if number:
                found.setdefault(name, []).append(measured)
            if not timed.kept:  # copies would displace the sources from the page cache
                remove(timed.output)
    return found


def remove(path: Path) -> None:
    """Remove an output, a folder or a file with its manifest."""
    if path.is_dir():
        shutil.rmtree(path)
    for file in path.parent.glob(f"{path.name}*") if path.suffix else ():
        file.unlink()


def print_table(runs: dict[str, list[Measured]]) -> None:
    """Print medians as a Markdown table, with ratios to the plain and the flushed copy of what each run reads."""
    print(
        "| run | wall s | CPU s | wall / cp | wall / flushed cp | anonymous MiB | total MiB |\n|---|---|---|---|---|---|---|"
    )
    for name, measurements in runs.items():
        walls = [measured.wall for measured in measurements]
        read = f"cp of {name.removeprefix('cp of ').split(' to ')[0].split(',')[0]}"
        ratios = [
            median_and_range([m.wall / c.wall for m, c in zip(measurements, runs[copy], strict=True)], "{:.2f}")
            for copy in (read, f"{read}, flushed")
        ]
        rest = [statistics.median(row[index] for row in measurements) for index in (1, 2, 3)]
        shown = " | ".join([median_and_range(walls, "{:.2f}"), f"{rest[0]:.2f}", *ratios])
        print(f"| {name} | {shown} | {rest[1]:.0f} | {rest[2]:.0f} |")


def median_and_range(values: list[float], form: str) -> str:
    """Median of values, and their range in parentheses."""
    return f"{form.format(statistics.median(values))} ({form.format(min(values))}-{form.format(max(values))})"


def make_model(folder: Path, layers: int, hidden: int, experts: int = 0) -> None:
    """Make the random model of this shape unless it is there."""
    if not (folder / "config.json").exists():
        make = [sys.executable, str(Path(__file__).with_name("make_model.py"))]
        subprocess.run([*make, str(folder), *map(str, (layers, hidden, experts))], check=True)


def main() -> None:
    """Make the model if it is missing, run all commands in turn several times, and print a Markdown table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, default in {
        "layers": 16,
        "hidden": 2048,
        "experts": 0,
        "runs": 5,
        "tp": 2,
        "pp": 2,
        "ep": 1,
        "workers": 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ckpt-format", choices=["torch", "torch_dist"], default="torch")
    args = parser.parse_args()
    args.folder = args.folder.absolute()
    make_model(args.folder / "hf", args.layers, args.hidden, args.experts)
    size = sum(path.stat().st_size for path in (args.folder / "hf").iterdir())
    runs = run_in_turn(commands(args), args.runs)
    sizes = f"tp={args.tp}, pp={args.pp}, ep={args.ep}, {args.ckpt_format}, workers={args.workers}"
    print(f"{size / 1e9:.2f} GB, {sizes}, {args.runs} runs, median (minimum-maximum)\n")
    print_table(runs)


if __name__ == "__main__":
    main()

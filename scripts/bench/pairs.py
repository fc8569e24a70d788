"""Commands that are run in pairs with a partner, in alternating order, and the Markdown table of them.

Ratios are those of pairs, since the speed of a machine drifts: what both commands of a pair have in common cancels out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from inputs import Disk, Model, inputs_of, words
from measuring import Measured, files_of, measure, remove, run_unmeasured, settle, size_of

Pair = tuple[Measured, Measured]


class Run(NamedTuple):
    """Command, as a table names it and with the names of its inputs and of its output in braces; `flushed`: to the disk."""

    label: str
    command: str
    flushed: bool = False


class Row(NamedTuple):
    """Row of a table: a command, and the partner that it is run with, by default a flushed copy of what the command writes.

    `check` is a command that compares the outputs of both, `{output}` and `{beside}`, once.
    """

    name: str
    section: str
    model: Model
    run: Run
    partner: Run | None = None
    check: str = ""

    def inputs(self) -> set[str]:
        """Names of what both commands read."""
        commands = [self.run.command, self.partner.command if self.partner else ""]
        return {name for command in commands for name in inputs_of(command)}


class Side(NamedTuple):
    """One command of a pair: its words, what it reads, the folder that it writes into, and whether a later command reads that."""

    command: list[str]
    reads: tuple[Path, ...]
    output: Path
    kept: bool


class Settings(NamedTuple):
    """How rows are run: pairs, whether one more comes first that is not counted, and bytes of memory to touch before each run."""

    runs: int
    discarded: bool
    touch: int


def run_row(row: Row, disk: Disk, paths: Mapping[str, Path], settings: Settings) -> tuple[list[Pair], str]:
    """Run the commands of a row in pairs; returns what was measured, and the partner's name in the table."""
    copied = row.partner is None
    first = _side(row.run, paths, disk.output, kept=copied)
    second = _side(row.partner, paths, disk.beside) if row.partner else _copy(first.output, disk.beside)
    if row.check:
        _check(row, (first, second), disk, settings)
    pairs = []
    for number in range(settings.runs + settings.discarded):
        sides = (first, second) if number % 2 == 0 else (second, first)
        measured = {side.output: _run(side, disk, settings) for side in sides}
        pairs.append((measured[first.output], measured[second.output]))
    label = row.partner.label if row.partner else f"cp of {_amount(first.output)}, flushed"
    remove(first.output)
    return pairs[settings.discarded :], label


def _side(run: Run, paths: Mapping[str, Path], output: Path, kept: bool = False) -> Side:
    command = words(run.command, {**paths, "output": output / "made"})
    reads = tuple(paths[name] for name in inputs_of(run.command))
    return Side(_flushed(command, output) if run.flushed else command, reads, output, kept)


def _copy(source: Path, output: Path) -> Side:
    return Side(flushed_copy(source, output / "made"), (source,), output, kept=False)


def flushed_copy(source: Path, output: Path) -> list[str]:
    """Command that copies a folder and flushes the copy to the disk."""
    return _flushed(["cp", "-r", str(source), str(output)], output)


def _flushed(command: list[str], output: Path) -> list[str]:
    return ["sh", "-c", f"{shlex.join(command)} && sync -f {shlex.quote(str(output))}"]


def _run(side: Side, disk: Disk, settings: Settings) -> Measured:
    remove(side.output)
    side.output.mkdir()
    settle(disk.folder, side.reads, settings.touch)
    measured = measure(side.command)
    if not side.kept:
        remove(side.output)
    return measured


def _check(row: Row, sides: Iterable[Side], disk: Disk, settings: Settings) -> None:
    """Run both commands once, and compare what they wrote."""
    sides = [side._replace(kept=True) for side in sides]
    for side in sides:
        _run(side, disk, settings._replace(touch=0))
    outputs = {"output": disk.output / "made", "beside": disk.beside / "made"}
    run_unmeasured(words(row.check, outputs))
    for side in sides:
        remove(side.output)


def _amount(output: Path) -> str:
    return f"{size_of(output) / 1e9:.2f} GB in {len(files_of(output))} files"


class Column(NamedTuple):
    """Column of the table: its heading, the number that it shows of a pair, and the format of that."""

    heading: str
    value: Callable[[Pair], float]
    form: str = "{:.2f}"


_OWN = (
    Column("wall s", lambda pair: pair[0].wall),
    Column("CPU s", lambda pair: pair[0].cpu),
    Column("anonymous MiB", lambda pair: pair[0].anonymous, "{:.0f}"),
)
_PARTNER = (
    Column("its wall s", lambda pair: pair[1].wall),
    Column("its CPU s", lambda pair: pair[1].cpu),
    Column("wall / its", lambda pair: pair[0].wall / pair[1].wall),
    Column("CPU / its", lambda pair: pair[0].cpu / max(pair[1].cpu, 0.001)),
)


def print_heading(title: str) -> None:
    """Print the heading of a table."""
    headings = ["run", *(column.heading for column in _OWN), "partner", *(column.heading for column in _PARTNER)]
    print(f"\n{title}\n\n| {' | '.join(headings)} |\n|{'---|' * len(headings)}")


def print_row(label: str, partner: str, pairs: list[Pair]) -> None:
    """Print a row of the table: medians over the pairs, with ranges."""
    own, its = (
        [median_and_range([column.value(pair) for pair in pairs], column.form) for column in columns]
        for columns in (_OWN, _PARTNER)
    )
    print(f"| {' | '.join([label, *own, partner, *its])} |", flush=True)


def median_and_range(values: list[float], form: str) -> str:
    """Median of values, and their range in parentheses if there are more than one."""
    median = form.format(statistics.median(values))
    return f"{median} ({form.format(min(values))}-{form.format(max(values))})" if len(values) > 1 else median


def run_rows(rows: Sequence[Row], titles: Mapping[str, str], folder: Path, quick: bool, settings: Settings) -> None:
    """Run rows and print a table for each section; each pair is also appended to `pairs.jsonl` in the folder."""
    disk = Disk(folder, quick)
    print(_conditions(settings) + " Tiny models." * quick, flush=True)
    for row, previous in zip(rows, (None, *rows), strict=False):
        paths = disk.prepare(row.model, row.inputs(), (other.model for other in rows))
        if previous is None or previous.section != row.section:
            print_heading(titles[row.section])
        pairs, partner = run_row(row, disk, paths, settings)
        with disk.log.open("a", encoding="utf-8") as log:
            log.writelines(_logged(row, partner, pairs))
        print_row(row.run.label, partner, pairs)


def _logged(row: Row, partner: str, pairs: list[Pair]) -> Iterator[str]:
    for own, its in pairs:
        line = {"row": row.name, "run": own._asdict(), "partner": partner, "its": its._asdict()}
        yield json.dumps(line) + "\n"


def _conditions(settings: Settings) -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    counted = f"medians (minimum-maximum) of {settings.runs} pairs" if settings.runs > 1 else "1 pair"
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}, warm page cache, {counted}."


def parser(description: str | None, rows: Sequence[Row], titles: Mapping[str, str]) -> argparse.ArgumentParser:
    """Parser of the options that choose rows and how they are run."""
    names = [*titles, *(row.name for row in rows)]
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folder", type=lambda name: Path(name).absolute(), help="for models and outputs")
    made.add_argument("--rows", nargs="+", choices=names, metavar="NAME", help=f"which to run: {', '.join(names)}")
    made.add_argument("--runs", type=int, default=9, help="pairs that are counted (9)")
    made.add_argument("--quick", action="store_true", help="tiny models and one pair, to see whether everything works")
    made.add_argument("--touch", type=float, default=4, metavar="GB", help="memory to touch before each run (4)")
    return made


def run_chosen(args: argparse.Namespace, rows: Sequence[Row], titles: Mapping[str, str]) -> None:
    """Run the rows that a command line chooses by their names or sections."""
    chosen = [row for row in rows if not args.rows or {row.name, row.section} & set(args.rows)]
    settings = Settings(1, False, 0) if args.quick else Settings(args.runs, True, int(args.touch * 1e9))
    run_rows(chosen, titles, args.folder, args.quick, settings)

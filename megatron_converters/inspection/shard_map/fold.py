"""Folded shard map: files that hold the same are one column, and in a tall map layers that are alike one row."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from ...basics.quantities import count, size
from ..in_words import runs, short_name
from ..inventory import Holding, Survey
from .grid import Cell, Column, Grid, Panel, Row, by_row, contents, detail_of, kinds_of, labels_of, row_of, segments_of

#: Most columns of a folded map, and the rows above which layers that are alike share one.
_MAX_COLUMNS, _MAX_ROWS = 24, 12


@dataclass(frozen=True, eq=False)
class _Group:
    """Files that hold the same: the holdings of the first by row, where a row is the layer's place in the file."""

    files: Sequence[str]
    rows: Mapping[Row, list[Holding]]


class _Run(NamedTuple):
    """Rows that are drawn as one, since their cells are alike in every column."""

    rows: Sequence[Row]
    label: str


def folded(found: Survey, full: Grid) -> Grid | None:
    """Map with equal files drawn once; None where that would have more than half the cells of the full one.

    None also where most files differ and belong to no ranks: which layers each has then tells more.
    """
    groups = _groups(found)
    if len(groups) > _MAX_COLUMNS or (found.cut is None and 1 < len(found.by_file) < 2 * len(groups)):
        return None
    folded_rows = _runs(groups, _layers_at(found))
    drawn = sum(run.rows[0] in group.rows for run in folded_rows for group in groups)
    if 2 * drawn > sum(len(panel.cells) for panel in full.panels):
        return None
    detail = detail_of(
        [holding for run in folded_rows for holding in group.rows.get(run.rows[0], [])] for group in groups
    )
    labels = dict(zip(found.by_file, labels_of(found, list(found.by_file)), strict=True))
    columns = tuple(_column(found, group, labels[group.files[0]]) for group in groups)
    cells = [
        Cell(
            *(row, number),
            segments_of(held, detail),
            "\n".join([*_heading(run, column, group, held), *contents(held, detail)]),
            len(run.rows) * column.times,
        )
        for number, (column, group) in enumerate(zip(columns, groups, strict=True))
        for row, run in enumerate(folded_rows)
        if (held := group.rows.get(run.rows[0]))
    ]
    title = f"{_how_many(found, len(groups))}, {size(sum(column.nbytes * column.times for column in columns))}"
    return Grid((Panel(None, title, columns, tuple(run.label for run in folded_rows), tuple(cells)),), detail)


def _how_many(found: Survey, groups: int) -> str:
    """Number of files and of groups that are alike, in words."""
    files = count(len(found.by_file), "rank" if found.cut else "file")
    if groups == len(found.by_file):
        return files
    return f"{files}, all alike" if groups == 1 else f"{files} in {groups} groups of equal ones"


def _groups(found: Survey) -> list[_Group]:
    """Files that hold tensors of the same slots, dtypes and shapes in the same order of rows, in the order of their first."""
    groups: dict[Hashable, list[str]] = {}
    for file, holdings in found.by_file.items():
        rows = [(row.group, _signature(held)) for row, held in by_row(holdings).items()]
        groups.setdefault(tuple(rows), []).append(file)
    return [_Group(files, _by_place(found.by_file[files[0]])) for files in groups.values()]


def _signature(holdings: Iterable[Holding]) -> Hashable:
    """What the holdings are, but for their names and layer."""
    return tuple(sorted((holding.slot, holding.dtype.name, holding.shape) for holding in holdings))


def _by_place(holdings: Iterable[Holding]) -> dict[Row, list[Holding]]:
    """Holdings by row, with the layers of each group numbered from 0."""
    found: dict[Row, list[Holding]] = {}
    for group, rows in groupby(by_row(holdings).items(), key=lambda item: item[0].group):
        found.update({Row(group, place): held for place, (_, held) in enumerate(rows)})
    return found


def _layers_at(found: Survey) -> dict[Row, set[int]]:
    """Numbers of the layers that the files have at each place."""
    layers: dict[Row, set[int]] = {}
    for holdings in found.by_file.values():
        for row, held in _by_place(holdings).items():
            layers.setdefault(row, set()).add(row_of(held[0]).number)
    return layers


def _runs(groups: Sequence[_Group], layers: Mapping[Row, set[int]]) -> list[_Run]:
    """Rows to draw, from top to bottom."""
    rows = sorted({row for group in groups for row in group.rows})
    if len(rows) <= _MAX_ROWS:
        return [_Run([row], _label([row], layers)) for row in rows]

    def alike(row: Row) -> Hashable:
        return row.group, tuple(_signature(group.rows.get(row, ())) for group in groups)

    joined = [list(run) for _, run in groupby(rows, key=alike)]
    return [_Run(run, _label(run, layers)) for run in joined]


def _label(rows: Sequence[Row], layers: Mapping[Row, set[int]]) -> str:
    """Name of rows: by the layers' numbers where all files agree in them, else by their places."""
    first, last = rows[0], rows[-1]
    if first.noun is None:
        return first.label
    if all(len(layers[row]) == 1 for row in rows):
        (start,), (stop,) = layers[first], layers[last]
        return f"{first.noun} {start}" if first == last else f"{first.noun}s {start} to {stop}"
    place = _ordinal(first.number + 1)
    return f"{place} {first.noun}" if first == last else f"{place} to {_ordinal(last.number + 1)} {first.noun}"


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _column(found: Survey, group: _Group, label: str) -> Column:
    """Column of a group, whose bytes are those of its first file; `label` is that of the file alone."""
    held = [holding for holdings in group.rows.values() for holding in holdings]
    return Column(*_names(found, group.files, label), kinds_of(held), len(group.files))


def _names(found: Survey, files: Sequence[str], label: str) -> tuple[str, str]:
    """Long and short name of files that are alike."""
    first, number = short_name(files[0]), f"{len(files):,}"
    if found.cut is None:
        return (first, label) if len(files) == 1 else (f"{number} files alike, first {first}", f"{number} files")
    stages = sorted({found.stage(file) for file in files})
    where = [runs("stage", stages)] if found.cut.pp > 1 else []
    if len(files) == 1:
        return first, ", ".join([*where, label])
    all_ranks = sum(found.stage(file) in stages for file in found.by_file)
    of_all = f"{number} ranks" if all_ranks == len(files) else f"{number} of {all_ranks:,} ranks"
    return ", ".join([*where, f"{of_all} alike"]), where[0] if where and all_ranks == len(files) else of_all


def _heading(run: _Run, column: Column, group: _Group, held: Sequence[Holding]) -> list[str]:
    """First lines of a cell's text."""
    heading = f"{run.label}, {column.name}"
    if len(run.rows) == column.times == 1:
        return [heading]
    layers = f", {len(run.rows)} layers alike" if len(run.rows) > 1 else ""
    return [heading + layers, f"the first is {row_of(held[0]).label}, {short_name(group.files[0])}; it has"]

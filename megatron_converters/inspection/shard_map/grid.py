"""Shard map as a table: panels of rows (layers) and columns (ranks or files), cells cut into segments."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, TypeVar

from ...basics.quantities import count, size
from ...model.slots import SLOTS, Scope
from ..in_words import count_tensors, short_name, stage_layers
from ..inventory import Holding, Survey

T = TypeVar("T")

#: Kinds of slots, each with a colour of its own: name in the legend, and the slots.
KINDS = {
    "embeddings": ("word_embeddings", "position_embeddings", "mtp_proj"),
    "attention": (
        *("qkv", "qkv_bias", "q_down", "q_up", "q_whole", "kv_down", "kv_up", "proj", "proj_bias"),
        *("delta_in", "delta_conv", "delta_a_log", "delta_dt_bias", "delta_out"),
    ),
    "MLP": ("fc1", "fc1_bias", "fc2", "fc2_bias"),
    "experts": ("expert_fc1", "expert_fc2", "block_in", "block_out"),
    "shared expert": ("shared_fc1", "shared_fc2", "shared_gate"),
    "router": ("router", "expert_bias", "block_router"),
    "norms": tuple(name for name in SLOTS if name.endswith(("_norm", "_norm_bias"))),
    "output layer": ("output_layer", "output_layer_bias"),
}
_KIND_BY_SLOT = {slot: kind for kind, slots in KINDS.items() for slot in slots}
#: Names of the rows that are not layers.
FIRST, LAST = "embeddings", "output"
#: What a column stands for, the most columns of a panel, and the most columns in all: of more files, neighbours share one.
#: The ranks of a stage have the same rows, files mostly different ones; narrow panels then leave less space empty.
_RANKS, _FILES = ("rank", 32, 128), ("file", 16, 512)
#: Segments that a picture may have with one segment for each tensor, and for each kind; above, a cell is one segment.
_MAX_TENSOR_SEGMENTS, _MAX_KIND_SEGMENTS = 3000, 20000
_MAX_NAMES = 16


class Detail(Enum):
    """What one segment of a cell stands for."""

    TENSORS = "a tensor"
    KINDS = "a kind of tensor"
    CELLS = "all tensors, in the colour of the largest kind"


class Segment(NamedTuple):
    """Part of a cell, in the colour of its kind."""

    kind: str
    nbytes: int


@dataclass(frozen=True)
class Cell:
    """Weights of one row in one column; `text` describes them in several lines."""

    row: int
    column: int
    segments: tuple[Segment, ...]
    text: str

    @property
    def nbytes(self) -> int:
        """Bytes of weights."""
        return sum(segment.nbytes for segment in self.segments)


@dataclass(frozen=True)
class Column:
    """One file, or neighbouring files that share a column to save space."""

    name: str
    label: str
    kinds: tuple[Segment, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of weights."""
        return sum(segment.nbytes for segment in self.kinds)


@dataclass(frozen=True)
class Panel:
    """Ranks of a pipeline stage, or files; `stage` is None where files do not belong to ranks."""

    stage: int | None
    title: str
    columns: tuple[Column, ...]
    rows: tuple[str, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Grid:
    """All panels, and what their segments stand for."""

    panels: tuple[Panel, ...]
    detail: Detail

    @property
    def largest(self) -> int:
        """Bytes of the largest cell, to which all bars are scaled."""
        return max(cell.nbytes for panel in self.panels for cell in panel.cells)

    @property
    def kinds(self) -> list[str]:
        """Kinds that occur, in the legend's order."""
        held = {segment.kind for panel in self.panels for column in panel.columns for segment in column.kinds}
        return [kind for kind in KINDS if kind in held]


def kind_of(slot: str) -> str:
    """Kind of a slot, a key of `KINDS`."""
    return _KIND_BY_SLOT[slot]


def grid(found: Survey) -> Grid:
    """Divide the survey into panels, columns and cells."""
    stages: dict[int, list[str]] = {}
    for file in found.by_file:
        stages.setdefault(found.stage(file), []).append(file)
    parts = [
        (stage, groups, which)
        for stage, files in sorted(stages.items())
        for groups, which in _panel_columns(files, *(_RANKS if found.cut else _FILES))
    ]
    detail = _detail(found, [group for _, groups, _ in parts for group in groups])
    return Grid(tuple(_panel(found, *part, detail) for part in parts), detail)


def _panel_columns(
    files: Sequence[str], noun: str, per_panel: int, max_columns: int
) -> Iterator[tuple[list[Sequence[str]], str]]:
    """Columns of each panel that these files need, and the panel's files in words."""
    columns = _chunks(files, -(-len(files) // max_columns))
    panels = _chunks(columns, -(-len(columns) // -(-len(columns) // per_panel)))
    first = 0
    for panel in panels:
        last = first + sum(map(len, panel))
        which = f"{noun}s {first + 1:,} to {last:,} of {len(files):,}" if len(panels) > 1 else count(len(files), noun)
        yield list(panel), which
        first = last


def _chunks(items: Sequence[T], length: int) -> list[Sequence[T]]:
    return [items[start : start + length] for start in range(0, len(items), length)]


def _detail(found: Survey, groups: Iterable[Sequence[str]]) -> Detail:
    if len(found.holdings) <= _MAX_TENSOR_SEGMENTS:
        return Detail.TENSORS
    kind_segments = sum(
        len({(_row(holding), kind_of(holding.slot)) for file in group for holding in found.by_file[file]})
        for group in groups
    )
    return Detail.KINDS if kind_segments <= _MAX_KIND_SEGMENTS else Detail.CELLS


def _row(holding: Holding) -> str | int:
    if holding.ref.layer is not None:
        return holding.ref.layer
    return LAST if holding.ref.slot.scope is Scope.LAST or holding.slot == "output_layer" else FIRST


def _order(row: str | int) -> tuple[int, int]:
    return (0, 0) if row == FIRST else (2, 0) if row == LAST else (1, int(row))


def _panel(found: Survey, stage: int, groups: Sequence[Sequence[str]], which: str, detail: Detail) -> Panel:
    """Panel of these columns, each of one file or several; `which` is the panel's files in words."""
    files = [file for group in groups for file in group]
    rows = sorted({_row(holding) for file in files for holding in found.by_file[file]}, key=_order)
    number = {row: index for index, row in enumerate(rows)}
    columns, cells = [], []
    for index, (group, label) in enumerate(zip(groups, _labels(found, [group[0] for group in groups]), strict=True)):
        name = short_name(group[0]) if len(group) == 1 else f"{short_name(group[0])} to {short_name(group[-1])}"
        held = [holding for file in group for holding in found.by_file[file]]
        columns.append(Column(name, label, _by_kind(held)))
        by_row: dict[str | int, list[Holding]] = {}
        for holding in held:
            by_row.setdefault(_row(holding), []).append(holding)
        for row, holdings in by_row.items():
            text = "\n".join([f"{_row_label(row)}, {name}", *_contents(holdings, detail)])
            cells.append(Cell(number[row], index, _segments(holdings, detail), text))
    title = f"{_stage_prefix(found, stage)}{which}, {size(sum(column.nbytes for column in columns))}"
    return Panel(stage if found.cut else None, title, tuple(columns), tuple(map(_row_label, rows)), tuple(cells))


def _row_label(row: str | int) -> str:
    return row if isinstance(row, str) else f"layer {row}"


def _stage_prefix(found: Survey, stage: int) -> str:
    if found.cut is None or found.cut.pp == 1:
        return ""
    return f"stage {stage}, {stage_layers(found, stage)}, "


def _labels(found: Survey, files: Sequence[str]) -> list[str]:
    """Short column labels: the rank's numbers, or the file name without the beginning and end that all names share."""
    if found.cut is not None:
        ranks = [found.ranks[file] for file in files]
        return [f"tp{rank.tp} ep{rank.ep}" if found.cut.ep > 1 else f"tp{rank.tp}" for rank in ranks]
    names = list(map(short_name, files))
    if len(names) == 1:
        return names
    start = _common_prefix_length(names)
    end = _common_prefix_length([name[start:][::-1] for name in names])
    return [name[start : len(name) - end] for name in names]


def _common_prefix_length(names: Iterable[str]) -> int:
    """Length of the beginning that all names share."""
    return sum(1 for _ in itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False)))


def _by_kind(holdings: Iterable[Holding]) -> tuple[Segment, ...]:
    nbytes = Counter[str]()
    for holding in holdings:
        nbytes[kind_of(holding.slot)] += holding.nbytes
    return tuple(Segment(kind, nbytes[kind]) for kind in KINDS if nbytes[kind])


def _segments(holdings: Sequence[Holding], detail: Detail) -> tuple[Segment, ...]:
    if detail is Detail.TENSORS:
        segments = [Segment(kind_of(holding.slot), holding.nbytes) for holding in holdings]
        return tuple(sorted(segments, key=lambda segment: list(KINDS).index(segment.kind)))
    kinds = _by_kind(holdings)
    if detail is Detail.KINDS or not kinds:
        return kinds
    largest = max(kinds, key=lambda segment: segment.nbytes)
    return (Segment(largest.kind, sum(segment.nbytes for segment in kinds)),)


def _contents(holdings: Sequence[Holding], detail: Detail) -> list[str]:
    total = f"{size(sum(holding.nbytes for holding in holdings))} in {count(count_tensors(holdings), 'tensor')}"
    if detail is not Detail.TENSORS:
        held = {kind: [holding for holding in holdings if kind_of(holding.slot) == kind] for kind in KINDS}
        sizes = ((kind, sum(holding.nbytes for holding in group)) for kind, group in held.items() if group)
        return [total, *(f"{kind}: {size(nbytes)}" for kind, nbytes in sizes)]
    shown = [
        f"{holding.name} {list(holding.shape)} {holding.dtype}, {size(holding.nbytes)}"
        for holding in holdings[:_MAX_NAMES]
    ]
    more = len(holdings) - len(shown)
    return [total, *shown, *([f"and {more} more"] if more else [])]

"""Shard map as a table: panels of rows (layers) and columns (ranks or files), cells cut into segments."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, TypeVar

from ...basics.quantities import count, size
from ...model.slots import DECODER, SLOTS, Scope
from ..in_words import count_tensors, short_name, stage_layers
from ..inventory import Holding, Survey

T = TypeVar("T")

#: Kinds of slots, each with a colour of its own: name in the legend, and the slots.
KINDS = {
    "embeddings": ("word_embeddings", "position_embeddings", "mtp_proj"),
    "attention": (
        *("qkv", "qkv_bias", "q_down", "q_up", "q_whole", "kv_down", "kv_up", "proj", "proj_bias", "sinks"),
        *("delta_in", "delta_conv", "delta_a_log", "delta_dt_bias", "delta_out"),
        *("indexer_query", "indexer_key", "indexer_weights"),
    ),
    "MLP": ("fc1", "fc1_bias", "fc2", "fc2_bias"),
    "experts": ("expert_fc1", "expert_fc1_bias", "expert_fc2", "expert_fc2_bias", "block_in", "block_out"),
    "shared expert": ("shared_fc1", "shared_fc2", "shared_gate"),
    "router": ("router", "router_bias", "expert_bias", "block_router"),
    "norms": tuple(name for name in SLOTS if name.endswith(("_norm", "_norm_bias"))),
    "output layer": ("output_layer", "output_layer_bias", "score"),
}
_KIND_BY_SLOT = {slot: kind for kind, slots in KINDS.items() for slot in slots}
#: Groups of rows, from top to bottom: what comes before the layers, the decoder's layers, those of multi-token prediction, the end.
_FIRST, LAYERS, MTP_LAYERS, _LAST = range(4)
_NAMES = {_FIRST: "embeddings", _LAST: "output"}
_NOUNS = {LAYERS: "layer", MTP_LAYERS: "MTP layer"}
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


class Row(NamedTuple):
    """Row of the map: a group of rows, and the number of a layer in it."""

    group: int
    number: int = 0

    @property
    def noun(self) -> str | None:
        """What the row's number counts; None for a row that is no layer."""
        return _NOUNS.get(self.group)

    @property
    def label(self) -> str:
        """Name of the row."""
        return f"{self.noun} {self.number}" if self.noun else _NAMES[self.group]


@dataclass(frozen=True)
class Cell:
    """Weights of one row in one column; `text` describes them in several lines. `times` counts the equal ones drawn as one."""

    row: int
    column: int
    segments: tuple[Segment, ...]
    text: str
    times: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of weights, of one of the equal ones."""
        return sum(segment.nbytes for segment in self.segments)


@dataclass(frozen=True)
class Column:
    """One file, neighbouring files that share a column to save space, or `times` files that hold the same."""

    name: str
    label: str
    kinds: tuple[Segment, ...]
    times: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of weights, of one of the equal files."""
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
        """Bytes of the largest cell, which the longest bar stands for."""
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
    columns = [[found.by_file[file] for file in group] for _, groups, _ in parts for group in groups]
    detail = detail_of([holding for group in column for holding in group] for column in columns)
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


def detail_of(columns: Iterable[Sequence[Holding]]) -> Detail:
    """Finest detail at which these columns make no more segments than a picture may have."""
    tensors = kinds = 0
    for holdings in columns:
        tensors += len(holdings)
        kinds += len({(row_of(holding), kind_of(holding.slot)) for holding in holdings})
    if tensors <= _MAX_TENSOR_SEGMENTS:
        return Detail.TENSORS
    return Detail.KINDS if kinds <= _MAX_KIND_SEGMENTS else Detail.CELLS


def row_of(holding: Holding) -> Row:
    """Row of a holding."""
    if holding.ref.layer is not None:
        return Row(LAYERS if holding.ref.stack == DECODER else MTP_LAYERS, holding.ref.layer)
    return Row(_LAST if holding.ref.slot.scope is Scope.LAST or holding.slot == "output_layer" else _FIRST)


def by_row(holdings: Iterable[Holding]) -> dict[Row, list[Holding]]:
    """Holdings of each row, from top to bottom."""
    found: dict[Row, list[Holding]] = {}
    for holding in holdings:
        found.setdefault(row_of(holding), []).append(holding)
    return dict(sorted(found.items()))


def _panel(found: Survey, stage: int, groups: Sequence[Sequence[str]], which: str, detail: Detail) -> Panel:
    """Panel of these columns, each of one file or several; `which` is the panel's files in words."""
    files = [file for group in groups for file in group]
    rows = sorted({row_of(holding) for file in files for holding in found.by_file[file]})
    number = {row: index for index, row in enumerate(rows)}
    columns, cells = [], []
    for index, (group, label) in enumerate(zip(groups, labels_of(found, [group[0] for group in groups]), strict=True)):
        name = short_name(group[0]) if len(group) == 1 else f"{short_name(group[0])} to {short_name(group[-1])}"
        held = [holding for file in group for holding in found.by_file[file]]
        columns.append(Column(name, label, kinds_of(held)))
        for row, holdings in by_row(held).items():
            text = "\n".join([f"{row.label}, {name}", *contents(holdings, detail)])
            cells.append(Cell(number[row], index, segments_of(holdings, detail), text))
    title = f"{_stage_prefix(found, stage)}{which}, {size(sum(column.nbytes for column in columns))}"
    return Panel(stage if found.cut else None, title, tuple(columns), tuple(row.label for row in rows), tuple(cells))


def _stage_prefix(found: Survey, stage: int) -> str:
    if found.cut is None or found.cut.pp == 1:
        return ""
    return f"stage {stage}, {stage_layers(found, stage)}, "


def labels_of(found: Survey, files: Sequence[str]) -> list[str]:
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


def kinds_of(holdings: Iterable[Holding]) -> tuple[Segment, ...]:
    """One segment for each kind that occurs, in the order of `KINDS`."""
    nbytes = Counter[str]()
    for holding in holdings:
        nbytes[kind_of(holding.slot)] += holding.nbytes
    return tuple(Segment(kind, nbytes[kind]) for kind in KINDS if nbytes[kind])


def segments_of(holdings: Sequence[Holding], detail: Detail) -> tuple[Segment, ...]:
    """Segments of a cell that has these holdings."""
    if detail is Detail.TENSORS:
        segments = [Segment(kind_of(holding.slot), holding.nbytes) for holding in holdings]
        return tuple(sorted(segments, key=lambda segment: list(KINDS).index(segment.kind)))
    kinds = kinds_of(holdings)
    if detail is Detail.KINDS or not kinds:
        return kinds
    largest = max(kinds, key=lambda segment: segment.nbytes)
    return (Segment(largest.kind, sum(segment.nbytes for segment in kinds)),)


def contents(holdings: Sequence[Holding], detail: Detail) -> list[str]:
    """What a cell holds, in lines."""
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

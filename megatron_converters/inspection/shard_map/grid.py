"""The shard map as a table: panels of rows (layers) and columns (ranks or files), cells cut into segments."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, TypeVar

from ...basics.quantities import count, size
from ...model.slots import Scope
from ..in_words import count_tensors, layers_of, short
from ..inventory import Holding, Survey

T = TypeVar("T")

#: What slots are coloured by: the name in the legend, and the slots.
KINDS = {
    "embeddings": ("word_embeddings",),
    "attention": ("qkv", "qkv_bias", "proj", "proj_bias"),
    "MLP": ("fc1", "fc1_bias", "fc2", "fc2_bias"),
    "experts": ("expert_fc1", "expert_fc2"),
    "shared expert": ("shared_fc1", "shared_fc2", "shared_gate"),
    "router": ("router",),
    "norms": ("input_norm", "q_norm", "k_norm", "mlp_norm", "moe_norm", "final_norm"),
    "output layer": ("output_layer",),
}
_KIND_OF = {slot: kind for kind, slots in KINDS.items() for slot in slots}
#: Rows of a panel that are no layers.
FIRST, LAST = "embeddings", "output"
#: What columns are, how many stand side by side before more follow below, and from how many files on neighbours share one.
#: The ranks of a stage have the same rows, files mostly others, so that few abreast leave less room empty.
_RANKS, _FILES = ("rank", 32, 128), ("file", 16, 512)
#: Segments that a picture may have before it shows less of each cell: one for each tensor, for each kind, or one alone.
_MAX_OF_TENSORS, _MAX_OF_KINDS = 3000, 20000
_MAX_NAMES = 16


class Detail(Enum):
    """What a segment of a cell is."""

    TENSORS = "a tensor"
    KINDS = "a kind of tensor"
    CELLS = "all tensors, in the colour of the largest kind"


class Segment(NamedTuple):
    """A part of a cell."""

    kind: str
    nbytes: int


@dataclass(frozen=True)
class Cell:
    """What one column holds of one row; `text` says it in words, several lines."""

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
    """One file, or neighbours that share a column for want of room."""

    name: str
    label: str
    kinds: tuple[Segment, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of weights."""
        return sum(segment.nbytes for segment in self.kinds)


@dataclass(frozen=True)
class Panel:
    """Ranks of a pipeline stage, or files; `stage` is None where files are not those of stages."""

    stage: int | None
    title: str
    columns: tuple[Column, ...]
    rows: tuple[str, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Grid:
    """All panels, and what a segment of them is."""

    panels: tuple[Panel, ...]
    detail: Detail

    @property
    def largest(self) -> int:
        """Bytes of the largest cell; the measure of all."""
        return max(cell.nbytes for panel in self.panels for cell in panel.cells)

    @property
    def kinds(self) -> list[str]:
        """The kinds that occur, in the legend's order."""
        held = {segment.kind for panel in self.panels for column in panel.columns for segment in column.kinds}
        return [kind for kind in KINDS if kind in held]


def kind_of(slot: str) -> str:
    """The kind of a slot."""
    return _KIND_OF[slot]


def grid(found: Survey) -> Grid:
    """Cut the survey into panels, columns and cells."""
    stages: dict[int, list[str]] = {}
    for file in found.by_file:
        stages.setdefault(found.stage(file), []).append(file)
    parts = [
        (stage, groups, which)
        for stage, files in sorted(stages.items())
        for groups, which in _parts(files, *(_RANKS if found.cut else _FILES))
    ]
    detail = _detail(found, [group for _, groups, _ in parts for group in groups])
    return Grid(tuple(_panel(found, *part, detail) for part in parts), detail)


def _parts(files: Sequence[str], noun: str, abreast: int, most: int) -> Iterator[tuple[list[Sequence[str]], str]]:
    """The columns of each panel that these files need, and which files they are."""
    columns = _groups(files, -(-len(files) // most))
    panels = _groups(columns, -(-len(columns) // -(-len(columns) // abreast)))
    first = 0
    for panel in panels:
        last = first + sum(map(len, panel))
        which = f"{noun}s {first + 1:,} to {last:,} of {len(files):,}" if len(panels) > 1 else count(len(files), noun)
        yield list(panel), which
        first = last


def _groups(items: Sequence[T], length: int) -> list[Sequence[T]]:
    return [items[start : start + length] for start in range(0, len(items), length)]


def _detail(found: Survey, groups: Iterable[Sequence[str]]) -> Detail:
    if len(found.holdings) <= _MAX_OF_TENSORS:
        return Detail.TENSORS
    of_kinds = sum(
        len({(_row(holding), kind_of(holding.slot)) for file in group for holding in found.by_file[file]})
        for group in groups
    )
    return Detail.KINDS if of_kinds <= _MAX_OF_KINDS else Detail.CELLS


def _row(holding: Holding) -> str | int:
    if holding.ref.layer is not None:
        return holding.ref.layer
    return LAST if holding.ref.slot.scope is Scope.LAST or holding.slot == "output_layer" else FIRST


def _order(row: str | int) -> tuple[int, int]:
    return (0, 0) if row == FIRST else (2, 0) if row == LAST else (1, int(row))


def _panel(found: Survey, stage: int, groups: Sequence[Sequence[str]], which: str, detail: Detail) -> Panel:
    """A panel of these columns, each one file or several; `which` says so in words."""
    files = [file for group in groups for file in group]
    rows = sorted({_row(holding) for file in files for holding in found.by_file[file]}, key=_order)
    number = {row: index for index, row in enumerate(rows)}
    columns, cells = [], []
    for index, (group, label) in enumerate(zip(groups, _labels(found, [group[0] for group in groups]), strict=True)):
        name = short(group[0]) if len(group) == 1 else f"{short(group[0])} to {short(group[-1])}"
        held = [holding for file in group for holding in found.by_file[file]]
        columns.append(Column(name, label, _by_kind(held)))
        of_row: dict[str | int, list[Holding]] = {}
        for holding in held:
            of_row.setdefault(_row(holding), []).append(holding)
        for row, holdings in of_row.items():
            text = "\n".join([f"{_words(row)}, {name}", *_contents(holdings, detail)])
            cells.append(Cell(number[row], index, _segments(holdings, detail), text))
    title = f"{_of_stage(found, stage)}{which}, {size(sum(column.nbytes for column in columns))}"
    return Panel(stage if found.cut else None, title, tuple(columns), tuple(map(_words, rows)), tuple(cells))


def _words(row: str | int) -> str:
    return row if isinstance(row, str) else f"layer {row}"


def _of_stage(found: Survey, stage: int) -> str:
    if found.cut is None or found.cut.pp == 1:
        return ""
    return f"stage {stage}, {layers_of(found, stage)}, "


def _labels(found: Survey, files: Sequence[str]) -> list[str]:
    """Short names of files side by side: a rank's numbers, or the name without what all of them begin and end with."""
    if found.cut is not None:
        ranks = [found.ranks[file] for file in files]
        return [f"tp{rank.tp} ep{rank.ep}" if found.cut.ep > 1 else f"tp{rank.tp}" for rank in ranks]
    names = list(map(short, files))
    if len(names) == 1:
        return names
    start = _alike(names)
    end = _alike([name[start:][::-1] for name in names])
    return [name[start : len(name) - end] for name in names]


def _alike(names: Iterable[str]) -> int:
    """How many letters all names begin with."""
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
        of_kinds = ((kind, sum(holding.nbytes for holding in those)) for kind, those in held.items() if those)
        return [total, *(f"{kind}: {size(nbytes)}" for kind, nbytes in of_kinds)]
    shown = [
        f"{holding.name} {list(holding.shape)} {holding.dtype}, {size(holding.nbytes)}"
        for holding in holdings[:_MAX_NAMES]
    ]
    more = len(holdings) - len(shown)
    return [total, *shown, *([f"and {more} more"] if more else [])]

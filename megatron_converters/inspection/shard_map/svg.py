"""SVG drawing of the grid; it scales with the page, whose style sheet has the colours."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from html import escape

from ...basics.quantities import size
from .grid import KINDS, Cell, Column, Grid, Panel, Segment

#: Width of a map that has the page for itself, and of one of two beside each other.
FULL_WIDTH, HALF_WIDTH = 1080.0, 528.0
_GUTTER = 106.0
_ROW, _BAR = 17.0, 13.0
#: Height of the header with horizontal and with vertical labels, and the column width from which they are horizontal.
_HEADER, _TALL_HEADER = 34.0, 62.0
_LABEL_WIDTH = 52.0
#: Width of a letter.
_LETTER = 6.4
#: Length of the shortest bar, so that the smallest tensor is visible.
_SHORTEST_BAR = 1.0
_CHART, _CHART_BASE, _CHART_HEIGHT = 112.0, 88.0, 80.0
_CLASS = {kind: f"k{index}" for index, kind in enumerate(KINDS)}


def kind_class(kind: str) -> str:
    """CSS class that has the colour of a kind."""
    return _CLASS[kind]


def panel_svg(panel: Panel, largest: int, name: str, width: float = FULL_WIDTH) -> str:
    """Picture of one panel; `largest` bytes fill a column. `name` makes its ids unique in the page."""
    pitch = (width - _GUTTER) / len(panel.columns)
    top = _TALL_HEADER if pitch < _LABEL_WIDTH else _HEADER
    height = top + _ROW * len(panel.rows) + 4
    described = f"{len(panel.rows)} rows by {len(panel.columns)} columns; bar length = bytes"
    return "".join(
        [
            _open(width, height, name, f"Shard map, {panel.title}", described),
            '<g aria-hidden="true">',  # each bar is named by its row and column
            *_row_labels(panel.rows, top, width),
            *_column_labels(panel.columns, pitch, top, height),
            "</g>",
            *(_cell(cell, pitch, top, largest) for cell in panel.cells),
            "</svg>",
        ]
    )


def totals_svg(grid: Grid, name: str, width: float = FULL_WIDTH) -> str:
    """Bar chart of the bytes of every column of all panels, with gaps between pipeline stages.

    A column that stands for several equal files is as many times as wide.
    """
    stages: dict[int | None, list[Column]] = {}
    for panel in grid.panels:
        stages.setdefault(panel.stage, []).extend(panel.columns)
    files = sum(column.times for columns in stages.values() for column in columns)
    gap = min(10.0, 240.0 / len(stages))
    pitch = (width - _GUTTER - gap * (len(stages) - 1)) / files
    is_folded = any(column.times > 1 for columns in stages.values() for column in columns)
    most = max(column.nbytes for columns in stages.values() for column in columns)
    labels = [
        _text(_GUTTER - 8, _CHART_BASE - _CHART_HEIGHT + 8, size(most), "axis end"),
        _text(_GUTTER - 8, _CHART_BASE, "0", "axis end"),
        f'<path class="line" d="M{_number(_GUTTER)} {_number(_CHART_BASE + 0.5)}H{_number(width)}"/>',
    ]
    bars = []
    left = _GUTTER
    for stage, columns in stages.items():
        stage_width = pitch * sum(column.times for column in columns)
        if len(stages) > 1 and stage_width + gap > 16:
            label = f"stage {stage}" if stage_width > 56 else str(stage)
            labels.append(_text(left + stage_width / 2, _CHART_BASE + 18, label, "axis middle"))
        for column in columns:
            room = pitch * column.times
            bar = max(room - 2, 0.8 * room) if is_folded else min(room * (0.8 if room > 4 else 1.0), 90.0)
            bars.append(_stacked_bar(column, left + room / 2, bar, _CHART_HEIGHT / most if most else 0.0))
            if len(stages) == 1 and room >= _LABEL_WIDTH:
                label = _fitting(room, column.name, column.label)
                labels.append(_text(left + room / 2, _CHART_BASE + 18, label, "axis middle"))
            left += room
        left += gap
    opening = _open(width, _CHART, name, "Weights of each file", "bar height = bytes, stacked by kind of tensor")
    return "".join([opening, '<g aria-hidden="true">', *labels, "</g>", *bars, "</svg>"])


def _fitting(room: float, long: str, short: str) -> str:
    """Long text if there is room for it, else the short one or its beginning."""
    most = int((room - 8) / _LETTER)
    return long if len(long) <= most else short if len(short) <= most else f"{short[: most - 1]}…"


def _stacked_bar(column: Column, middle: float, width: float, scale: float) -> str:
    bars, bottom = [], _CHART_BASE
    for segment in column.kinds:
        bottom -= segment.nbytes * scale
        bars.append(_rect(segment.kind, middle - width / 2, bottom, width, segment.nbytes * scale))
    each = " each" if column.times > 1 else ""
    sizes = (f"{kind}: {size(nbytes)}" for kind, nbytes in column.kinds)
    lines = [f"{column.name}, {size(column.nbytes)}{each}", *sizes]
    return _group("\n".join(lines), "".join(bars))


def _open(width: float, height: float, name: str, title: str, described: str) -> str:
    return (
        f'<svg class="map" viewBox="0 0 {_number(width)} {_number(height)}" role="group" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(described)}</desc>'
    )


def _row_labels(rows: Iterable[str], top: float, width: float) -> Iterator[str]:
    for index, row in enumerate(rows):
        y = top + index * _ROW
        if index % 2 == 0:
            yield f'<rect class="stripe" x="0" y="{_number(y)}" width="{_number(width)}" height="{_number(_ROW)}"/>'
        yield _text(_GUTTER - 8, y + _ROW - 5, row, "row end")


def _column_labels(columns: tuple[Column, ...], pitch: float, top: float, height: float) -> Iterator[str]:
    for index, column in enumerate(columns):
        x = _GUTTER + index * pitch
        yield f'<path class="line" d="M{_number(x)} {_number(top - 4)}V{_number(height)}"/>'
        if pitch >= _LABEL_WIDTH:
            yield _text(x + 4, top - 20, _fitting(pitch, column.name, column.label), "column")
            each = " each" if column.times > 1 else ""
            yield _text(x + 4, top - 7, _fitting(pitch, size(column.nbytes) + each, size(column.nbytes)), "axis")
        else:
            middle = x + min(pitch / 2, 8) + 3
            yield (
                f'<text class="axis" transform="translate({_number(middle)} {_number(top - 7)}) rotate(-90)">'
                f"{escape(column.label)}</text>"
            )


def _cell(cell: Cell, pitch: float, top: float, largest: int) -> str:
    x, y = _GUTTER + cell.column * pitch, top + cell.row * _ROW + (_ROW - _BAR) / 2
    margin = 4.0 if pitch >= _LABEL_WIDTH else min(pitch * 0.1, 2.0)
    room = pitch - 2 * margin
    length = max(room * cell.nbytes / largest, _SHORTEST_BAR) if largest else _SHORTEST_BAR
    bars = []
    for segment, (left, right) in zip(cell.segments, _segment_ends(cell.segments, length), strict=True):
        bars.append(_rect(segment.kind, x + margin + left, y, right - left, _BAR))
    return _group(cell.text, "".join(bars))


def _segment_ends(segments: tuple[Segment, ...], length: float) -> list[tuple[float, float]]:
    """Start and end of each segment of a bar: proportional to its bytes, but no shorter than visible while there is room."""
    total = sum(segment.nbytes for segment in segments)
    least = min(_SHORTEST_BAR, length / (2 * len(segments)))
    lengths = [max(length * segment.nbytes / total, least) if total else least for segment in segments]
    spare, excess = sum(max(one - least, 0.0) for one in lengths), sum(lengths) - length
    shrink = 1 - excess / spare if spare > 0 else 1.0
    ends = list(itertools.accumulate((least + (one - least) * shrink for one in lengths), initial=0.0))
    return list(itertools.pairwise(ends))


def _group(text: str, inner: str) -> str:
    """Bar that the keyboard reaches, with the text as its accessible name."""
    return f'<g class="cell" role="img" tabindex="0"><title>{escape(text)}</title>{inner}</g>'


def _rect(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{_CLASS[kind]}" x="{_number(x)}" y="{_number(y)}" width="{_number(width)}" height="{_number(height)}"/>'


def _text(x: float, y: float, text: str, names: str) -> str:
    return f'<text class="{names}" x="{_number(x)}" y="{_number(y)}">{escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")

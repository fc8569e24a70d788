"""Shard map of one folder as a card of the page: what its lengths mean, legend, pictures, and the tables behind them."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from ...basics.quantities import count, size
from ..inventory import Survey
from .fold import folded
from .grid import Detail, Grid, Panel, grid
from .svg import FULL_WIDTH, kind_class, panel_svg, totals_svg

#: Rows of a map that is shown at once; of a taller one only the chart is, until it is opened.
_MAX_SHOWN_ROWS = 48


def map_card(found: Survey, heading: str, name: str, width: float = FULL_WIDTH) -> str:
    """Card with the map, `width` wide. `name` makes its ids unique in the page."""
    full = grid(found)
    fold = folded(found, full)
    shown = fold or full
    noun = "rank" if found.cut else "file"
    every = f"Each of the {count(len(found.by_file), noun)}"
    if fold is not None:
        body = (
            f"{_pictures(fold, noun, f'{name}-folded', width)}{_closed('The same as a table', _tables(fold))}"
            f"{_closed(every, _pictures(full, noun, name, width) + _tables(full))}"
        )
    elif sum(len(panel.rows) for panel in full.panels) <= _MAX_SHOWN_ROWS:
        body = f"{_pictures(full, noun, name, width)}{_closed('The same as a table', _tables(full))}"
    else:
        body = f"{_chart(full, noun, name, width)}{_closed(every, _panels(full, name, width) + _tables(full))}"
    scale = _scale_text(shown, "" if fold is None else _drawn_once(fold, noun))
    return (
        f'<section class="card" aria-labelledby="{name}-h"><h2 id="{name}-h">{escape(heading)}</h2>'
        f'<a class="skip" href="#{name}-end">Skip the map</a><p>{escape(scale)}</p>'
        f'<ul class="legend">{"".join(map(_legend, full.kinds))}</ul>{body}<span id="{name}-end"></span></section>'
    )


def _scale_text(shown: Grid, once: str) -> str:
    part = (
        "The colour of a bar is that of its largest part."
        if shown.detail is Detail.CELLS
        else f"One segment = {shown.detail.value}."
    )
    return (
        f"Bar length = bytes; the longest = {size(shown.largest)}. {part} {once}"
        "Point at a bar, or reach it with Tab, to read what it holds."
    )


def _drawn_once(fold: Grid, noun: str) -> str:
    if all(column.times == 1 for panel in fold.panels for column in panel.columns):
        return "Equal layers are drawn once. "
    return f"Equal {noun}s are drawn once, with their number as width in the chart. "


def _legend(kind: str) -> str:
    swatch = (
        f'<svg viewBox="0 0 12 12" aria-hidden="true"><rect class="{kind_class(kind)}" width="12" height="12"/></svg>'
    )
    return f"<li>{swatch}{escape(kind)}</li>"


def _closed(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def _pictures(shown: Grid, noun: str, name: str, width: float) -> str:
    return _chart(shown, noun, name, width) + _panels(shown, name, width)


def _chart(shown: Grid, noun: str, name: str, width: float) -> str:
    picture = totals_svg(shown, f"{name}-totals", width)
    return f'<section class="panel"><h3>weights of each {noun}</h3><div class="scroll">{picture}</div></section>'


def _panels(shown: Grid, name: str, width: float) -> str:
    pictures = ((panel, panel_svg(panel, shown.largest, f"{name}-{i}", width)) for i, panel in enumerate(shown.panels))
    return "".join(
        f'<section class="panel"><h3>{escape(panel.title)}</h3><div class="scroll">{picture}</div></section>'
        for panel, picture in pictures
    )


def _tables(shown: Grid) -> str:
    return "".join(f'<div class="scroll">{"".join(_table(panel))}</div>' for panel in shown.panels)


def _table(panel: Panel) -> Iterator[str]:
    """Bytes of every bar of a panel, and of the columns; those of one where equal ones are drawn once."""
    yield f'<table class="numbers"><caption>{escape(panel.title)}: bytes of weights</caption><thead><tr><td></td>'
    for column in panel.columns:
        each = ", each" if column.times > 1 else ""
        yield f'<th scope="col">{escape(column.name)}{each}</th>'
    yield "</tr></thead><tbody>"
    cells = {(cell.row, cell.column): cell for cell in panel.cells}
    for row, label in enumerate(panel.rows):
        held = [cells.get((row, column)) for column in range(len(panel.columns))]
        joined = any(cell and cell.times > column.times for cell, column in zip(held, panel.columns, strict=True))
        yield f'<tr><th scope="row">{escape(label)}{", each" if joined else ""}</th>'
        yield "".join("<td></td>" if cell is None else f"<td>{cell.nbytes:,}</td>" for cell in held)
        yield "</tr>"
    yield '</tbody><tfoot><tr><th scope="row">all rows</th>'
    yield "".join(f"<td>{column.nbytes:,}</td>" for column in panel.columns)
    yield "</tr></tfoot></table>"

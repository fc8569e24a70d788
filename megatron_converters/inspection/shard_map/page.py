"""HTML page around the pictures: one file that loads nothing, with all text from the checkpoint escaped."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from ... import __version__
from ...basics.quantities import count, size
from ..in_words import file_rows, sections
from ..inventory import Survey, count_parameters
from .grid import Detail, Grid, grid
from .svg import kind_class, panel_svg, totals_svg


def page(found: Survey) -> str:
    """The whole HTML page."""
    shard_grid = grid(found)
    script = _resource("tooltip.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(_resource("page.html")).substitute(
        digest=digest,
        script=script,
        title=escape(_title(found)),
        path=escape(found.origin.described),
        tiles="".join(_tile(label, value) for label, value in _tiles(found)),
        legend="".join(_legend(kind) for kind in shard_grid.kinds),
        totals=totals_svg(shard_grid),
        measure=escape(_scale_text(shard_grid)),
        panels="".join(
            f'<section class="panel"><h3>{escape(panel.title)}</h3>{panel_svg(panel, shard_grid.largest, f"p{index}")}</section>'
            for index, panel in enumerate(shard_grid.panels)
        ),
        sections="".join(_section(section.title, section.rows) for section in sections(found)),
        files="".join(_row(row) for row in file_rows(found)),
        version=escape(__version__),
    )


def _resource(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _title(found: Survey) -> str:
    """Folder name, preceded by the parent's where the folder is only an iteration."""
    path = Path(found.origin.described).absolute()
    return "/".join(path.parts[-2:] if found.ranks and len(path.parts) > 2 else path.parts[-1:])


def _tiles(found: Survey) -> list[tuple[str, str]]:
    total, active = count_parameters(found.spec)
    nbytes = sum(holding.nbytes for holding in found.holdings)
    parallel = found.origin.parallel
    tiles = [("parameters", _abbreviated(total))]
    tiles += [("active", _abbreviated(active))] if active != total else []
    tiles += [("weights", size(nbytes)), ("layers", str(found.spec.num_layers))]
    if parallel is None:
        return [*tiles, ("files", f"{len(found.by_file):,}")]
    sizes = f"TP {parallel.tp} · PP {parallel.pp}"
    if found.spec.num_experts:
        sizes += f" · EP {parallel.ep} · ETP {parallel.etp}"
    return [*tiles, ("parallel", sizes), (count(len(found.by_file), "file").split()[1], f"{len(found.by_file):,}")]


def _abbreviated(number: int) -> str:
    """Parameter count with a unit, such as 8.03 B."""
    value, units = float(number), iter(("", " K", " M", " B", " T"))
    unit = next(units)
    while value >= 999.5 and unit != " T":
        value, unit = value / 1000, next(units)
    return f"{value:.3g}{unit}"


def _scale_text(shard_grid: Grid) -> str:
    words = f"A bar is as long as its cell has bytes; the longest stands for {size(shard_grid.largest)}."
    if shard_grid.detail is Detail.CELLS:
        return f"{words} It is in the colour of what it holds most of. Point at one to see what it holds."
    return f"{words} Each part of a bar is {shard_grid.detail.value}. Point at one to see what it holds."


def _tile(label: str, value: str) -> str:
    return f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>"


def _legend(kind: str) -> str:
    swatch = (
        f'<svg viewBox="0 0 12 12" aria-hidden="true"><rect class="{kind_class(kind)}" width="12" height="12"/></svg>'
    )
    return f"<li>{swatch}{escape(kind)}</li>"


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    body = "".join(f'<tr><th scope="row">{escape(label)}</th><td>{escape(value)}</td></tr>' for label, value in rows)
    return f"<section><h2>{escape(title)}</h2><table>{body}</table></section>"


def _row(cells: tuple[str, ...]) -> str:
    name, *numbers = map(escape, cells)
    return f'<tr><th scope="row">{name}</th>{"".join(f"<td>{number}</td>" for number in numbers)}</tr>'

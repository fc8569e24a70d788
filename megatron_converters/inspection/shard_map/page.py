"""HTML pages with shard maps: one file that loads nothing, with all text from the checkpoint escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from ... import __version__
from ...basics.quantities import count, size
from ...conversion.dry_run import Forecast
from ..in_words import Section, conversion_section, file_rows, sections, sum_nbytes
from ..inventory import Survey, count_parameters
from .card import map_card
from .svg import HALF_WIDTH

_Tiles = list[tuple[str, str]]
_ON_DISK = "on the disk"


def page(found: Survey) -> str:
    """Page of one folder."""
    return _page(
        title=_title(found),
        path=found.origin.described,
        tiles=[*_model_tiles(found), *_folder_tiles(found)],
        facts=sections(found),
        maps=map_card(found, "Shard map", "map"),
        files=_files("Files", found, _ON_DISK),
        source="the headers of the files",
    )


def conversion_page(source: Survey, target: Survey, result: Forecast) -> str:
    """Page of a planned conversion: the map of the source beside the one that the target would have."""
    model, *_ = sections(source)
    layouts = [
        Section(f"layout {words}", section.rows)
        for words, found in (("before", source), ("after", target))
        for section in sections(found)
        if section.title == "layout"
    ]
    before, after = map_card(source, "Before", "before", HALF_WIDTH), map_card(target, "After", "after", HALF_WIDTH)
    files = _files("Files before", source, _ON_DISK) + _files("Files after", target, "size of the file")
    sides = (("before", source), ("after", target))
    return _page(
        title=f"{_title(source)} → {_title(target)}",
        path=f"{source.origin.described} → {target.origin.described} (planned; nothing is written)",
        tiles=[
            *_model_tiles(source),
            *((f"{label}, {words}", value) for words, found in sides for label, value in _folder_tiles(found)),
        ],
        facts=[model, conversion_section(result), *layouts],
        maps=f'<div class="beside">{before}{after}</div>',
        files=f'<div class="beside">{files}</div>',
        source="the plan of the conversion",
    )


def _page(*, title: str, path: str, tiles: _Tiles, facts: Iterable[Section], maps: str, files: str, source: str) -> str:
    """The whole page; `maps` and `files` are HTML, the others are text."""
    script = _resource("tooltip.js")
    return Template(_resource("page.html")).substitute(
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        script=script,
        title=escape(title),
        path=escape(path),
        tiles="".join(_tile(label, value) for label, value in tiles),
        facts="".join(_section(section) for section in facts),
        maps=maps,
        files=files,
        version=escape(__version__),
        source=escape(source),
    )


def _resource(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _title(found: Survey) -> str:
    """Folder name, preceded by the parent's where the folder is only an iteration."""
    path = Path(found.origin.described).absolute()
    return "/".join(path.parts[-2:] if found.ranks and len(path.parts) > 2 else path.parts[-1:])


def _model_tiles(found: Survey) -> _Tiles:
    total, active = count_parameters(found.spec)
    tiles = [("parameters", _abbreviated(total))]
    tiles += [("active", _abbreviated(active))] if active != total else []
    return [*tiles, ("layers", str(found.spec.num_layers))]


def _folder_tiles(found: Survey) -> _Tiles:
    parallel, files = found.origin.parallel, len(found.by_file)
    tiles = [("weights", size(sum_nbytes(found.holdings)))]
    if parallel is not None:
        sizes = f"TP {parallel.tp} · PP {parallel.pp}"
        if found.spec.num_experts:
            sizes += f" · EP {parallel.ep} · ETP {parallel.etp}"
        tiles.append(("parallel", sizes))
    return [*tiles, (count(files, "file").split()[1], f"{files:,}")]


def _abbreviated(number: int) -> str:
    """Parameter count with a unit, such as 8.03 B."""
    value, units = float(number), iter(("", " K", " M", " B", " T"))
    unit = next(units)
    while value >= 999.5 and unit != " T":
        value, unit = value / 1000, next(units)
    return f"{value:.3g}{unit}"


def _tile(label: str, value: str) -> str:
    return f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>"


def _section(section: Section) -> str:
    rows = section.rows
    body = "".join(f'<tr><th scope="row">{escape(label)}</th><td>{escape(value)}</td></tr>' for label, value in rows)
    return f"<section><h2>{escape(section.title)}</h2><table>{body}</table></section>"


def _files(heading: str, found: Survey, size_label: str) -> str:
    """Closed table of the files."""
    head = "".join(f'<th scope="col">{escape(label)}</th>' for label in ("name", "tensors", "weights", size_label))
    body = "".join(_row(row) for row in file_rows(found))
    return (
        f'<details class="card"><summary>{escape(heading)}</summary><div class="scroll"><table class="numbers files">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def _row(cells: tuple[str, ...]) -> str:
    name, *numbers = map(escape, cells)
    return f'<tr><th scope="row">{name}</th>{"".join(f"<td>{number}</td>" for number in numbers)}</tr>'

"""`families`: what is supported, one line a family, and how it was proven."""

from __future__ import annotations

import argparse
import itertools
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ...formats.kinds import HF, MEGATRON, META
from ..console import put, put_json
from ..options.shared import add_shared

if TYPE_CHECKING:
    from ...families.facts import Family

_HEADINGS = ("family", "class", "kind", "also", "since", "proof")
#: Formats that can hold every family.
_USUAL = (HF, MEGATRON)
_GAP = " "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    add_shared(parser, "--json", "--family-file")


def run(args: argparse.Namespace) -> int:
    """Print the families; 0."""
    from ...inspection.supported import supported_families

    families = supported_families()
    if args.json:
        put_json({"families": [family._asdict() for family in families]})
    else:
        put("\n".join([*_table([_HEADINGS, *map(_row, families)]), "", *_meanings()]))
    return 0


def _row(family: Family) -> tuple[str, ...]:
    from ...families.facts import PROOFS

    names = dict.fromkeys((family.name, family.model_type, *family.aliases))
    also = " ".join(name for name in family.formats if name not in _USUAL)
    return (" ".join(names), family.architecture, family.kind, also, family.since or "-", PROOFS[family.proof])


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Lines of a table that fits the terminal, if breaking its cells between words is enough for that."""
    columns = [*zip(*rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    spare = [width - max(map(len, " ".join(column).split())) for column, width in zip(columns, widths, strict=True)]
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - shutil.get_terminal_size().columns
    for column in sorted(range(len(columns)), key=spare.__getitem__, reverse=True):
        saved = min(spare[column], max(excess, 0))
        widths[column], excess = widths[column] - saved, excess - saved
    for row in rows:
        cells = [textwrap.wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
        for line in itertools.zip_longest(*cells, fillvalue=""):
            yield _GAP.join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()


def _meanings() -> Iterator[str]:
    from ...families.facts import PROOFS
    from ...families.table import Proof

    yield f"also: formats besides {' and '.join(_USUAL)}, which can hold all; {META} is only read"
    yield "since: least release of Megatron-LM that has arguments for such a model; - if none has, or it is not stated"
    yield from (f"{PROOFS[proof.value]}: {proof.value}" for proof in Proof)

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
#: Where a cell may be broken that has no space.
_SOFT = "\N{ZERO WIDTH SPACE}"


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
    architecture = family.architecture.replace("ForConditional", f"{_SOFT}ForConditional")
    return (" ".join(names), architecture, family.kind, also, family.since or "-", PROOFS[family.proof])


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Lines of a table that fits the terminal, if breaking its cells between words is enough for that."""
    columns = [*zip(*rows, strict=True)]
    widths = [max(len(cell.replace(_SOFT, "")) for cell in column) for column in columns]
    words = [" ".join(column).replace(_SOFT, " ").split() for column in columns]
    spare = [width - max(map(len, found)) for found, width in zip(words, widths, strict=True)]
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - shutil.get_terminal_size().columns
    for column in sorted(range(len(columns)), key=spare.__getitem__, reverse=True):
        saved = min(spare[column], max(excess, 0))
        widths[column], excess = widths[column] - saved, excess - saved
    for row in rows:
        cells = [_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)]
        for line in itertools.zip_longest(*cells, fillvalue=""):
            yield _GAP.join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()


def _wrapped(cell: str, width: int) -> list[str]:
    """Lines of a cell, broken in a word only where that is needed."""
    whole = cell.replace(_SOFT, "")
    return [whole] if len(whole) <= width else textwrap.wrap(cell.replace(_SOFT, " "), width)


def _meanings() -> Iterator[str]:
    from ...families.facts import PROOFS
    from ...families.table import Proof

    yield f"also: formats besides {' and '.join(_USUAL)}, which can hold all; {META} is only read"
    yield "since: least release of Megatron-LM that has arguments for such a model; - if none has, or it is not stated"
    yield from (f"{PROOFS[proof.value]}: {proof.value}" for proof in Proof)

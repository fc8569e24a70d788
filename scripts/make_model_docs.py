#!/usr/bin/env python3
"""Write the table of docs/models.md from the tables of the built-in families.

python scripts/make_model_docs.py            write docs/models.md; what stands around its table stays
python scripts/make_model_docs.py --check    exit with 1 if that would change it
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_converters.families.facts import Family

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/models.md"
_BEGIN, _END = "<!-- Below: made by scripts/make_model_docs.py. -->\n", "<!-- Above: made by it. -->\n"


def page(written: str) -> str:
    """The page, with its table made anew."""
    before, _, rest = written.partition(_BEGIN)
    return before + _BEGIN + "\n" + table() + "\n" + _END + rest.partition(_END)[2]


def table() -> str:
    """One row for each built-in family, in the order of their models' names, and what the words for proofs mean."""
    from megatron_converters.families import FAMILIES
    from megatron_converters.families.wrappers import WRAPPERS
    from megatron_converters.inspection.supported import supported_families

    own = {*FAMILIES.built_in, *(row.model_type for row in WRAPPERS)}
    families = [family for family in supported_families() if family.name in own]
    lines = [
        "| models | transformers class | kind | Megatron-LM | proof | what is covered |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_row(family) for family in sorted(families, key=lambda family: family.models.lower())]
    return "\n".join([*lines, "", *_meanings()]) + "\n"


def _row(family: Family) -> str:
    from megatron_converters.families.facts import PROOFS
    from megatron_converters.families.table import Proof

    remote = " (remote code)" if family.proof == Proof.EQUIVALENT.value else ""
    named = f"`{family.architecture}`{remote}"
    cells = (family.models, named, family.kind, family.since or "–", PROOFS[family.proof], family.covers)
    return f"| {' | '.join(cells)} |"


def _meanings() -> Iterator[str]:
    from megatron_converters.families.facts import PROOFS
    from megatron_converters.families.table import Proof

    yield "Megatron-LM: the least release that has arguments for such a model, – if none has."
    yield f"Proof: {'; '.join(f'{PROOFS[proof.value]}: {proof.value}' for proof in Proof)}."


if __name__ == "__main__":
    from made_pages import keep

    keep(PAGE, page, "the tables of families")

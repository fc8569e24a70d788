"""Pages of docs/ that a script makes, in whole or in part: they are written, or with --check compared."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def keep(page: Path, make: Callable[[str], str], source: str) -> None:
    """Write what `make` makes of a page as it is; with --check, exit with 1 if that would change it.

    `source` names what the page is made of.
    """
    sys.path.insert(0, str(ROOT))
    written = page.read_text(encoding="utf-8") if page.exists() else ""
    made = make(written)
    if made == written:
        return
    if "--check" in sys.argv[1:]:
        sys.exit(f"{page} is not what {Path(sys.argv[0]).name} makes of {source}; run it")
    page.write_text(made, encoding="utf-8")

"""Folder of a user's settings and history: given, or MODELCONVERT_HOME, or where the XDG base directories say."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "MODELCONVERT_HOME"
_NAME = "modelconvert"


def workspace(path: str | os.PathLike[str] | None = None) -> Path:
    """Folder of the workspace, which need not exist."""
    given = path or os.environ.get(VARIABLE)
    if given:
        return Path(given)
    base = os.environ.get("XDG_DATA_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local" / "share") / _NAME

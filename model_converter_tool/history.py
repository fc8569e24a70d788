"""History of conversions: one line of JSON for each, which several processes may append at once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_converters.basics.errors import ConversionError, reason_of
from megatron_converters.basics.json_values import finite

FILE = "history.jsonl"


def append(workspace: Path, entry: dict[str, Any]) -> str | None:
    """Append an entry in one write; returns why that failed, or None. A conversion does not fail for its history."""
    line = json.dumps(finite(entry)).encode() + b"\n"
    path = workspace / FILE
    try:
        workspace.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = os.write(fd, line)
        finally:
            os.close(fd)
    except OSError as error:
        return f"{path} cannot be written: {reason_of(error)}"
    return None if written == len(line) else f"{path} got only a part of the last entry; free some space"


def entries(workspace: Path) -> list[dict[str, Any]]:
    """Every entry, the oldest first. A line that is no entry, such as one that a full disk has cut, is passed over."""
    try:
        lines = (workspace / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConversionError(f"cannot read {workspace / FILE}: {reason_of(error)}") from error
    return [entry for entry in map(_parsed, lines) if isinstance(entry, dict)]


def clear(workspace: Path) -> None:
    """Remove all entries."""
    (workspace / FILE).unlink(missing_ok=True)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None

"""JSON files that hold one object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import ConversionError, reason_of


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; `ConversionError` if it is missing or broken."""
    if path.exists() and not path.is_file():  # reading a pipe would block forever
        raise ConversionError(f"{path} is not a file; give a folder that holds one")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path} is missing; give a folder that holds it") from None
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {reason_of(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a value as Hugging Face writes its configurations: indented, UTF-8."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a path that is not valid Unicode
        text = json.dumps(value, indent=2)
    path.write_text(text + "\n", encoding="utf-8")

"""Page that a verb writes for `--html`."""

from __future__ import annotations

from pathlib import Path

from ..basics.errors import UsageError
from ..conversion.staging import write_text
from .console import warn


def page_path(given: str | None) -> Path | None:
    """Path of the page that is asked for; raises `UsageError` where it cannot be written."""
    if given is None:
        return None
    path = Path(given)
    if path.is_dir() or not path.parent.is_dir():
        fault = "is a folder" if path.is_dir() else f"cannot be made: there is no folder {path.parent}"
        raise UsageError(f"--html {path} {fault}; name a file in a folder that exists")
    return path


def write_page(path: Path, page: str) -> None:
    """Write the page, and say so. A link and a device, such as /dev/stdout, stay what they are."""
    if not path.is_symlink() and (path.is_file() or not path.exists()):
        write_text(path, page)
    else:
        path.write_text(page, encoding="utf-8")
    warn(f"wrote the page {path}")  # standard output has the result, which may be JSON

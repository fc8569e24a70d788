"""Write under another name, show when complete: a killed or failed run never looks like a finished one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .errors import ConversionError


def staging_path(save_dir: Path, name: str) -> Path:
    """Where the files of `save_dir/name` lie until they are complete."""
    return save_dir / f".{name}.incomplete"


def make_staging(save_dir: Path, name: str) -> Path:
    """An empty staging folder; what a killed run left there is removed."""
    staging = staging_path(save_dir, name)
    try:
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
    except OSError as error:
        raise ConversionError(
            f"cannot make {staging}: {error.strerror}; choose a folder that can be written"
        ) from error
    return staging


def check_space(folder: Path, needed: int) -> None:
    """Raise if the file system of `folder` (or its nearest parent that exists) has fewer than `needed` bytes free."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    status = os.statvfs(existing)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise ConversionError(
            f"{folder} needs {needed / 1e9:.2f} GB, but its file system has {free / 1e9:.2f} GB free; make room or save elsewhere"
        )


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    temporary = path.with_name(path.name + ".incomplete")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

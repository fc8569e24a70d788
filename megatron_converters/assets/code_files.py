"""Python files of a Hugging Face model that transformers does not have itself: carried as bytes, never imported or run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

#: Folder of the files in a checkpoint.
CODE_FOLDER = "hf_files"
_NAME = re.compile(r"(modeling|configuration)_[\w.-]*\.py", re.ASCII)


def code_files(folder: Path, *, links: bool = True) -> dict[str, Path]:
    """Code files in a folder, by name; none if there is no such folder.

    The cache of huggingface_hub consists of links. A checkpoint has none, so `links` is false for it: a link in a copy of one
    could lead to any file of the machine.
    """
    found = sorted(folder.iterdir()) if folder.is_dir() and (links or not folder.is_symlink()) else []
    return {
        path.name: path
        for path in found
        if _NAME.fullmatch(path.name) and path.is_file() and (links or not path.is_symlink())
    }


def write_code_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy code files into a folder, which is made if there are any."""
    for name, path in files.items():
        folder.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)

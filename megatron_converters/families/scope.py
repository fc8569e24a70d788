"""Scope of a family file: the commands and calls that it is named in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from .registry import FAMILIES


@contextmanager
def family_of(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Add the family of a file while the context lasts; None adds none. Raises `ConversionError` for a file that is not sound."""
    if path is None or (FAMILIES.file is not None and FAMILIES.file.path == os.path.realpath(path)):
        yield
        return
    from .family_file import read_family_file

    with FAMILIES.using(read_family_file(path)):
        yield

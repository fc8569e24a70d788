"""Target for one file of `torch.save`: a dictionary of all weights under Hugging Face's names, without any configuration."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from ...basics.errors import ConversionError, UsageError
from ...basics.quantities import count, size
from ...conversion.journal import MANIFEST
from ...conversion.staging import Staging
from ...storage import torch_zip
from ...storage.output_file import FileLayout
from ...storage.shards import Stored, parts_of
from .options import HFOptions
from .target import HFTarget


class SingleFileTarget(HFTarget):
    """File that appears in its folder only when it is complete; its manifest lies beside it."""

    def __init__(self, path: Path, options: HFOptions) -> None:
        super().__init__(path.parent, options)
        self._path = path
        self._name = path.name

    @property
    def output(self) -> Path:
        """The file itself."""
        return self._path

    @property
    def manifest(self) -> Path:
        """Manifest beside the file."""
        return self._path.with_name(f"{self._path.name}.{MANIFEST}")

    @property
    def marker(self) -> str | None:
        """None: there are no small files."""
        return None

    def shown(self) -> Path | None:
        """Return the file if it is there and not to be overwritten; else None."""
        return self._path if self._path.exists() and not self._options.overwrite else None

    def refuse_existing(self) -> None:
        """Raise if the path is a folder, or if a file is there, unless `overwrite` is set."""
        if self._path.is_dir():
            raise UsageError(
                f"{self._path} is a folder; name the file to write, such as {self._path / 'hf_weights.pt'}"
            )
        there = [path for path in (self._path, self.manifest) if os.path.lexists(path)]
        if there and not self._options.overwrite:
            raise ConversionError(f"{there[0]} already exists; save elsewhere or pass --overwrite")

    def clear(self, staging: Staging) -> None:
        """Remove an older file and its manifest."""
        for path in (self._path, self.manifest):
            path.unlink(missing_ok=True)

    def show(self, staging: Staging) -> list[str]:
        """Move the file into place, after its manifest; returns lines for the user."""
        staging.move_into(self.save_dir, (self._path.name,))
        return [f"wrote {count(len(self._file_names), 'tensor')} ({size(self._total)}) to {self._path}", *self._notes]

    def assets(self, folder: Path) -> None:
        """Take over the notes of the source: there are no small files."""
        self._notes = [*self._origin.notes]

    def _small_files(self, tokens: dict[str, Any]) -> dict[str, Any]:
        return {}

    def _split(self, stored: list[Stored]) -> dict[str, list[Stored]]:
        return {self._path.name: stored}

    def _layout(self, shard: list[Stored]) -> FileLayout:
        tree = {tensor.name: torch_zip.NewTensor(tensor.name, tensor.dtype, tensor.shape) for tensor in shard}
        return dataclasses.replace(torch_zip.layout(self._path, tree), parts=parts_of(shard))

"""Target for the weights of a Hugging Face folder alone: safetensors and their index, without configuration and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .target import HFTarget


class WeightsTarget(HFTarget):
    """Folder of weights, which transformers takes for a model once a config.json is beside them."""

    @property
    def marker(self) -> str | None:
        """None: there are no small files."""
        return None

    def shown(self) -> Path | None:
        """Return the folder if it has weights that are not to be overwritten; else None."""
        return self.save_dir if self._model_files() and not self._options.overwrite else None

    def assets(self, folder: Path) -> None:
        """Write the index, and take over the notes of the source."""
        self._write_index(folder)
        self._notes = [*self._origin.notes]

    def _small_files(self, tokens: dict[str, Any]) -> dict[str, Any]:
        return {}

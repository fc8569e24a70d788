"""What tells readers that a folder holds a model of a format, so that no target writes another model beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..basics.errors import ConversionError

#: Patterns of names, by format.
HF = (
    "config.json",
    "*.index.json",
    "model*.safetensors",
    "pytorch_model*.bin",
    "consolidated*.safetensors",
)
META = ("consolidated.*.pth",)
RANKS = ("latest_checkpointed_iteration.txt", "mp_rank_*", ".metadata")
MODEL_PT = ("model.pt",)
MINDSPORE = ("param_name_map.json",)


def refuse_others(folder: Path, *others: tuple[str, ...]) -> None:
    """Raise if the folder holds a model of another format, which these patterns find, `overwrite` or not."""
    found = [path.name for patterns in others for pattern in patterns for path in sorted(folder.glob(pattern))]
    if found:
        raise ConversionError(
            f"{folder} holds a model of another format ({found[0]}), which readers could take for this one; save elsewhere"
        )


def refuse_files(folder: Path, paths: Sequence[Path]) -> None:
    """Raise if any of these paths of the folder is there."""
    there = [path.name for path in paths if os.path.lexists(path)]
    if there:
        raise ConversionError(
            f"{folder} already holds files of a model ({', '.join(there)}); save elsewhere or pass --overwrite"
        )

"""Checkpoints as trees of `mp_rank_*` folders, with and without args, for tests of the converters by numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.oracle import by_hand

RANK_FILE = "model_optim_rng.pt"


def tree(hf: Path, folder: Path, *, args: bool = False, **options: Any) -> Path:
    """Write a Hugging Face model by hand as the documented tree: `mp_rank_*` directly in `folder`, without args by default."""
    root = by_hand.convert(hf, folder.parent / f"{folder.name}-root", **options)
    shutil.move(root / "iter_0000001", folder)
    if not args:
        edit(folder, lambda content: {"model": content["model"]})
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]], ranks: str = "mp_rank_*") -> None:
    """Replace what the files of these ranks hold."""
    for path in sorted(folder.glob(f"{ranks}/{RANK_FILE}")):
        torch.save(change(torch.load(path, weights_only=False)), path)


def left_in(folder: Path) -> list[str]:
    """Names of all that is in a folder and below it, hidden or not; empty if there is no folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []

"""Messages between the processes that run a Megatron-LM checkpoint and the one that starts them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..model.spec import ModelSpec
from ..sharding.ranks import Parallel


@dataclass(frozen=True)
class Checkpoint:
    """Description of the checkpoint for each process: its folder, the model's arguments and sizes, and how it is cut.

    `files` has the files of ranks by the name of their folder. `view` is the folder to load a distributed checkpoint from instead
    of its own (see `view.py`), and `content` describes the layout of its keys.
    `ignored` are patterns of names of tensors that the model does not have.
    """

    folder: Path
    args: dict[str, Any]
    spec: ModelSpec
    parallel: Parallel
    files: Mapping[str, Path] = field(default_factory=dict)
    view: Path | None = None
    content: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


class Part(NamedTuple):
    """Logits of one last-stage rank: float32 [B, S, padded vocabulary / TP], its TP rank and the number of the model's copy."""

    tp: int
    copy: int
    logits: npt.NDArray[np.float32]

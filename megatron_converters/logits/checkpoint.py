"""What passes between the processes that run a Megatron-LM checkpoint and the one that starts them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..model.spec import ModelSpec
from ..sharding.ranks import Parallel


@dataclass(frozen=True)
class Checkpoint:
    """What each process is told: the checkpoint's folder, the model's arguments and sizes, and how it is cut.

    `view` is what is loaded of a distributed checkpoint instead of its folder, and `content` how its keys are laid out.
    """

    folder: Path
    args: dict[str, Any]
    spec: ModelSpec
    parallel: Parallel
    view: Path | None = None
    content: dict[str, Any] = field(default_factory=dict)


class Part(NamedTuple):
    """A last-stage rank's float32 [B, S, padded vocabulary / TP], its tensor-parallel number, and which copy it is."""

    tp: int
    copy: int
    logits: npt.NDArray[np.float32]

"""Job of one process in computing a checkpoint's logits: load its part of the model strictly, and run it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ..basics.errors import raise_all
from . import cpu, gpt
from .checkpoint import Checkpoint, Part
from .load import load


def logits(checkpoint: Checkpoint, tokens: npt.NDArray[np.int64]) -> Part | None:
    """This process's part of the logits for tokens [B, S]; None except on the ranks of the last stage.

    Raises `ConversionError`, on every process, with all faults of loading that any of them found.
    """
    parallel = checkpoint.parallel
    cpu.use_threads(parallel)
    rank = cpu.cut(parallel.tp, parallel.pp, parallel.ep, parallel.etp)
    models, faults = load(checkpoint, rank)
    problems = [problem for rank_faults in cpu.gathered(faults) for problem in rank_faults]
    raise_all(f"megatron-core does not load {checkpoint.folder}:", problems)
    out = gpt.run(models, torch.from_numpy(tokens))
    return None if out is None else Part(rank.tp, cpu.replica(), out.numpy())

"""What one process does of a Megatron-LM checkpoint's logits: its own part of the model, strictly loaded, and run."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ..basics.errors import raise_all
from . import cpu, gpt
from .checkpoint import Checkpoint, Part
from .load import load


def logits(checkpoint: Checkpoint, tokens: npt.NDArray[np.int64]) -> Part | None:
    """This process's part of the logits of tokens [B, S]; None on all ranks but those of the last stage.

    Raises `ConversionError`, on every process, with all that any of them could not load.
    """
    parallel = checkpoint.parallel
    cpu.use_threads(parallel)
    rank = cpu.cut(parallel.tp, parallel.pp, parallel.ep, parallel.etp)
    models, faults = load(checkpoint, rank)
    problems = [problem for everyone in cpu.gathered(faults) for problem in everyone]
    raise_all(f"megatron-core does not load {checkpoint.folder}:", problems)
    out = gpt.run(models, torch.from_numpy(tokens))
    return None if out is None else Part(rank.tp, cpu.replica(), out.numpy())

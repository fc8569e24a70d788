"""What one process does of a Megatron-LM checkpoint's logits: its own rank's file, strictly loaded, its part of the model run."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.models.gpt import GPTModel

from ..endpoints.megatron_target import FILE
from ..errors import raise_all
from ..megatron_names import EXTRA_STATE_SUFFIX, LOCAL
from ..storage import torch_zip
from ..storage.tensor import StoredTensor
from . import cpu, gpt
from .local_names import State, with_local_names
from .megatron import Checkpoint, Part


def logits(checkpoint: Checkpoint, tokens: npt.NDArray[np.int64]) -> Part | None:
    """This process's part of the logits of tokens [B, S]; None on all stages but the last.

    Raises `ConversionError`, on every process, with all that any of them could not load.
    """
    parallel = checkpoint.parallel
    cpu.use_threads(parallel)
    rank = cpu.cut(parallel.tp, parallel.pp, parallel.ep, parallel.etp)
    file = checkpoint.folder / parallel.directory(rank) / FILE
    state = with_local_names(_read(file), checkpoint.spec, parallel, rank)
    args = Namespace(**checkpoint.args, padded_vocab_size=_vocabulary_rows(state) * parallel.tp)
    (model,) = gpt.build(args)
    problems = [problem for everyone in cpu.gathered(_load(model, state, file)) for problem in everyone]
    raise_all(f"megatron-core does not load {checkpoint.folder}:", problems)
    out = gpt.run([model], torch.from_numpy(tokens))
    return None if out is None else Part(rank.tp, cpu.replica(), out.numpy())


def _read(file: Path) -> State:
    """The tensors of a rank's file, mapped; nothing of it is run."""
    stored: Mapping[str, Any] = torch_zip.read(file)["model"]
    return {key: _as_torch(value) for key, value in stored.items() if isinstance(value, StoredTensor)}


def _as_torch(data: StoredTensor) -> torch.Tensor:
    return torch.from_numpy(data.array().view(f"i{data.dtype.itemsize}")).view(data.dtype.torch)


def _vocabulary_rows(state: State) -> int:
    """Rows of this rank's share of the vocabulary; on a stage between the first and the last any number will do."""
    ends = (LOCAL["word_embeddings"], LOCAL["output_layer"])
    return next((len(state[name]) for name in ends if name in state), 1)


def _load(model: GPTModel, state: State, file: Path) -> list[str]:
    """Load a state strictly; every missing, unexpected or misshapen key."""
    empty = {key: None for key in model.state_dict() if key.endswith(EXTRA_STATE_SUFFIX)}
    try:
        model.load_state_dict({**state, **empty}, strict=True)
    except (RuntimeError, ValueError) as error:
        return [f"{file}: {error}"]
    return []

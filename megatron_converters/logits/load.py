"""A process's part of a Megatron-LM checkpoint, strictly loaded into the models that it builds for it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from ..formats.megatron.names import EXTRA_STATE_SUFFIX, LOCAL
from ..formats.megatron.rank_files_target import FILE
from ..sharding.ranks import Rank
from ..storage import torch_zip
from ..storage.tensor import StoredTensor
from . import gpt
from .checkpoint import Checkpoint
from .local_names import State, with_local_names

Loaded = tuple[list[GPTModel], list[str]]
"""The models of a rank's stages, and every key that is missing, unexpected or misshapen."""


def load(checkpoint: Checkpoint, rank: Rank) -> Loaded:
    """A rank's models with the checkpoint's weights, or what keeps megatron-core from loading them."""
    return _from_file(checkpoint, rank) if checkpoint.view is None else _from_view(checkpoint, checkpoint.view)


def _from_file(checkpoint: Checkpoint, rank: Rank) -> Loaded:
    """From the rank's own file of the `torch` format."""
    parallel = checkpoint.parallel
    file = checkpoint.folder / parallel.directory(rank) / FILE
    content = torch_zip.read(file)
    states = [
        with_local_names(_tensors(content[entry]), checkpoint.spec, parallel, rank, rank.pp + number * parallel.pp)
        for number, entry in enumerate(parallel.entries)
    ]
    models = gpt.build(Namespace(**checkpoint.args, padded_vocab_size=_vocabulary_rows(states) * parallel.tp))
    faults = [
        f"{file}: {entry}: {fault}"
        for entry, model, state in zip(parallel.entries, models, states, strict=True)
        for fault in _strictly(model, state)
    ]
    return models, faults


def _tensors(stored: Mapping[str, Any]) -> State:
    """The tensors of a model's entry, mapped; nothing of the file is run."""
    return {key: _as_torch(value) for key, value in stored.items() if isinstance(value, StoredTensor)}


def _as_torch(data: StoredTensor) -> torch.Tensor:
    return torch.from_numpy(data.array().view(f"i{data.dtype.itemsize}")).view(data.dtype.torch)


def _vocabulary_rows(states: Sequence[State]) -> int:
    """Rows of this rank's share of the vocabulary; where it has neither the first stage nor the last any number will do."""
    ends = (LOCAL["word_embeddings"], LOCAL["output_layer"])
    return next((len(state[name]) for state in states for name in ends if name in state), 1)


def _strictly(model: GPTModel, state: State) -> Iterator[str]:
    empty = {key: None for key in model.state_dict() if key.endswith(EXTRA_STATE_SUFFIX)}
    try:
        model.load_state_dict({**state, **empty}, strict=True)
    except (RuntimeError, ValueError) as error:
        yield str(error)


def _from_view(checkpoint: Checkpoint, view: Path) -> Loaded:
    """From a distributed checkpoint, as Megatron-LM's `load_checkpoint` does, what is not asked for being a fault as well.

    Objects are not asked for: they are extra states, which hold no part of the model.
    """
    models = gpt.build(Namespace(**checkpoint.args))
    (model,) = models
    said = {**checkpoint.content, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    asked = {
        key: value
        for key, value in model.sharded_state_dict(metadata=said).items()
        if not isinstance(value, ShardedObject)
    }
    if faults := list(_other_keys(asked, dist_checkpointing.load_tensors_metadata(str(view)))):
        return models, faults
    try:
        state = dist_checkpointing.load({"model": asked}, str(view), strict="raise_all")
    except (RuntimeError, ValueError, KeyError, CheckpointingException) as error:
        return models, [str(error)]
    except CheckpointException as error:  # of torch, and no Exception
        return models, [str(cause) for cause, _ in error.failures.values()]
    return models, list(_strictly(model, state["model"]))


def _other_keys(asked: Mapping[str, Any], stored: Iterable[str]) -> Iterator[str]:
    """In what keys a model and a checkpoint differ. megatron-core says so itself, but in the reader's sense of missing."""
    parts = (value.build() if isinstance(value, ShardedTensorFactory) else [value] for value in asked.values())
    wanted, found = {part.key for several in parts for part in several}, set(stored)
    yield from (f"{key} is missing" for key in sorted(wanted - found))
    yield from (f"{key} is there, but no part of the model" for key in sorted(found - wanted))

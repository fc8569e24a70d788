"""Strict loading of one rank's part of a Megatron-LM checkpoint into the models that are built for it."""

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

from ..conversion.left_out import LeftOut
from ..formats.megatron.names import EXTRA_STATE_SUFFIX, LOCAL, name_of
from ..model.slots import DECODER
from ..sharding.ranks import Rank
from ..storage import torch_zip
from ..storage.tensor import StoredTensor
from . import gpt
from .checkpoint import Checkpoint
from .local_names import State, with_local_names

Loaded = tuple[list[GPTModel], list[str]]
"""Models of a rank's stages, and a text for every key that is missing, unexpected or of the wrong shape."""


def load(checkpoint: Checkpoint, rank: Rank) -> Loaded:
    """Models of a rank with the checkpoint's weights, and the faults that kept megatron-core from loading them."""
    return _from_file(checkpoint, rank) if checkpoint.view is None else _from_view(checkpoint, checkpoint.view)


def _from_file(checkpoint: Checkpoint, rank: Rank) -> Loaded:
    """Models loaded from the rank's own file."""
    parallel = checkpoint.parallel
    file = checkpoint.files[parallel.directory(rank)]
    content = torch_zip.read(file)
    stored = content if isinstance(content.get(parallel.entries[0]), Mapping) else {parallel.entries[0]: content}
    tensors = [_tensors(stored[entry], checkpoint.ignored) for entry in parallel.entries]
    states = [
        with_local_names(held, checkpoint.spec, parallel, rank, rank.pp + number * parallel.pp)
        for number, held in enumerate(tensors)
    ]
    args = Namespace(**checkpoint.args, padded_vocab_size=_vocabulary_rows(states) * parallel.tp)
    models = gpt.build(args, cut_down_projections=_cuts_down_projections(states, checkpoint))
    faults = [
        f"{file}: {entry}: {fault}"
        for entry, model, state in zip(parallel.entries, models, states, strict=True)
        for fault in _load_strictly(model, state)
    ]
    return models, faults


def _tensors(stored: Mapping[str, Any], ignored: Sequence[str]) -> State:
    """Tensors of a model's entry, without ignored ones, memory-mapped; no code from the file is run."""
    kept = LeftOut(ignored).kept(stored)
    return {key: _as_torch(value) for key, value in kept.items() if isinstance(value, StoredTensor)}


def _as_torch(data: StoredTensor) -> torch.Tensor:
    return torch.from_numpy(data.array().view(f"i{data.dtype.itemsize}")).view(data.dtype.torch)


def _vocabulary_rows(states: Sequence[State]) -> int:
    """Rows of this rank's share of the vocabulary; 1 if it has neither the first stage nor the last, where any number works."""
    ends = (LOCAL["word_embeddings"], LOCAL["output_layer"])
    return next((len(state[name]) for state in states for name in ends if name in state), 1)


def _cuts_down_projections(states: Sequence[State], checkpoint: Checkpoint) -> bool:
    """Whether a rank holds a part of a down projection of multi-latent attention, as before 0.14; by its first layer."""
    args = checkpoint.args
    name = name_of(LOCAL, "kv_down", checkpoint.spec.kinds[0], DECODER).format(layer=0)
    parts = (len(state[name]) for state in states if name in state)
    return any(rows < args["kv_lora_rank"] + args["qk_pos_emb_head_dim"] for rows in parts)


def _load_strictly(model: GPTModel, state: State) -> Iterator[str]:
    empty = {key: None for key in model.state_dict() if key.endswith(EXTRA_STATE_SUFFIX)}
    try:
        model.load_state_dict({**state, **empty}, strict=True)
    except (RuntimeError, ValueError) as error:
        yield str(error)


def _from_view(checkpoint: Checkpoint, view: Path) -> Loaded:
    """Models loaded from a distributed checkpoint, as by Megatron-LM's `load_checkpoint`; unexpected keys are faults, too.

    Objects are not requested: they are extra states, which hold no part of the model.
    """
    models = gpt.build(Namespace(**checkpoint.args))
    (model,) = models
    metadata = {**checkpoint.content, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    requested = {
        key: value
        for key, value in model.sharded_state_dict(metadata=metadata).items()
        if not isinstance(value, ShardedObject)
    }
    if faults := list(_key_faults(requested, dist_checkpointing.load_tensors_metadata(str(view)))):
        return models, faults
    try:
        state = dist_checkpointing.load({"model": requested}, str(view), strict="raise_all")
    except (RuntimeError, ValueError, KeyError, CheckpointingException) as error:
        return models, [str(error)]
    except CheckpointException as error:  # torch's, not a subclass of Exception
        return models, [str(cause) for cause, _ in error.failures.values()]
    return models, list(_load_strictly(model, state["model"]))


def _key_faults(requested: Mapping[str, Any], stored: Iterable[str]) -> Iterator[str]:
    """Texts for keys that only the model or only the checkpoint has. megatron-core's own message has the two sides swapped."""
    parts = (value.build() if isinstance(value, ShardedTensorFactory) else [value] for value in requested.values())
    wanted, found = {tensor.key for tensors in parts for tensor in tensors}, set(stored)
    yield from (f"{key} is missing" for key in sorted(wanted - found))
    yield from (f"{key} is not part of the model" for key in sorted(found - wanted))

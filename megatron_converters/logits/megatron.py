"""The logits of a Megatron-LM checkpoint, computed by the real megatron-core.

Of the `torch` format in one process for each rank, each with its own file. Of the `torch_dist` format in a single one: its tensors
are whole, so that which ranks there were, or will be, is no part of the checkpoint, and one process needs the least memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..basics.errors import ConversionError
from ..formats.megatron.arguments import expert_args, layout_args, model_args, plain_args
from ..formats.megatron.opening import open_megatron
from ..formats.megatron.rank_files_source import MegatronSource
from ..formats.megatron.reading import MegatronReadOptions, checkpoint_directory
from ..formats.megatron.torch_dist_source import TorchDistSource
from ..model.slots import refs
from ..model.spec import ModelSpec
from ..sharding.ranks import Parallel, locations, parallel_for
from . import buildable_args, view
from .checkpoint import Checkpoint, Part
from .needs import need
from .pool import Pool

#: More processes would wait for each other rather than compute.
_MAX_PROCESSES = 64
#: Copies of a rank compute the same up to the order of additions.
_COPIES_DIFFER = 1e-3
#: The folder in which the processes find a distributed checkpoint.
_VIEW = "view"
_LOCAL_LAYERS = {"transformer_impl": "local", "expert_layout": "sequential"}


class MegatronModel:
    """A checkpoint found readable and expressible; nothing is built yet."""

    def __init__(self, path: Path, options: MegatronReadOptions) -> None:
        """Raises `ConversionError` where the checkpoint is unsound, cut too often, or megatron-core is missing."""
        source = open_megatron(path, options)
        need("torch", "torch")
        need("megatron.core", "megatron-core")
        self.path = path
        self.vocab_size = source.spec.vocab_size
        self.window = source.spec.sliding_window
        recorded = (options.hf_config, options.true_vocab_size, getattr(source.origin.margs, "vocab_size", None))
        self.padding_known = any(value is not None for value in recorded)
        self._source = source
        self._checkpoint = _checkpoint(source, path, checkpoint_directory(path, options.directory_name))
        parallel = self._checkpoint.parallel
        self.processes = parallel.pp * _stage_ranks(parallel)
        if self.processes > _MAX_PROCESSES:
            raise ConversionError(
                f"{path} is cut over {self.processes} ranks; its logits would take as many processes, of which at most "
                f"{_MAX_PROCESSES} are started. Reshard a copy to fewer first (--loader core --saver mcore)"
            )
        self.parameters = _parameters(source.spec, parallel)
        if isinstance(source, TorchDistSource):
            self.parameters += view.in_passing(source)

    def logits(self, tokens: npt.NDArray[np.int64], time_limit: float) -> npt.NDArray[np.float32]:
        """Float32 [B, S, vocabulary] for tokens [B, S], padding left out.

        Raises `ConversionError` where the real model does not load the files, or ranks that hold copies disagree.
        """
        with Pool(self.processes, _join, time_limit) as pool:
            parts = pool.run(_logits, self._told(pool.folder), tokens)
        copies = _joined([part for part in parts if part is not None], self.vocab_size)
        for number in range(1, len(copies)):
            difference = float(np.abs(copies[number] - copies[0]).max())
            if not difference <= _COPIES_DIFFER * float(np.abs(copies[0]).max()):
                raise ConversionError(
                    f"{self.path}: ranks of different experts hold copies of all else, but copy {number} computes logits "
                    f"that differ from the first's by up to {difference:.3g}"
                )
        return copies[0]

    def _told(self, folder: Path) -> Checkpoint:
        """What to tell the processes, which find in `folder` what else they need."""
        if not isinstance(self._source, TorchDistSource):
            return self._checkpoint
        view.write(self._source, folder / _VIEW)
        return dataclasses.replace(self._checkpoint, view=folder / _VIEW)


def _checkpoint(source: MegatronSource | TorchDistSource, path: Path, folder: Path) -> Checkpoint:
    if isinstance(source, MegatronSource):
        return Checkpoint(folder, _arguments(source.spec, source.parallel, path), source.spec, source.parallel)
    whole = parallel_for(source.spec, 1, 1)
    args = {**_arguments(source.spec, whole, path), "padded_vocab_size": source.padded}
    return Checkpoint(folder, args, source.spec, whole, content=plain_args(source.content))


def _joined(parts: Sequence[Part], vocab_size: int) -> dict[int, npt.NDArray[np.float32]]:
    """The logits that each copy of the model computes: shares side by side, without vocabulary padding."""
    by_copy: dict[int, dict[int, npt.NDArray[np.float32]]] = {}
    for part in parts:
        by_copy.setdefault(part.copy, {})[part.tp] = part.logits
    return {
        copy: np.concatenate([shares[tp] for tp in sorted(shares)], axis=-1)[..., :vocab_size]
        for copy, shares in by_copy.items()
    }


def _arguments(spec: ModelSpec, parallel: Parallel, path: Path) -> dict[str, Any]:
    """Megatron-LM's arguments for the model, to be built of local layers, experts one by one."""
    said = {**model_args(spec), **expert_args(spec, parallel, _LOCAL_LAYERS["expert_layout"])}
    buildable_args.check(said, str(path))
    layout = layout_args(parallel, 0, 1, _LOCAL_LAYERS["transformer_impl"])
    del layout["padded_vocab_size"]  # whoever sees the tensors counts it
    return {**layout, **said}


def _stage_ranks(parallel: Parallel) -> int:
    """Processes of one pipeline stage (Megatron-LM core_v0.16.1, `RankGenerator` in core/parallel_state.py)."""
    return math.lcm(parallel.tp, parallel.etp * parallel.ep)


def _parameters(spec: ModelSpec, parallel: Parallel) -> int:
    """Elements that all processes hold together: whatever is no expert as often as the experts are spread,
    and tied embeddings on both ends of the pipeline.
    """
    ranks = _stage_ranks(parallel)
    total = 0
    for ref in refs(spec):
        ways = parallel.etp * parallel.ep if ref.expert is not None else parallel.tp if ref.slot.shard.cuts else 1
        places = sum(1 for _ in locations(ref, spec, parallel))
        total += math.prod(ref.slot.shape(spec)) * places * ranks // ways
    return total


def _join(rank: int, size: int, folder: Path) -> None:
    """In a process: get ready. Imported here, since the process that starts the others never imports torch."""
    from ..basics.handover import receive_own_types
    from .cpu import join

    receive_own_types()
    join(rank, size, folder)


def _logits(checkpoint: Checkpoint, tokens: npt.NDArray[np.int64]) -> Part | None:
    from .rank import logits

    return logits(checkpoint, tokens)

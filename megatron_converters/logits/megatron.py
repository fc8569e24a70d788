"""The logits of a Megatron-LM checkpoint: one process for each rank, each with the real megatron-core and its own file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..endpoints.megatron_common import MegatronReadOptions, checkpoint_directory, is_distributed
from ..endpoints.megatron_source import MegatronSource
from ..errors import ConversionError
from ..megatron_args import expert_args, layout_args, model_args
from ..parallel import Parallel, homes
from ..slots import refs
from ..spec import ModelSpec
from . import arguments
from .needs import need
from .pool import Pool

#: More processes would wait for each other rather than compute.
_MAX_PROCESSES = 64
#: Copies of a rank compute the same up to the order of additions.
_COPIES_DIFFER = 1e-3
_LOCAL_LAYERS = {"transformer_impl": "local", "expert_layout": "sequential"}


@dataclass(frozen=True)
class Checkpoint:
    """What each process is told: the folder of the ranks, the model's arguments and sizes, and how it is cut."""

    folder: Path
    args: dict[str, Any]
    spec: ModelSpec
    parallel: Parallel


class Part(NamedTuple):
    """A last-stage rank's float32 [B, S, padded vocabulary / TP], its tensor-parallel number, and which copy it is."""

    tp: int
    copy: int
    logits: npt.NDArray[np.float32]


class MegatronModel:
    """A checkpoint of the `torch` format, found readable and expressible; nothing is built yet."""

    def __init__(self, path: Path, options: MegatronReadOptions) -> None:
        """Raises `ConversionError` where the checkpoint is unsound, cut too often, or megatron-core is missing."""
        if is_distributed(checkpoint_directory(path, options.directory_name)):
            raise ConversionError(
                f"{path} is of the torch_dist format; its logits are those of a copy in the torch format: convert it first "
                "(--loader core --saver mcore)"
            )
        source = MegatronSource(path, options)
        if source.parallel.vpp > 1:
            raise ConversionError(
                f"{path} has virtual pipeline stages; its logits are those of a copy without: convert it first "
                f"(--loader core --saver mcore --target-pipeline-parallel-size {source.parallel.pp})"
            )
        need("torch", "torch")
        need("megatron.core", "megatron-core")
        self.path = path
        self.vocab_size = source.spec.vocab_size
        self.window = source.spec.sliding_window
        recorded = (options.hf_config, options.true_vocab_size, getattr(source.origin.margs, "vocab_size", None))
        self.padding_known = any(value is not None for value in recorded)
        self._checkpoint = Checkpoint(
            checkpoint_directory(path, options.directory_name),
            _arguments(source.spec, source.parallel, path),
            source.spec,
            source.parallel,
        )
        self.processes = source.parallel.pp * _stage_ranks(source.parallel)
        if self.processes > _MAX_PROCESSES:
            raise ConversionError(
                f"{path} is cut over {self.processes} ranks; its logits would take as many processes, of which at most "
                f"{_MAX_PROCESSES} are started. Reshard a copy to fewer first (--loader core --saver mcore)"
            )
        self.parameters = _parameters(source.spec, source.parallel)

    def logits(self, tokens: npt.NDArray[np.int64], time_limit: float) -> npt.NDArray[np.float32]:
        """Float32 [B, S, vocabulary] for tokens [B, S], padding left out.

        Raises `ConversionError` where the real model does not load the files, or ranks that hold copies disagree.
        """
        with Pool(self.processes, _join, time_limit) as pool:
            parts = pool.run(_logits, self._checkpoint, tokens)
        copies = _joined([part for part in parts if part is not None], self.vocab_size)
        for number in range(1, len(copies)):
            difference = float(np.abs(copies[number] - copies[0]).max())
            if not difference <= _COPIES_DIFFER * float(np.abs(copies[0]).max()):
                raise ConversionError(
                    f"{self.path}: ranks of different experts hold copies of all else, but copy {number} computes logits "
                    f"that differ from the first's by up to {difference:.3g}"
                )
        return copies[0]


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
    arguments.check(said, str(path))
    layout = layout_args(parallel, 0, 1, _LOCAL_LAYERS["transformer_impl"])
    del layout["padded_vocab_size"]  # each process counts it
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
        places = sum(1 for _ in homes(ref, spec, parallel))
        total += math.prod(ref.slot.shape(spec)) * places * ranks // ways
    return total


def _join(rank: int, size: int, folder: Path) -> None:
    """In a process: get ready. Imported here, since the process that starts the others never imports torch."""
    from ..handover import receive_ours
    from .cpu import join

    receive_ours()
    join(rank, size, folder)


def _logits(checkpoint: Checkpoint, tokens: npt.NDArray[np.int64]) -> Part | None:
    from .rank import logits

    return logits(checkpoint, tokens)

"""Logits of a Megatron-LM checkpoint, computed by the real megatron-core.

The `torch` format runs in one process for each rank, each with its own file. The `torch_dist` format runs in a single process:
its tensors are stored whole, independent of the ranks that wrote them, and one process needs the least memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..basics.errors import ConversionError, raise_all
from ..basics.packages import need
from ..formats.megatron.argument import Context, Group
from ..formats.megatron.arguments import inexpressible, model_args, plain_args, written_args
from ..formats.megatron.distributed_folder import TORCH_DIST
from ..formats.megatron.locating import checkpoint_directory
from ..formats.megatron.opening import open_megatron
from ..formats.megatron.options import RAW
from ..formats.megatron.rank_files_source import RankFilesSource
from ..formats.megatron.reading import MegatronReadOptions
from ..formats.megatron.torch_dist_source import TorchDistSource
from ..live import buildable_args
from ..model.slots import refs
from ..model.spec import ModelSpec
from ..sharding.ranks import Parallel, locations, parallel_for
from . import view
from .checkpoint import Checkpoint, Part
from .pool import Pool

#: With more processes, most time would be spent waiting for each other.
_MAX_PROCESSES = 64
#: Largest relative difference between copies of a rank, which differ only by the order of additions.
_COPIES_TOLERANCE = 1e-3
#: Name of the folder from which the processes load a distributed checkpoint.
_VIEW = "view"
_LOCAL = "local"


class MegatronModel:
    """Checkpoint that was checked to be readable and buildable; the model is not built yet."""

    def __init__(self, path: Path, options: MegatronReadOptions) -> None:
        """Raises `ConversionError` if the checkpoint is damaged or has too many ranks, or if megatron-core is missing."""
        source = open_megatron(path, options)
        if source.conventions.mup == RAW:
            raise ConversionError(
                f"{path} leaves its multipliers to MindSpeed-LLM's arguments, which megatron-core does not have; convert it with "
                "--mup fold to compute its logits"
            )
        raise_all(
            f"{path}: megatron-core would compute another model than this:",
            inexpressible(source.conventions.spec, with_own=True),
        )
        need("torch", "torch", "computing logits")
        need("megatron.core", "megatron-core", "computing logits")
        self.path = path
        self.vocab_size = source.spec.vocab_size
        self.window = max(filter(None, source.spec.in_layers("sliding_window")), default=None)
        recorded = (options.hf_config, options.true_vocab_size, getattr(source.origin.margs, "vocab_size", None))
        self.padding_known = any(value is not None for value in recorded)
        self._source = source
        found = _checkpoint(source, path, checkpoint_directory(path, options.directory_name))
        self._checkpoint = dataclasses.replace(found, ignored=options.ignore_tensors)
        parallel = self._checkpoint.parallel
        self.processes = parallel.pp * _stage_ranks(parallel)
        if self.processes > _MAX_PROCESSES:
            raise ConversionError(
                f"{path} is cut over {self.processes} ranks; its logits would take as many processes, of which at most "
                f"{_MAX_PROCESSES} are started. Reshard a copy to fewer first (--loader core --saver mcore)"
            )
        self.parameters = _parameters(source.spec, parallel)
        if isinstance(source, TorchDistSource):
            self.parameters += view.load_overhead(source)

    def logits(self, tokens: npt.NDArray[np.int64], time_limit: float) -> npt.NDArray[np.float32]:
        """Logits, float32 [B, S, vocabulary], for tokens [B, S], without vocabulary padding.

        Raises `ConversionError` if megatron-core cannot load the files, or ranks that hold copies disagree.
        """
        with Pool(self.processes, _setup, time_limit) as pool:
            parts = pool.run(_logits, self._checkpoint_to_load(pool.folder), tokens)
        copies = _concatenate([part for part in parts if part is not None], self.vocab_size)
        for number in range(1, len(copies)):
            difference = float(np.abs(copies[number] - copies[0]).max())
            if not difference <= _COPIES_TOLERANCE * float(np.abs(copies[0]).max()):
                raise ConversionError(
                    f"{self.path}: ranks of different experts hold copies of all else, but copy {number} computes logits "
                    f"that differ from the first's by up to {difference:.3g}"
                )
        return copies[0]

    def _checkpoint_to_load(self, folder: Path) -> Checkpoint:
        """Description of the checkpoint for the processes; for `torch_dist`, writes the view to load into `folder`."""
        if not isinstance(self._source, TorchDistSource):
            return self._checkpoint
        view.write(self._source, folder / _VIEW)
        return dataclasses.replace(self._checkpoint, view=folder / _VIEW)


def _checkpoint(source: RankFilesSource | TorchDistSource, path: Path, folder: Path) -> Checkpoint:
    if isinstance(source, RankFilesSource):
        args = _arguments(source.conventions.spec, source.parallel, path)
        return Checkpoint(folder, args, source.spec, source.parallel, source.files)
    if source.origin.checkpoint_format != TORCH_DIST:
        raise ConversionError(
            f"{folder} is of the format {source.origin.checkpoint_format}, which megatron-core does not load by itself; convert it "
            f"with --ckpt-format {TORCH_DIST}, and compare that"
        )
    whole = parallel_for(source.spec, 1, 1)
    args = {**_arguments(source.conventions.spec, whole, path), "padded_vocab_size": source.padded}
    return Checkpoint(folder, args, source.spec, whole, content=plain_args(source.content))


def _concatenate(parts: Sequence[Part], vocab_size: int) -> dict[int, npt.NDArray[np.float32]]:
    """Logits of each copy of the model: the TP ranks' shares concatenated, without vocabulary padding."""
    by_copy: dict[int, dict[int, npt.NDArray[np.float32]]] = {}
    for part in parts:
        by_copy.setdefault(part.copy, {})[part.tp] = part.logits
    return {
        copy: np.concatenate([shares[tp] for tp in sorted(shares)], axis=-1)[..., :vocab_size]
        for copy, shares in by_copy.items()
    }


def _arguments(spec: ModelSpec, parallel: Parallel, path: Path) -> dict[str, Any]:
    """Megatron-LM's arguments for the model, built from local layers with sequential experts."""
    buildable_args.check(model_args(spec), str(path))
    groups = (Group.MODEL, Group.EXPERTS, Group.LAYOUT, Group.EXPERT_LAYOUT)
    result = written_args(Context(spec, parallel, impl=_LOCAL), groups)
    del result["padded_vocab_size"]  # set by the code that sees the tensors
    return result


def _stage_ranks(parallel: Parallel) -> int:
    """Number of processes of one pipeline stage (Megatron-LM core_v0.16.1, `RankGenerator` in core/parallel_state.py)."""
    return math.lcm(parallel.tp, parallel.etp * parallel.ep)


def _parameters(spec: ModelSpec, parallel: Parallel) -> int:
    """Number of elements that all processes hold together.

    Everything but experts is repeated for each rank of different experts; tied embeddings are on both ends of the pipeline.
    """
    ranks = _stage_ranks(parallel)
    total = 0
    for ref in refs(spec):
        ways = parallel.etp * parallel.ep if ref.expert is not None else parallel.tp if ref.slot.shard.cuts else 1
        places = sum(1 for _ in locations(ref, spec, parallel))
        total += math.prod(ref.shape(spec)) * places * ranks // ways
    return total


def _setup(rank: int, size: int, folder: Path) -> None:
    """Prepare a process of the pool. It imports torch here, since the process that starts the pool never does."""
    from ..basics.handover import receive_own_types
    from .cpu import join

    receive_own_types()
    join(rank, size, folder)


def _logits(checkpoint: Checkpoint, tokens: npt.NDArray[np.int64]) -> Part | None:
    from .rank import logits

    return logits(checkpoint, tokens)

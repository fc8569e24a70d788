"""Detection of what a Megatron-LM checkpoint holds, without trusting that its args say it: parallel sizes, layers, shapes.

Folder names give sizes: `mp_rank_TT`, then `_PPP` for several pipeline stages, then `_EEE` for several expert-parallel ranks. A
name of two numbers is ambiguous; args decide, and without them the tensors: with one stage, every rank has the embeddings.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ...basics.errors import ConversionError, raise_all
from ...basics.folders import existing_folder
from ...storage import dcp
from ...storage.opening import is_name
from ...storage.tensor import StoredTensor
from .distributed_folder import refuse_unreadable
from .locating import (
    MODEL_FILE,
    RANK,
    RANK_FILE,
    checkpoint_directory,
    has_model_file,
    is_distributed,
    listing,
)
from .names import EMBEDDINGS
from .rank_files import read_file
from .reading import args_in

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_MODEL = re.compile(r"model\d*")
#: Name of a model's tensor behind a wrapper's prefix; an optimizer's have it, too, but come with a prefix of their own.
_WRAPPED = re.compile(r"((?!optimizer|chained)(?:\w+\.)*?)(?:decoder\.layers|embedding\.word_embeddings)\.")
#: More ranks than any run has, so that damaged args take no memory.
_MOST_RANKS = 1 << 18
_FINAL_NORM = "decoder.final_layernorm.weight"
_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")

Shape = tuple[int, ...]
T = TypeVar("T")


class Sizes(NamedTuple):
    """Parallel sizes of a checkpoint."""

    tp: int
    pp: int
    ep: int = 1

    def __str__(self) -> str:
        return f"tp={self.tp}, pp={self.pp}" + (f", ep={self.ep}" if self.ep > 1 else "")


class Stage(NamedTuple):
    """Model of one pipeline stage: the shapes of its tensors on the first rank, by key."""

    shapes: Mapping[str, Shape]

    @property
    def layers(self) -> int:
        """Number of its layers; keys count them from 0 in each stage."""
        return len({int(match[1]) for key in self.shapes if (match := _LAYER.fullmatch(key))})


@dataclass(frozen=True)
class Detected:
    """Detection of one iteration's folder.

    `decided_by` says from where its sizes are. `args` are those of the first rank, None without any. `tensors` are those of all
    stages on their first rank, in the order of the stages; a folder of the `torch_dist` format has none. `vocab_rows` are the rows
    of the embeddings on all tensor-parallel ranks, padding included.
    """

    directory: Path
    sizes: Sizes
    decided_by: str
    args: argparse.Namespace | None = None
    stages: tuple[Stage, ...] = ()
    vocab_rows: int = 0
    #: Files of the first stage's first rank and the last stage's, which may both hold the embeddings.
    ends: tuple[Mapping[str, StoredTensor], ...] = field(default=(), repr=False)

    def arg(self, name: str) -> Any:
        """Attribute of the args; None where they lack it, or there are none."""
        return getattr(self.args, name, None)

    @property
    def is_flat(self) -> bool:
        """Whether it is a whole model in one file."""
        return self.decided_by == MODEL_FILE

    @property
    def layers_of_stages(self) -> tuple[int, ...]:
        """Number of layers of each stage."""
        return tuple(stage.layers for stage in self.stages)

    @cached_property
    def num_layers(self) -> int | None:
        """Number of layers over all stages; where no tensors tell, what the args say."""
        return sum(self.layers_of_stages) or self.arg("num_layers")

    @cached_property
    def layers(self) -> tuple[Mapping[str, Shape], ...]:
        """Shapes of each layer's tensors, by key after the layer's number, in the model's order."""
        found = []
        for stage in self.stages:
            numbered: dict[int, dict[str, Shape]] = {}
            for key, shape in stage.shapes.items():
                if match := _LAYER.fullmatch(key):
                    numbered.setdefault(int(match[1]), {})[match[2]] = shape
            found += [numbered[number] for number in sorted(numbered)]
        return tuple(found)

    def shape(self, ending: str) -> Shape | None:
        """Shape on one rank of a tensor that the first layer with one has, by the end of its key."""
        return next((shape for layer in self.layers for key, shape in layer.items() if key.endswith(ending)), None)

    def has(self, ending: str) -> bool:
        """Whether any layer has a tensor whose key ends so."""
        return self.shape(ending) is not None

    @cached_property
    def hidden_size(self) -> int | None:
        """Size of the residual stream."""
        shape = self.stages[0].shapes.get(EMBEDDINGS) if self.stages else None
        return self.arg("hidden_size") if shape is None or len(shape) != 2 else shape[1]

    @cached_property
    def query_rows(self) -> int | None:
        """Rows of all query heads, (heads × size of a head): the columns of the attention's output projection."""
        shape = self.shape("self_attention.linear_proj.weight")
        return None if shape is None or self.is_latent else shape[1] * self.sizes.tp

    @cached_property
    def kv_rows(self) -> int | None:
        """Rows of all key heads, (query groups × size of a head), which are as many as those of values."""
        shape, queries = self.shape("self_attention.linear_qkv.weight"), self.query_rows
        if shape is None or queries is None:
            return None
        return (shape[0] * self.sizes.tp - queries) // 2

    @cached_property
    def head_dim(self) -> int | None:
        """Size of a head, where norms of queries tell."""
        shape = self.shape("self_attention.q_layernorm.weight")
        return None if shape is None or self.is_latent else shape[0]

    @cached_property
    def ffn_hidden_size(self) -> int | None:
        """Size of a dense layer's MLP."""
        shape = self.shape("mlp.linear_fc2.weight")
        return None if shape is None else shape[1] * self.sizes.tp

    @property
    def is_gated(self) -> bool:
        """Whether an MLP has a gate: then its first linear has twice the rows."""
        first, second = (
            self.shape(f"mlp.{name}.weight") or self.shape(f"{name}.weight") for name in ("linear_fc1", "linear_fc2")
        )
        return first is None or second is None or first[0] == 2 * second[1]

    @property
    def is_latent(self) -> bool:
        """Whether attention is multi-latent (MLA)."""
        return any(self.has(f"self_attention.linear_{name}_down_proj.weight") for name in ("kv", "qkv"))

    @property
    def is_moe(self) -> bool:
        """Whether any layer is a mixture of experts."""
        return self.has("mlp.router.weight") or bool(self.arg("num_experts"))

    @property
    def is_blockffn(self) -> bool:
        """Whether any layer is a BlockFFN, whose experts have names of their own."""
        return self.has("mlp.moe_w_in.weight") or self.has("mlp.moe_w_in")


def detect(path: Path, directory_name: str | None = None) -> Detected:
    """Detect what a folder holds: a root with a tracker file, one iteration in either format, or a whole model's `model.pt`.

    Raises `MissingPath` if there is no such folder, and `ConversionError` if it holds no checkpoint or ranks are missing.
    """
    directory = checkpoint_directory(existing_folder(path), directory_name)
    if is_distributed(directory):
        return _distributed(directory)
    return _flat(directory) if has_model_file(directory) else _rank_files(directory)


def _flat(path: Path) -> Detected:
    tensors = _models(read_file(path / MODEL_FILE), path)[0]
    return Detected(path, Sizes(1, 1), MODEL_FILE, None, (_stage(tensors),), _vocab_rows([tensors]), (tensors, tensors))


def _distributed(directory: Path) -> Detected:
    """Detection of the `torch_dist` format, which has whole tensors: sizes of the run that wrote it are in its args alone."""
    refuse_unreadable(directory)
    common = directory / "common.pt"
    args = args_in(read_file(common), common) if common.is_file() else None
    whole = _unwrapped(dcp.read_index(directory).tensors).get(EMBEDDINGS)
    rows = 0 if whole is None else whole.shape[0]
    decided_by = "the format, which has whole tensors" if args is None else "args"
    return Detected(directory, _recorded(args) or Sizes(1, 1), decided_by, args, vocab_rows=rows)


def _rank_files(directory: Path) -> Detected:
    numbers = sorted(_numbers(path.name) for path in listing(directory) if RANK.match(path.name))
    if any(numbers[0]):
        raise ConversionError(f"{directory} has no {_name([0] * len(numbers[0]))}; copy the folder of rank 0")
    columns: dict[int, tuple[int, ...]] = {}
    for rank in numbers:
        columns.setdefault(rank[0], rank)
    needed = [rank for rank in numbers if rank[0] == 0 or rank in columns.values()]
    contents = {rank: read_file(directory / _name(rank) / RANK_FILE) for rank in needed}
    models = {rank: _models(content, directory / _name(rank)) for rank, content in contents.items()}
    args = args_in(contents[numbers[0]], directory)
    sizes, decided_by = _sizes(numbers, args, models)
    _check_complete(directory, numbers, sizes, decided_by)
    heads = [models[rank] for rank in needed if rank[0] == 0 and (sizes.ep == 1 or rank[-1] == 0)]
    stages = [head[entry] for entry in range(len(heads[0])) for head in heads if entry < len(head)]
    rows = _vocab_rows(models[rank][0] for rank in columns.values())
    return Detected(directory, sizes, decided_by, args, tuple(map(_stage, stages)), rows, (stages[0], stages[-1]))


def models_of_rank(directory: Path, rank: tuple[int, ...]) -> list[dict[str, StoredTensor]]:
    """Tensors of the rank whose folder has these numbers: one model, or one for each virtual stage."""
    return _models(read_file(directory / _name(rank) / RANK_FILE), directory / _name(rank))


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(map(int, name.removeprefix("mp_rank_").split("_")))


def _name(rank: Iterable[int]) -> str:
    tp, *others = rank
    return "_".join([f"mp_rank_{tp:02d}", *(f"{number:03d}" for number in others)])


def _models(content: Mapping[str, Any], where: Path) -> list[dict[str, StoredTensor]]:
    """Tensors of a file's models: one, or one for each virtual stage; a flat state dict is itself the model."""
    found = [content[name] for name in content if is_name(name) and _MODEL.fullmatch(name)]
    models = [model for model in found if isinstance(model, Mapping)] or [content]
    tensors = [
        _unwrapped({key: value for key, value in model.items() if isinstance(value, StoredTensor)}) for model in models
    ]
    if not any(tensors):
        raise ConversionError(f"{where}: there is no 'model' entry with tensors; copy the checkpoint again")
    return tensors


def _unwrapped(tensors: Mapping[str, T]) -> dict[str, T]:
    """Tensors without the prefix that wrappers put before their names, and without those that lack it."""
    prefix = next((match[1] for name in tensors if (match := _WRAPPED.match(name))), "")
    return {name.removeprefix(prefix): data for name, data in tensors.items() if name.startswith(prefix)}


def _stage(tensors: Mapping[str, StoredTensor]) -> Stage:
    return Stage({key: data.shape for key, data in tensors.items()})


def _vocab_rows(ranks: Iterable[Mapping[str, StoredTensor]]) -> int:
    """Rows of the embeddings on these ranks together."""
    return sum(tensors[EMBEDDINGS].shape[0] for tensors in ranks if EMBEDDINGS in tensors)


def _recorded(args: argparse.Namespace | None) -> Sizes | None:
    """Parallel sizes of args, if they have them."""
    tp, pp, ep = (getattr(args, name, None) for name in _SIZES)
    experts = (ep if getattr(args, "num_experts", None) else None) or 1
    if not all(type(size) is int and size > 0 for size in (tp, pp, experts)):
        return None
    return Sizes(int(tp or 0), int(pp or 0), experts)


def _sizes(
    numbers: Sequence[tuple[int, ...]],
    args: argparse.Namespace | None,
    models: Mapping[tuple[int, ...], Sequence[Mapping[str, StoredTensor]]],
) -> tuple[Sizes, str]:
    """Parallel sizes, and what decides them."""
    recorded = _recorded(args)
    if recorded is not None:
        return recorded, "args"
    tp, *others = (max(column) + 1 for column in zip(*numbers, strict=False))
    if len(others) != 1:
        return Sizes(tp, *(others or [1])), "folder names"
    held = [found[0] for found in models.values()]
    if others[0] > 1 and all(EMBEDDINGS in tensors and _FINAL_NORM in tensors for tensors in held):
        return Sizes(tp, 1, others[0]), "folder names, and embeddings on every rank, which only experts tell apart"
    return Sizes(tp, others[0]), "folder names, and embeddings on the first rank alone"


def _check_complete(directory: Path, numbers: Sequence[tuple[int, ...]], sizes: Sizes, decided_by: str) -> None:
    """Raise if folders of ranks are missing, or too many. Of expert-parallel ranks not every pair of numbers need occur."""
    counts = [sizes.tp, *(size for size in sizes[1:] if size > 1)]
    if math.prod(counts) > _MOST_RANKS:
        raise ConversionError(f"{directory}: {sizes}, as {decided_by} say, are more ranks than any run has")
    grid = set(itertools.product(*map(range, counts)))
    present = set(numbers)
    columns = [set(column) for column in zip(*numbers, strict=False)]
    if sizes.ep > 1 and columns == [set(range(size)) for size in counts]:
        grid &= present
    problems = [f"{_name(rank)} is missing" for rank in sorted(grid - present)]
    problems += [f"{_name(rank)} is there, but there is no such rank" for rank in sorted(present - grid)]
    raise_all(f"{directory}: the folders do not match {sizes}, as {decided_by} say:", problems)

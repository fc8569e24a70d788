"""MindSpore weights on disk: which form a path has, and the tensors in it.

Nothing is copied or executed: tensors stay mapped, and MindSpore is not needed.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path

from ...basics.casting import values
from ...basics.errors import ConversionError, UsageError, reason_of
from ...basics.folders import existing_path
from .iterations import read_iteration, read_root
from .parts import other_parts, read_parts
from .ranks import read_ranks, siblings_of
from .recognising import (
    CKPT,
    SAFETENSORS,
    holds_weights,
    is_iteration,
    is_one_of_several,
    is_root,
    rank_folders,
    weights_in,
)
from .tensors import Slice, Tensor, WeightFiles
from .weight_file import read_file

__all__ = ["Slice", "Tensor", "WeightFiles", "read_weight_files"]

#: Which slot of the stacked weights each expert has; identity unless experts were relocated (mindformers 1.9.0 and later).
_EXPERT_ORDER, _ORDER_GROUP = "expert_mapping", "expert order"
_MOST_EXPERTS = 1 << 16


def read_weight_files(path: Path, strategy: Path | None = None) -> WeightFiles:
    """Find and read the weights of a file or folder; `strategy` is a file or folder that joins the slices of ranks.

    Raises `ConversionError` if anything is missing, damaged or contradicts itself.
    """
    path = existing_path(path)
    strategy = existing_path(strategy) if strategy is not None else None
    try:
        found = _one_file(path) if path.is_file() else _folder(path, strategy)
    except OSError as error:
        raise ConversionError(f"cannot look at {error.filename or path}: {reason_of(error)}") from error
    return _without_expert_order(found)


def _one_file(path: Path) -> WeightFiles:
    if path.suffix not in (SAFETENSORS, CKPT):
        raise UsageError(f"{path} is not a {SAFETENSORS} or {CKPT} file; give one, or a folder of them")
    if is_one_of_several(path) or other_parts(path):
        raise UsageError(f"{path} is one of several files that belong together; give their folder, {path.parent}")
    _check_not_one_of_several_ranks(path.parent)
    content = read_file(path)
    form = CKPT if path.suffix == CKPT else "one file"
    return WeightFiles(path.parent, content.weights, Counter(content.others.values()), (path,), form)


def _check_not_one_of_several_ranks(folder: Path) -> None:
    together = siblings_of(folder)
    if together is not None:
        raise UsageError(f"{folder} holds what one of several ranks had; give the folder of all, {together}")


def _folder(path: Path, strategy: Path | None) -> WeightFiles:
    if is_root(path):
        return read_root(path)
    if is_iteration(path):
        return read_iteration(path)
    if rank_folders(path):
        return read_ranks(path, strategy)
    _check_not_one_of_several_ranks(path)
    files = weights_in(path)
    if len({file.suffix for file in files}) > 1:
        raise UsageError(f"{path} holds both {SAFETENSORS} and {CKPT} files; give one of them, or a folder of one kind")
    if not files:
        inner = ", ".join(sorted(entry.name for entry in path.iterdir() if entry.is_dir() and holds_weights(entry)))
        raise UsageError(
            f"{path} holds no weights of MindSpore{f'; give one of its folders: {inner}' if inner else ''}"
        )
    return read_parts(path, files)


def _without_expert_order(found: WeightFiles) -> WeightFiles:
    """Weights without the orders of experts, each of which must be the identity."""
    orders = [name for name in found.tensors if name.rpartition(".")[2] == _EXPERT_ORDER]
    moved = [name for name in orders if not _is_identity(found.tensors[name])]
    if moved:
        raise ConversionError(
            f"{found.root}: {moved[0]} is not the identity: experts were relocated between devices, so that their slots are not "
            "in the router's order; save the checkpoint again without enable_expert_relocation"
        )
    kept = {name: tensor for name, tensor in found.tensors.items() if name not in {*orders}}
    dropped = {**found.dropped, **({_ORDER_GROUP: len(orders)} if orders else {})}
    return dataclasses.replace(found, tensors=kept, dropped=dropped)


def _is_identity(order: Tensor) -> bool:
    if len(order.shape) != 1 or math.prod(order.shape) > _MOST_EXPERTS:
        return False
    return all(
        value == offset[0] + index
        for data, offset in (*order.slices, *order.copies)
        for index, value in enumerate(values(data.array(), data.dtype).tolist())
    )

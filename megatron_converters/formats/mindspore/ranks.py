"""Folders of ranks, rank_0, rank_1 and so on, each with the slices that this rank held, and the strategy that joins them.

Source: mindformers 1.6.0 to 2.1.0, core/callback/callback.py (names of files), and mindspore 2.8.0,
parallel/transform_safetensors.py and parallel/checkpoint_transform.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ...basics.errors import ConversionError, one_line
from .recognising import CKPT, RANK, SAFETENSORS, is_strategy, rank_folders, weights_in
from .strategy import Layout, Stage
from .strategy import read as read_strategy
from .tensors import Placed, Tensor, WeightFiles, assembled
from .weight_file import FileContent, read_file

#: End of a file's name: epoch and step within it.
_STEP = re.compile(r"-([0-9]{1,18})_([0-9]{1,18})$")
#: Folders that may hold the strategy, from the folder of the ranks.
_STRATEGY_FOLDERS = (".", "strategy", "../strategy", "../merged_strategy", "..")
_WAY = "merge the ranks with mindspore.unified_safetensors, or give the run's strategy files (ckpt_strategy*.ckpt)"


def siblings_of(folder: Path) -> Path | None:
    """Folder to read instead of one rank's, which may hold slices only; None if the folder is no rank's, or the only one."""
    if RANK.fullmatch(folder.resolve().name) is None:
        return None
    parent = folder.resolve().parent
    return parent if len(rank_folders(parent)) > 1 or _strategy_files(parent, None) else None


def read_ranks(folder: Path, strategy: Path | None) -> WeightFiles:
    """Read the folders of all ranks; slices are joined as the strategy says, and a single rank needs none."""
    files, notes = _chosen(folder)
    contents = {rank: read_file(path) for rank, path in files.items()}
    others = {name: group for content in contents.values() for name, group in content.others.items()}
    found = _strategy_files(folder, strategy)
    if found:
        tensors = _joined(folder, contents, read_strategy(found))
    elif contents.keys() == {0}:
        tensors = dict(next(iter(contents.values())).weights)
    else:
        held = f"{len(contents)} ranks" if len(contents) > 1 else f"rank {next(iter(contents))} alone"
        raise ConversionError(f"{folder} holds slices of {held} without a strategy that joins them; {_WAY}")
    return WeightFiles(folder, tensors, Counter(others.values()), (*files.values(), *found), "ranks", notes)


def _strategy_files(folder: Path, given: Path | None) -> list[Path]:
    if given is not None:
        return [given] if given.is_file() else sorted(path for path in given.iterdir() if is_strategy(path))
    for place in (folder.resolve() / name for name in _STRATEGY_FOLDERS):
        found = sorted(path for path in place.iterdir() if is_strategy(path)) if place.is_dir() else []
        if found:
            return found
    return []


def _chosen(folder: Path) -> tuple[dict[int, Path], tuple[str, ...]]:
    """File of each rank at the last step that all of them hold, and a note if there are several steps."""
    by_rank = {rank: _by_step(weights_in(path)) for rank, path in rank_folders(folder).items()}
    by_rank = {rank: files for rank, files in by_rank.items() if files}
    if not by_rank:
        raise ConversionError(f"{folder} has folders of ranks, but no {SAFETENSORS} or {CKPT} files in them")
    steps = set.intersection(*(set(files) for files in by_rank.values()))
    if not steps:
        raise ConversionError(f"{folder}: no step is saved by all of its {len(by_rank)} ranks; copy the missing files")
    last = max(steps)
    several = {step for files in by_rank.values() for step in files}
    notes = [f"of {len(several)} saved steps the last that all ranks hold is read, {last[0]}_{last[1]}"]
    return {rank: files[last] for rank, files in by_rank.items()}, tuple(notes if len(several) > 1 else ())


def _by_step(files: list[Path]) -> dict[tuple[int, int], Path]:
    """Files of a rank by epoch and step, (0, 0) where the name states none."""
    found: dict[tuple[int, int], Path] = {}
    for path in files:
        match = _STEP.search(path.stem)
        step = (int(match[1]), int(match[2])) if match else (0, 0)
        if step in found:
            raise ConversionError(
                f"{path.parent} holds both {found[step].name} and {path.name}; leave the files of one run there"
            )
        found[step] = path
    return found


def _joined(folder: Path, contents: Mapping[int, FileContent], stages: Mapping[int, Stage]) -> dict[str, Tensor]:
    """Tensors of all stages; a tensor of several stages, such as a tied embedding, is the first one's, with copies."""
    size = next(iter(next(iter(stages.values())).values())).ranks
    known = {name for stage in stages.values() for name in stage}
    if not any(name in known for content in contents.values() for name in content.weights):
        raise ConversionError(f"the strategy files of {folder} name none of its tensors; give those of the same run")
    absent = sorted(stages.keys() - {rank // size for rank in contents})
    if absent:
        raise ConversionError(
            f"{folder} has no rank of pipeline stage {absent[0]}, ranks {absent[0] * size} and on; copy them, too"
        )
    parts: dict[str, dict[int, list[Placed]]] = {}
    for rank, content in contents.items():
        stage, local_rank = divmod(rank, size)
        if stage not in stages:
            raise ConversionError(
                f"{folder}: rank {rank} is of pipeline stage {stage}, of which no strategy file was found; {_WAY}"
            )
        for name, tensor in content.weights.items():
            placed = _placed(f"{folder}: {name}", tensor, stages[stage].get(name), local_rank)
            parts.setdefault(name, {}).setdefault(stage, []).append(placed)
    return {
        name: _of_stages(
            f"{folder}: {name}",
            [_of_ranks(f"{folder}: {name}", stages[stage].get(name), found) for stage, found in by_stage.items()],
        )
        for name, by_stage in parts.items()
    }


def _placed(where: str, tensor: Tensor, layout: Layout | None, rank: int) -> Placed:
    if layout is None:  # every rank of the stage holds all of it
        return Placed(tensor, (0,) * len(tensor.shape))
    if len(layout.axes) != len(tensor.shape):
        raise ConversionError(f"{where} has the shape {tensor.shape}, but its strategy cuts {len(layout.axes)} axes")
    return Placed(tensor, tuple(index * size for index, size in zip(layout.place(rank), tensor.shape, strict=True)))


def _of_ranks(where: str, layout: Layout | None, parts: list[Placed]) -> Tensor:
    local = parts[0].tensor.shape
    cuts = layout.cuts() if layout else (1,) * len(local)
    return assembled(where, tuple(size * count for size, count in zip(local, cuts, strict=True)), parts)


def _of_stages(where: str, tensors: list[Tensor]) -> Tensor:
    first, *rest = tensors
    for other in rest:
        if (other.shape, other.dtype) != (first.shape, first.dtype):
            raise ConversionError(
                f"{where} is {first.dtype} {one_line(first.shape)} in one pipeline stage, "
                f"{other.dtype} {one_line(other.shape)} in another"
            )
    copies = [item for other in rest for item in (*other.slices, *other.copies)]
    return first._replace(copies=(*first.copies, *copies))

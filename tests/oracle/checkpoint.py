"""Megatron-LM's legacy checkpoint folder: its names, and a safe reading of its files."""

from __future__ import annotations

import pickle
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import OracleError

_TRACKER = "latest_checkpointed_iteration.txt"
_RANK_NAME = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")


def iteration_directory(root: Path) -> Path:
    """The folder that the tracker file names: `iter_%07d` or `release`."""
    text = (root / _TRACKER).read_text().strip()
    return root / (text if text == "release" else f"iter_{int(text):07d}")


def write_tracker(root: Path, iteration: int) -> None:
    """Name `iteration` as the latest, without a newline, as Megatron-LM does."""
    (root / _TRACKER).write_text(str(iteration))


def rank_file(directory: Path, tp_rank: int, pp_rank: int, pp_size: int) -> Path:
    """A rank's file in an iteration's folder (Megatron-LM `get_checkpoint_name`, without expert parallelism)."""
    stage = f"_{pp_rank:03d}" if pp_size > 1 else ""
    return directory / f"mp_rank_{tp_rank:02d}{stage}" / "model_optim_rng.pt"


def parallel_sizes(directory: Path) -> tuple[int, int]:
    """Tensor- and pipeline-parallel size by the folder's names, which must be exactly one full grid."""
    names = {path.name for path in directory.iterdir() if path.is_dir()}
    found = [match for match in map(_RANK_NAME.fullmatch, names) if match]
    tp_size = 1 + max((int(match[1]) for match in found), default=-1)
    pp_size = 1 + max((int(match[2] or 0) for match in found), default=-1)
    grid = {rank_file(directory, tp, pp, pp_size).parent.name for tp in range(tp_size) for pp in range(pp_size)}
    if not names or names != grid:
        raise OracleError(f"{directory}: folders {sorted(names)} are not a full grid of ranks {sorted(grid)}")
    return tp_size, pp_size


def load_rank(path: Path, more_globals: Sequence[Any] = ()) -> dict[str, Any]:
    """A rank's dict, read as Megatron-LM (0.14 and later) does: weights only, Namespace and `more_globals` allowed."""
    try:
        with torch.serialization.safe_globals([Namespace, *more_globals]):
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise OracleError(f"{path}: {error}") from error
    return content


def check_rank(content: dict[str, Any], path: Path, tp_size: int, pp_size: int) -> list[str]:
    """What is wrong with a rank's dict apart from its model; sizes are those of the folder names."""
    problems = [
        f"{path}: no {key!r}" for key in ("args", "checkpoint_version", "iteration", "model") if key not in content
    ]
    if problems:
        return problems
    args, folder = content["args"], path.parent.parent.name
    if not isinstance(args, Namespace):
        return [f"{path}: args is a {type(args).__name__}, not an argparse.Namespace"]
    expected = {
        "checkpoint_version": (content["checkpoint_version"], 3.0),
        "args.tensor_model_parallel_size": (getattr(args, "tensor_model_parallel_size", None), tp_size),
        "args.pipeline_model_parallel_size": (getattr(args, "pipeline_model_parallel_size", None), pp_size),
        "args.norm_epsilon": (getattr(args, "norm_epsilon", None), getattr(args, "layernorm_epsilon", None)),
    }
    if folder != "release":
        expected["iteration"] = (content["iteration"], int(folder.removeprefix("iter_")))
    problems = [
        f"{path}: {name} is {value!r}, not {wanted!r}" for name, (value, wanted) in expected.items() if value != wanted
    ]
    return problems + _dtype_problems(content["model"], getattr(args, "params_dtype", None), path)


def _dtype_problems(model: dict[str, Any], params_dtype: torch.dtype | None, path: Path) -> list[str]:
    return [
        f"{path}: {key} is {value.dtype} but args.params_dtype is {params_dtype}"
        for key, value in model.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != params_dtype
    ]

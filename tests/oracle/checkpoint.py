"""Megatron-LM's legacy checkpoint folder: its names, and safe reading of its files."""

from __future__ import annotations

import math
import pickle
import types
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from .errors import OracleError

T = TypeVar("T")
_TRACKER = "latest_checkpointed_iteration.txt"
_FILE = "model_optim_rng.pt"


class Rank(NamedTuple):
    """Position of a process along each axis of a `Grid`."""

    tp: int = 0
    pp: int = 0
    ep: int = 0
    etp: int = 0


class Grid(NamedTuple):
    """Parallel sizes of a model: tensor, pipeline, expert, and tensor parallel inside the experts."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    @classmethod
    def of(cls, args: Namespace) -> Grid:
        """Sizes in `args`; a model without experts has ETP equal to TP, whatever its args contain."""
        try:
            tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
            experts, etp = getattr(args, "num_experts", None), getattr(args, "expert_tensor_parallel_size", None)
            ep = args.expert_model_parallel_size if experts else 1
        except AttributeError as error:
            raise OracleError(f"args lack {error.name}") from error
        return cls(tp, pp, ep, (experts and etp) or tp)

    def ranks(self) -> Iterator[Rank]:
        """Ranks of one replica, each with a file of its own; where ETP is not TP, these are not all combinations."""
        for stage in range(self.pp):
            for rank in range(math.lcm(self.tp, self.ep * self.etp)):
                yield Rank(rank % self.tp, stage, rank // self.etp % self.ep, rank % self.etp)


def iteration_directory(root: Path) -> Path:
    """Folder that the tracker file names: `iter_%07d` or `release`."""
    text = (root / _TRACKER).read_text().strip()
    return root / (text if text == "release" else f"iter_{int(text):07d}")


def write_tracker(root: Path, iteration: int) -> None:
    """Write `iteration` as the latest, without a newline, as Megatron-LM does."""
    (root / _TRACKER).write_text(str(iteration))


def rank_file(directory: Path, grid: Grid, rank: Rank) -> Path:
    """Path of a rank's file in an iteration's folder (Megatron-LM `get_checkpoint_name`, which ignores ETP)."""
    stage = f"_{rank.pp:03d}" if grid.pp > 1 else ""
    experts = f"_{rank.ep:03d}" if grid.ep > 1 else ""
    return directory / f"mp_rank_{rank.tp:02d}{stage}{experts}" / _FILE


def check_grid(grid: Grid) -> None:
    """Raise `OracleError` for sizes with which ranks that hold different parts of experts would share a file name."""
    names = [rank_file(Path(), grid, rank) for rank in grid.ranks()]
    if len(names) > len(set(names)):
        raise OracleError(
            f"{grid}: ranks of the experts' tensor parallelism share a file in Megatron-LM's legacy format"
        )


def read_grid(directory: Path, more_globals: Sequence[Any] = ()) -> Grid:
    """Parallel sizes from the args of the first file; the folders must be exactly those of the ranks of these sizes.

    Names alone are ambiguous: `mp_rank_00_001` is a pipeline stage or an expert-parallel rank.
    """
    names = sorted(path.name for path in directory.iterdir() if path.is_dir() and path.name != "hf_files")
    if not names:
        raise OracleError(f"{directory}: no folder of a rank")
    first = directory / names[0] / _FILE
    args = load_rank(first, more_globals).get("args")
    if not isinstance(args, Namespace):
        raise OracleError(f"{first}: args is a {type(args).__name__}, not an argparse.Namespace")
    grid = Grid.of(args)
    check_grid(grid)
    expected = sorted(rank_file(directory, grid, rank).parent.name for rank in grid.ranks())
    if names != expected:
        raise OracleError(f"{directory}: folders {names} are not a full grid {grid} of ranks {expected}")
    return grid


def load_rank(path: Path, more_globals: Sequence[Any] = ()) -> dict[str, Any]:
    """Content of a rank's file, read as by Megatron-LM 0.14 and later: weights only, plus Namespace and `more_globals`."""
    try:
        with torch.serialization.safe_globals([Namespace, *more_globals]):
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise OracleError(f"{path}: {error}") from error
    return content


class _NoneForEverything(type):
    def __getattr__(cls, name: str) -> None:
        return None

    def __call__(cls, *_: Any) -> None:
        return None


class _EnumReplacement(metaclass=_NoneForEverything):
    """Replacement of an enum that gives None, whether a pickle calls it with a value or, with Python 3.11.2, looks up a name."""


def load_trusted(path: Path) -> dict[str, Any]:
    """Content of a rank's file that Megatron-LM itself wrote, read without megatron: its enums become None."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return _EnumReplacement if module.startswith("megatron") else super().find_class(module, name)

    module = types.SimpleNamespace(Unpickler=Unpickler, load=pickle.load, __name__="pickle")
    content: dict[str, Any] = torch.load(path, weights_only=False, pickle_module=module)
    return content


def named_models(models: Sequence[T]) -> dict[str, T]:
    """Models of a rank under their names in its file; there are several with virtual pipeline stages."""
    return {"model" if len(models) == 1 else f"model{number}": model for number, model in enumerate(models)}


def check_rank(content: dict[str, Any], path: Path, grid: Grid) -> list[str]:
    """Problems with a rank's file, apart from its tensors' values; `grid` is that of the folder."""
    problems = [f"{path}: no {key!r}" for key in ("args", "checkpoint_version", "iteration") if key not in content]
    if not any(key.startswith("model") for key in content):
        problems.append(f"{path}: no 'model'")
    if problems:
        return problems
    args, folder = content["args"], path.parent.parent.name
    if not isinstance(args, Namespace):
        return [f"{path}: args is a {type(args).__name__}, not an argparse.Namespace"]
    expected = {
        "checkpoint_version": (content["checkpoint_version"], 3.0),
        "args.tensor_model_parallel_size": (getattr(args, "tensor_model_parallel_size", None), grid.tp),
        "args.pipeline_model_parallel_size": (getattr(args, "pipeline_model_parallel_size", None), grid.pp),
        "args.expert_model_parallel_size": (getattr(args, "expert_model_parallel_size", 1), grid.ep),
        "args.norm_epsilon": (getattr(args, "norm_epsilon", None), getattr(args, "layernorm_epsilon", None)),
    }
    if folder != "release":
        expected["iteration"] = (content["iteration"], int(folder.removeprefix("iter_")))
    problems = [
        f"{path}: {name} is {value!r}, not {wanted!r}" for name, (value, wanted) in expected.items() if value != wanted
    ]
    models = [value for key, value in content.items() if key.startswith("model")]
    dtype = getattr(args, "params_dtype", None)
    return problems + [problem for model in models for problem in _dtype_problems(model, dtype, path)]


def stored_dtype(key: str, params_dtype: torch.dtype) -> torch.dtype:
    """Dtype of `key` in a model of `params_dtype`: Megatron-LM keeps the router's expert bias in float32."""
    return torch.float32 if key.endswith(".router.expert_bias") else params_dtype


def _dtype_problems(model: dict[str, Any], params_dtype: Any, path: Path) -> list[str]:
    return [
        f"{path}: {key} is {value.dtype} but args.params_dtype is {params_dtype}"
        for key, value in model.items()
        if isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.dtype != stored_dtype(key, params_dtype)
    ]

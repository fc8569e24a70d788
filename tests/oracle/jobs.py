"""What each process of the pool does with a checkpoint. megatron is imported inside: the tests' process never does."""

from __future__ import annotations

import copy
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import checkpoint
from .errors import OracleError

Shard = tuple[int, torch.Tensor] | None
"""A tensor-parallel rank and its part of the logits; None where another rank already gives it."""

_GRIDS: dict[tuple[int, int], dict[str, Any]] = {}
_RANKS_OWN = {"rank", "local_rank"}  # arguments that rightly differ between the files of a checkpoint


def read_logits(root: Path, tokens: torch.Tensor, impl: str | None, by_megatron: bool) -> Shard:
    """Load this rank's file into the model that its args describe, and run it."""
    from . import megatron

    directory = checkpoint.iteration_directory(root)
    tp_size, pp_size = checkpoint.parallel_sizes(directory)
    tp_rank, pp_rank = _parallel(tp_size, pp_size)
    path = checkpoint.rank_file(directory, tp_rank, pp_rank, pp_size)
    content: dict[str, Any] = {}
    try:
        content = checkpoint.load_rank(path, _megatron_globals() if by_megatron else ())
        problems = checkpoint.check_rank(content, path, tp_size, pp_size)
    except OracleError as error:
        problems = [str(error)]
    _agree(problems)
    _agree(_different_args(content["args"]))
    model = megatron.build(content["args"], impl)
    problem = megatron.load(model, content["model"], str(path))
    _agree([problem] if problem else [])
    return _shard(megatron.logits(model, tokens))


def write_and_run(root: Path, args: Namespace, seed: int, iteration: int, tokens: torch.Tensor) -> Shard:
    """Build random modules, save them as Megatron-LM's `save_checkpoint` does, and run them."""
    from megatron.core import parallel_state

    from . import megatron

    pp_size = args.pipeline_model_parallel_size
    tp_rank, pp_rank = _parallel(args.tensor_model_parallel_size, pp_size)
    model = megatron.build(args)
    megatron.randomise(model, seed, args.params_dtype)
    if parallel_state.get_data_parallel_rank() == 0:
        path = checkpoint.rank_file(root / f"iter_{iteration:07d}", tp_rank, pp_rank, pp_size)
        path.parent.mkdir(parents=True)
        torch.save(_rank_content(model, args, iteration), path)
    dist.barrier()
    if dist.get_rank() == 0:
        checkpoint.write_tracker(root, iteration)
    return _shard(megatron.logits(model, tokens))


def _rank_content(model: torch.nn.Module, args: Namespace, iteration: int) -> dict[str, Any]:
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    args = copy.copy(args)
    args.rank, args.iteration = dist.get_rank(), iteration
    args.attention_backend, args.model_type = AttnBackend.auto, ModelType.encoder_or_decoder
    state = model.state_dict()
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            state[key] = value.to(args.params_dtype)
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "model": state,
        "num_floating_point_operations_so_far": 0,
    }


def _parallel(tp_size: int, pp_size: int) -> tuple[int, int]:
    """Cut the pool's processes into this grid; this process's tensor- and pipeline-parallel rank.

    megatron keeps its groups in module variables. They are kept per grid and put back: groups made anew for each job
    would be threads and sockets that nothing frees.
    """
    from megatron.core import parallel_state

    if dist.get_world_size() % (tp_size * pp_size):
        raise OracleError(f"TP {tp_size} x PP {pp_size} does not fit {dist.get_world_size()} processes")
    if (tp_size, pp_size) not in _GRIDS:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tp_size, pp_size, create_gloo_process_groups=False)
        state = {name: value for name, value in vars(parallel_state).items() if re.fullmatch("_[A-Z_]+", name)}
        _GRIDS[tp_size, pp_size] = state
    vars(parallel_state).update(_GRIDS[tp_size, pp_size])
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()


def _shard(logits: torch.Tensor | None) -> Shard:
    from megatron.core import parallel_state

    if logits is None or parallel_state.get_data_parallel_rank():
        return None
    return parallel_state.get_tensor_model_parallel_rank(), logits.clone()


def _megatron_globals() -> list[Any]:
    """The classes that Megatron-LM itself allows in a checkpoint."""
    from megatron.core.safe_globals import SAFE_GLOBALS

    return list(SAFE_GLOBALS)


def _different_args(args: Namespace) -> list[str]:
    everyone = _gather({name: value for name, value in vars(args).items() if name not in _RANKS_OWN})
    names = {name for each in everyone for name in each if each.get(name) != everyone[0].get(name)}
    return [f"args differ between ranks: {', '.join(sorted(names))}"] if names else []


def _agree(problems: Sequence[str]) -> None:
    """Raise on every rank what any rank found, so that none is left waiting for another."""
    found = dict.fromkeys(problem for rank in _gather(list(problems)) for problem in rank)
    if found:
        raise OracleError("\n".join(found))


def _gather(mine: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone

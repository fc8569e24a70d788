"""Jobs of the pool's processes. Each job imports megatron itself, since the process of the tests never does."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_converters.logits import cpu

from . import checkpoint
from .args import ENUMS_LOAD
from .checkpoint import Grid, Rank
from .errors import OracleError

Shard = tuple[int, torch.Tensor] | None
"""Tensor-parallel rank and its part of the logits; None if another rank already returns it."""

_RANK_ARGUMENTS = {"rank", "local_rank"}  # arguments that may differ between the files of a checkpoint


def read_logits(
    directory: Path,
    tokens: torch.Tensor,
    wanted: dict[str, int],
    impl: str | None,
    by_megatron: bool,
    rotary_divisors: Sequence[float],
) -> Shard:
    """Load this rank's file into the model that its args describe, and run it."""
    from megatron_converters.logits import gpt

    from . import megatron

    allowed = _megatron_globals() if by_megatron else ()
    grid = checkpoint.read_grid(directory, allowed)
    if grid != grid._replace(**wanted):
        raise OracleError(f"{directory} holds {grid}, not {wanted}")
    own_rank = _parallel(grid)
    path = checkpoint.rank_file(directory, grid, own_rank)
    content: dict[str, Any] = {}
    try:
        content = checkpoint.load_rank(path, allowed)
        problems = checkpoint.check_rank(content, path, grid)
    except OracleError as error:
        problems = [str(error)]
    _raise_on_all_ranks(problems)
    _raise_on_all_ranks(_different_args(content["args"]))
    models = megatron.build(content["args"], impl)
    megatron.divide_frequencies(models, rotary_divisors)
    named = checkpoint.named_models(models)
    _raise_on_all_ranks([f"{path}: no {name!r}" for name in named if name not in content])
    faults = [megatron.load(model, content[name], f"{path}: {name}") for name, model in named.items()]
    _raise_on_all_ranks([fault for fault in faults if fault])
    _raise_on_all_ranks(_different_copies(megatron.fingerprints(models)))
    return shard(gpt.run(models, tokens))


def write_and_run(root: Path, args: Namespace, seed: int, iteration: int, tokens: torch.Tensor) -> Shard:
    """Build random modules, save them as Megatron-LM's `save_checkpoint` does, and run them."""
    from megatron_converters.logits import gpt

    from . import megatron

    grid = Grid.of(args)
    checkpoint.check_grid(grid)
    own_rank = _parallel(grid)
    models = megatron.build(args)
    megatron.randomise(models, seed, args.params_dtype)
    path = checkpoint.rank_file(root / f"iter_{iteration:07d}", grid, own_rank)
    if cpu.gathered(path).index(path) == dist.get_rank():  # the first of the ranks that hold the same part
        path.parent.mkdir(parents=True)
        torch.save(_rank_content(models, args, iteration), path)
    dist.barrier()
    if dist.get_rank() == 0:
        checkpoint.write_tracker(root, iteration)
    return shard(gpt.run(models, tokens))


def write_distributed(
    root: Path, args: Namespace, seed: int, iteration: int, tokens: torch.Tensor, metadata: dict[str, Any]
) -> Shard:
    """Same as `write_and_run` with `--ckpt-format torch_dist` and optimizer entries."""
    from megatron_converters.logits import gpt

    from . import distributed, megatron

    _parallel(Grid.of(args))
    models = megatron.build(args)
    megatron.randomise(models, seed, args.params_dtype)
    args = copy.copy(args)
    args.iteration = iteration
    distributed.save(models, root / f"iter_{iteration:07d}", args, metadata)
    if dist.get_rank() == 0:
        checkpoint.write_tracker(root, iteration)
    return shard(gpt.run(models, tokens))


def read_distributed(
    directory: Path, tokens: torch.Tensor, sizes: dict[str, int], impl: str | None, rotary_divisors: Sequence[float]
) -> Shard:
    """Load a `torch_dist` checkpoint into the model that its args describe, at other sizes, and run it."""
    from megatron_converters.logits import gpt

    from . import distributed, megatron

    args = distributed.args_of(directory, sizes)
    _parallel(Grid.of(args))
    models = megatron.build(args, impl)
    megatron.divide_frequencies(models, rotary_divisors)
    problem = distributed.load(models, directory)
    _raise_on_all_ranks([problem] if problem else [])
    _raise_on_all_ranks(_different_copies(megatron.fingerprints(models)))
    return shard(gpt.run(models, tokens))


def gradients(directory: Path, tokens: torch.Tensor, vocabulary: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """This rank's gradients, by parameter, of the sum of all squared logits; for a checkpoint of one pipeline stage."""
    from megatron.core import parallel_state

    from megatron_converters.live.on_cpu import cuda_is_cpu

    from . import megatron

    grid = checkpoint.read_grid(directory)
    content = checkpoint.load_rank(checkpoint.rank_file(directory, grid, _parallel(grid)))
    (model,) = megatron.build(content["args"])
    fault = megatron.load(model, content["model"], str(directory))
    _raise_on_all_ranks([fault] if fault else [])
    with cuda_is_cpu():
        logits = model(tokens, torch.arange(tokens.shape[1]).expand(*tokens.shape), attention_mask=None)
    first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
    logits[..., : max(vocabulary - first, 0)].square().sum().backward()
    held = dict(model.named_parameters())
    return {name: held[name].grad.clone() for name in names}


def _rank_content(models: Sequence[torch.nn.Module], args: Namespace, iteration: int) -> dict[str, Any]:
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    args = copy.copy(args)
    args.rank, args.iteration = dist.get_rank(), iteration
    if ENUMS_LOAD:
        args.attention_backend, args.model_type = AttnBackend.auto, ModelType.encoder_or_decoder
    states = {name: model.state_dict() for name, model in checkpoint.named_models(models).items()}
    for state in states.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                state[key] = value.to(checkpoint.stored_dtype(key, args.params_dtype))
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": iteration,
        **states,
        "num_floating_point_operations_so_far": 0,
    }


def _parallel(grid: Grid) -> Rank:
    """Divide the pool's processes into this grid; returns this process's rank in it."""
    world = dist.get_world_size()
    if world % (grid.tp * grid.pp) or world % (grid.etp * grid.ep * grid.pp):
        raise OracleError(f"{grid} does not fit {world} processes")
    own_rank = cpu.cut(*grid)
    return Rank(own_rank.tp, own_rank.pp, own_rank.ep, own_rank.etp)


def shard(logits: torch.Tensor | None) -> Shard:
    from megatron.core import parallel_state

    if logits is None or parallel_state.get_data_parallel_rank():
        return None
    return parallel_state.get_tensor_model_parallel_rank(), logits.clone()


def _megatron_globals() -> list[Any]:
    """Classes that Megatron-LM itself allows in a checkpoint."""
    from megatron.core.safe_globals import SAFE_GLOBALS

    return list(SAFE_GLOBALS)


def _different_args(args: Namespace) -> list[str]:
    rank_args = cpu.gathered({name: value for name, value in vars(args).items() if name not in _RANK_ARGUMENTS})
    names = {name for args in rank_args for name in args if args.get(name) != rank_args[0].get(name)}
    return [f"args differ between ranks: {', '.join(sorted(names))}"] if names else []


def _different_copies(fingerprints: list[tuple[str, tuple[int, ...], int]]) -> list[str]:
    """Texts for parameters whose copies on several ranks differ; logits come from one copy, so they would not show it."""
    first: dict[tuple[str, tuple[int, ...]], int] = {}
    entries = [entry for rank_entries in cpu.gathered(fingerprints) for entry in rank_entries]
    names = {name for name, part, crc in entries if first.setdefault((name, part), crc) != crc}
    return [f"ranks that share {name} hold different values" for name in sorted(names)]


def _raise_on_all_ranks(problems: Sequence[str]) -> None:
    """Raise the problems of all ranks on every rank, so that none is left waiting for another."""
    found = dict.fromkeys(problem for rank in cpu.gathered(list(problems)) for problem in rank)
    if found:
        raise OracleError("\n".join(found))

"""megatron-core's own distributed checkpoints (`torch_dist`), written and read in the pool's processes only."""

from __future__ import annotations

import copy
import queue
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.safe_globals import SAFE_GLOBALS

from . import checkpoint, megatron


def _write_in_this_process(
    transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: queue.Queue[Any]
) -> None:
    """`FileSystemWriterAsync.write_preloaded_data_multiproc` without its forks: one file after the other."""
    written = {}
    for number, bucket in enumerate(buckets):
        done: queue.Queue[Any] = queue.Queue()
        counter: queue.Queue[Any] = queue.Queue()
        counter.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, done, counter, use_fsync=False)
        _, result = done.get()
        if isinstance(result, Exception):
            raise result
        written[number] = result
    results.put(written)


FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_in_this_process)
filesystem_async._get_write_results_queue = queue.Queue


def save(models: list[torch.nn.Module], directory: Path, args: Namespace, metadata: dict[str, Any]) -> None:
    """As Megatron-LM's `save_checkpoint` with `--ckpt-format torch_dist`; `metadata` says how keys are laid out.

    Parameters are stored in `args.params_dtype`; an optimizer's entries, with its names, in float32.
    """
    if dist.get_rank() == 0:
        directory.mkdir(parents=True)
    dist.barrier()
    args = copy.copy(args)
    args.ckpt_format = "torch_dist"
    sharded = _sharded(models, metadata)
    entries = [(f"{name}.{key}", value) for name, state in sharded.items() for key, value in state.items()]
    for key, value in entries:
        if isinstance(value, (ShardedTensor, ShardedTensorFactory)):
            value.data = value.data.detach().to(checkpoint.stored_dtype(key, args.params_dtype))
        if isinstance(value, ShardedTensor):
            value.dtype = value.data.dtype
    state = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": args.iteration,
        "num_floating_point_operations_so_far": 0,
        "opt_param_scheduler": {"num_steps": 8},
        **sharded,
        "optimizer": {key: _moment(value) for key, value in entries if isinstance(value, ShardedTensor)},
    }
    dist_checkpointing.save(state, str(directory), content_metadata=metadata)


def load(models: list[torch.nn.Module], directory: Path) -> str | None:
    """Load this rank's part as Megatron-LM does; what is missing, surplus or misshapen, or None.

    Megatron-LM ignores surplus keys; here only surplus `_extra_state` is allowed.
    """
    metadata = dist_checkpointing.load_content_metadata(str(directory)) or {}
    sharded = _sharded(models, metadata)
    try:
        # megatron-core calls "missing" what the checkpoint has and the model does not ask for.
        state, surplus, absent = dist_checkpointing.load(sharded, str(directory), strict="return_all")
        surplus = {key for key in surplus if "_extra_state" not in key and not key.startswith("optimizer.")}
        if absent or surplus:
            return f"{directory}: missing {sorted(absent)}, unexpected {sorted(surplus)}"
    except (RuntimeError, ValueError, KeyError, dist_checkpointing.core.CheckpointingException) as error:
        return f"{directory}: {error}"
    # Transformer Engine's own attention does not miss its `_extra_state`, which megatron-core (0.15 on) no longer saves.
    faults = []
    for name, model in checkpoint.named_models(models).items():
        attention = {key: None for key in model.state_dict() if key.endswith("core_attention._extra_state")}
        faults.append(megatron.load(model, {**attention, **state[name]}, f"{directory}: {name}"))
    return "\n".join(filter(None, faults)) or None


def _sharded(models: list[torch.nn.Module], metadata: dict[str, Any]) -> dict[str, Any]:
    said = {**metadata, "dp_cp_group": _data_parallel()}
    return {name: model.sharded_state_dict(metadata=said) for name, model in checkpoint.named_models(models).items()}


def args_of(directory: Path, sizes: dict[str, int]) -> Namespace:
    """The args of a checkpoint, as megatron-core loads them, for a run at other sizes (`tp`, `pp`, `ep`, `etp`)."""
    # As Megatron-LM does when it starts. Here another job may have taken it back: torch's context manager does, at its end.
    torch.serialization.add_safe_globals(list(SAFE_GLOBALS))
    args: Namespace = dist_checkpointing.load_common_state_dict(str(directory))["args"]
    names = {"tp": "tensor_model", "pp": "pipeline_model", "ep": "expert_model", "etp": "expert_tensor"}
    for name, size in sizes.items():
        setattr(args, f"{names[name]}_parallel_size", size)
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    args.padded_vocab_size = -(-args.vocab_size // multiple) * multiple
    return args


def _data_parallel() -> Any:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _moment(parameter: ShardedTensor) -> ShardedTensor:
    moment = copy.copy(parameter)
    moment.key = f"optimizer.state.exp_avg.{parameter.key}"
    moment.data = torch.full_like(parameter.data, 0.5, dtype=torch.float32)
    moment.dtype = torch.float32
    return moment

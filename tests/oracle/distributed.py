"""Distributed checkpoints (`torch_dist`) by megatron-core itself, written and read only in the pool's processes."""

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
    """Replacement of `FileSystemWriterAsync.write_preloaded_data_multiproc` without forks: one file after the other."""
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
    """Save as Megatron-LM's `save_checkpoint` does with `--ckpt-format torch_dist`; `metadata` describes the layout of keys.

    Its `wrapper` is a prefix of all keys, as NeMo's `module.`, and is not stored. Parameters are stored in `args.params_dtype`,
    optimizer entries in float32 under the optimizer's names.
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
        "optimizer": {key: _optimizer_entry(value) for key, value in entries if isinstance(value, ShardedTensor)},
    }
    content = {name: value for name, value in metadata.items() if name != "wrapper"}
    dist_checkpointing.save(state, str(directory), content_metadata=content)


def load(models: list[torch.nn.Module], directory: Path) -> str | None:
    """Load this rank's part as Megatron-LM does; returns what is missing, unexpected or of the wrong shape, or None.

    Megatron-LM ignores unexpected keys; here only `_extra_state` and optimizer entries may be unexpected.
    """
    metadata = dist_checkpointing.load_content_metadata(str(directory)) or {}
    sharded = _sharded(models, metadata)
    try:
        # megatron-core calls keys "missing" that the checkpoint has and the model does not request.
        state, unexpected, missing = dist_checkpointing.load(sharded, str(directory), strict="return_all")
        unexpected = {key for key in unexpected if "_extra_state" not in key and not key.startswith("optimizer.")}
        if missing or unexpected:
            return f"{directory}: missing {sorted(missing)}, unexpected {sorted(unexpected)}"
    except (RuntimeError, ValueError, KeyError, dist_checkpointing.core.CheckpointingException) as error:
        return f"{directory}: {error}"
    # megatron-core no longer saves the attention's `_extra_state` (since 0.15), and Transformer Engine's own does not need it.
    faults = []
    for name, model in checkpoint.named_models(models).items():
        attention = {key: None for key in model.state_dict() if key.endswith("core_attention._extra_state")}
        faults.append(megatron.load(model, {**attention, **state[name]}, f"{directory}: {name}"))
    return "\n".join(filter(None, faults)) or None


def _sharded(models: list[torch.nn.Module], metadata: dict[str, Any]) -> dict[str, Any]:
    options = {**metadata, "dp_cp_group": _data_parallel()}
    prefix = options.pop("wrapper", "")
    return {
        name: model.sharded_state_dict(prefix=prefix, metadata=options)
        for name, model in checkpoint.named_models(models).items()
    }


def args_of(directory: Path, sizes: dict[str, int]) -> Namespace:
    """Args of a checkpoint, as megatron-core loads them, for a run at other sizes (`tp`, `pp`, `ep`, `etp`).

    The padded vocabulary is that of the sizes, or with `padded` 1 among them that of the args, as with `--use-checkpoint-args`.
    """
    # Megatron-LM does this when it starts. It is repeated here, since torch's context manager in another job undoes it at its end.
    torch.serialization.add_safe_globals(list(SAFE_GLOBALS))
    args: Namespace = dist_checkpointing.load_common_state_dict(str(directory))["args"]
    names = {"tp": "tensor_model", "pp": "pipeline_model", "ep": "expert_model", "etp": "expert_tensor"}
    for name, size in sizes.items() - {("padded", 1)}:
        setattr(args, f"{names[name]}_parallel_size", size)
    if sizes.get("padded"):
        return args
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    args.padded_vocab_size = -(-args.vocab_size // multiple) * multiple
    return args


def _data_parallel() -> Any:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _optimizer_entry(parameter: ShardedTensor) -> ShardedTensor:
    moment = copy.copy(parameter)
    moment.key = f"optimizer.state.exp_avg.{parameter.key}"
    moment.data = torch.full_like(parameter.data, 0.5, dtype=torch.float32)
    moment.dtype = torch.float32
    return moment

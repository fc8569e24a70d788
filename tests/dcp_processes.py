"""Processes that save state dicts of DTensors, each holding its part; joined by gloo, without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

#: Ends of the names of tensors that are cut by columns.
_BY_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


def save_all(rank: int, size: int, jobs: list[tuple[Path, Path]], store: Path) -> None:
    """Save what `torch.save` wrote into the first path of each job as a distributed checkpoint into the second."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        mesh = init_device_mesh("cpu", (size,))
        for content, folder in jobs:
            dcp.save(_sharded("", torch.load(content, weights_only=False), mesh), checkpoint_id=folder)
    finally:
        dist.destroy_process_group()


def _sharded(name: str, value: Any, mesh: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sharded(key, item, mesh) for key, item in value.items()}
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    axis = 1 if name.endswith(_BY_COLUMNS) else 0
    whole = value.shape[axis] < mesh.size()
    return distribute_tensor(value, mesh, [Replicate() if whole else Shard(axis)])

"""Hand-written conversion of a small Hugging Face model to a distributed checkpoint (`torch_dist`), with torch's own writer."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, save

from . import by_hand, checkpoint
from .checkpoint import Grid, Rank

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_EXPERT = re.compile(r"(.*)local_experts\.(\d+)\.(.*)")
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}


def convert(hf: Path, root: Path, *, stacked: bool = True, **overrides: Any) -> Path:
    """Write the model in `hf` as iteration 1 into `root`, every tensor in one chunk; `overrides` as in `by_hand.convert`.

    `stacked` makes the layers an axis; otherwise each layer has keys of its own. Experts are always an axis.
    """
    model, content = state(hf, root, **overrides)
    content["args"].ckpt_format = "torch_dist"
    write(root / "iter_0000001", tensors(model, stacked), content)
    checkpoint.write_tracker(root, 1)
    return root


def state(hf: Path, root: Path, **overrides: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """State of the rank at TP1 PP1, with Transformer Engine's names, and what else its file in `root`/legacy has."""
    legacy = by_hand.convert(hf, root / "legacy", impl="transformer_engine", **overrides)
    content = checkpoint.load_rank(checkpoint.rank_file(legacy / "iter_0000001", Grid(), Rank()))
    return content.pop("model"), content


def tensors(state: dict[str, Any], stacked: bool) -> dict[str, Any]:
    """State of the rank at TP1 PP1, with Transformer Engine's names, under the keys of a distributed checkpoint."""
    result: dict[str, Any] = {}
    for key, value in state.items():
        match = _LAYER.fullmatch(key)
        if value is None:
            result[f"{key}/shard_0_1"] = [None]
        elif match is None or not stacked:
            _add(result, key, [], value)
        else:
            _add(result, f"decoder.layers.{match[2]}", [int(match[1])], value)
    return {key: _stack(value) if isinstance(value, dict) else value for key, value in result.items()}


def _add(result: dict[str, Any], key: str, index: list[int], value: torch.Tensor) -> None:
    match = _EXPERT.fullmatch(key)
    if match is not None:
        key, index = f"{match[1]}experts.{match[3]}", [*index, int(match[2])]
    place, *rest = [*index, None]
    if place is None:
        result[key] = value
        return
    target = result.setdefault(key, {})
    if rest != [None]:
        target, place = target.setdefault(place, {}), rest[0]
    target[place] = value


def _stack(values: dict[int, Any]) -> torch.Tensor:
    parts = [values[index] for index in range(len(values))]
    return torch.stack([_stack(part) if isinstance(part, dict) else part for part in parts])


def write(folder: Path, entries: dict[str, Any], common: dict[str, Any]) -> None:
    """Save tensors and objects by key, the state common to all ranks, and the name of the format."""
    folder.mkdir(parents=True)
    planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
    save(entries, storage_writer=FileSystemWriter(folder), planner=planner, no_dist=True)
    torch.save(common, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(FORMAT))


class _Planner(DefaultSavePlanner):
    def lookup_object(self, index: Any) -> Any:
        value = super().lookup_object(index)
        if isinstance(value, list):  # as megatron-core stores objects
            buffer = io.BytesIO()
            torch.save(value, buffer)
            return buffer
        return value

    def transform_object(self, write_item: Any, object: Any) -> Any:  # noqa: A002 - torch's name
        return object

"""Hand-written conversion of models that differ from Llama in kind to a distributed checkpoint (`torch_dist`)."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from . import by_hand_dist, by_hand_kinds, checkpoint
from .checkpoint import Grid, Rank

_BLOCKS = {
    ".in_proj.weight": ("query", "key", "value", "z", "beta", "alpha"),
    ".conv1d.weight": ("query", "key", "value"),
}
"""Tensors of gated DeltaNet that are held block by block, and the ends of the blocks' keys."""

_PLACE = re.compile(r"(?P<layers>decoder\.layers\.)(?P<layer>\d+)\.(?P<rest>.*)")
_EXPERT = re.compile(r"local_experts\.(\d+)\.")


def convert(hf: Path, root: Path, *, stacked: bool, **overrides: Any) -> Path:
    """Write the model in `hf` as iteration 1 into `root`, every tensor in one chunk; `stacked` makes layers an axis.

    Megatron-LM stacks them unless `moe_layer_freq` or `linear_attention_freq` is a list or above 1 (core_v0.16.1,
    transformer_block.py:824-840). Extra states are complete, since a strict load asks for them.
    """
    legacy = by_hand_kinds.convert(hf, root / "legacy", transformer_impl="transformer_engine", **overrides)
    content = checkpoint.load_rank(checkpoint.rank_file(legacy / "iter_0000001", Grid(), Rank()))
    args, state = content["args"], content.pop("model")
    args.ckpt_format = "torch_dist"
    objects = {_object_key(key, args, stacked): [None] for key, value in state.items() if value is None}
    tensors = _in_blocks({key: value for key, value in state.items() if value is not None}, args)
    by_hand_dist.write(root / "iter_0000001", {**by_hand_dist.tensors(tensors, stacked), **objects}, content)
    checkpoint.write_tracker(root, 1)
    return root


def _in_blocks(state: dict[str, Any], args: Namespace) -> dict[str, Any]:
    """State in which the tensors of gated DeltaNet are divided."""
    result = {}
    for key, value in state.items():
        names = next((names for end, names in _BLOCKS.items() if key.endswith(end)), None)
        if names is None:
            result[key] = value
            continue
        blocks = value.split(_block_rows(args)[: len(names)])
        result |= {f"{key}.{name}": block.clone() for name, block in zip(names, blocks, strict=True)}
    return result


def _block_rows(args: Namespace) -> list[int]:
    """Rows of queries, keys, values, gates of the output, and the two scalars of each value head."""
    key = args.linear_num_key_heads * args.linear_key_head_dim
    value = args.linear_num_value_heads * args.linear_value_head_dim
    return [key, key, value, value, args.linear_num_value_heads, args.linear_num_value_heads]


def _object_key(key: str, args: Namespace, stacked: bool) -> str:
    """Key of an extra state, which ends in its place among those of all layers and experts."""
    places: list[tuple[int, int]] = []
    match = _PLACE.fullmatch(key)
    if match is not None and stacked:
        key = match["layers"] + match["rest"]
        places.append((int(match["layer"]), args.num_layers))
    expert = _EXPERT.search(key)
    if expert is not None:
        key = _EXPERT.sub("experts.", key)
        places.append((int(expert[1]), args.num_experts))
    first, sizes = zip(*places or [(0, 1)], strict=True)
    return f"{key}/shard_{'.'.join(map(str, first))}_{'.'.join(map(str, sizes))}"

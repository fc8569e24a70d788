"""Llama to Megatron-LM's files by hand, as in many scripts: transformers loads it, and torch saves it for TP 2 and PP 2.

    python scripts/bench/peer_by_hand.py convert HF_FOLDER OUT
    python scripts/bench/peer_by_hand.py compare OUT OTHER

`compare` exits naming what differs, unless the files of ranks in both folders hold the same tensors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

_TENSOR_PARALLEL, _PIPELINE_PARALLEL = 2, 2
_ITERATION, _TRACKER, _RANK_FILE = "iter_0000001", "latest_checkpointed_iteration.txt", "model_optim_rng.pt"
Tensors = dict[str, torch.Tensor]


def convert(folder: Path, output: Path) -> None:
    """Load a Llama, and save what each rank needs of it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    state, config = model.state_dict(), model.config
    for stage in range(_PIPELINE_PARALLEL):
        for rank in range(_TENSOR_PARALLEL):
            layers = config.num_hidden_layers // _PIPELINE_PARALLEL
            tensors = dict(_of_stage(state, config.num_key_value_heads, stage, layers, rank))
            path = output / _ITERATION / f"mp_rank_{rank:02d}_{stage:03d}" / _RANK_FILE
            path.parent.mkdir(parents=True)
            torch.save({"model": tensors, "iteration": 1, "checkpoint_version": 3.0}, path)
    (output / _TRACKER).write_text("1")


def _of_stage(state: Tensors, groups: int, stage: int, layers: int, rank: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a rank on a pipeline stage of so many layers, under Megatron-LM's names."""
    if stage == 0:
        yield "embedding.word_embeddings.weight", _part(state["model.embed_tokens.weight"], 0, rank)
    for number in range(layers):
        layer = {
            name.removeprefix(prefix): tensor
            for prefix in [f"model.layers.{stage * layers + number}."]
            for name, tensor in state.items()
            if name.startswith(prefix)
        }
        for name, tensor in _of_layer(layer, groups, rank):
            yield f"decoder.layers.{number}.{name}", tensor
    if stage == _PIPELINE_PARALLEL - 1:
        yield "decoder.final_layernorm.weight", state["model.norm.weight"]
        yield "output_layer.weight", _part(state["lm_head.weight"], 0, rank)


def _of_layer(layer: Tensors, groups: int, rank: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a rank in a layer: query, key and value joined by groups, gate and up by ranks."""
    query, key, value = (layer[f"self_attn.{name}_proj.weight"] for name in "qkv")
    grouped = [tensor.view(groups, -1, tensor.shape[1]) for tensor in (query, key, value)]
    joined = torch.cat(grouped, dim=1).reshape(-1, query.shape[1])
    gate, up = (_part(layer[f"mlp.{name}_proj.weight"], 0, rank) for name in ("gate", "up"))
    yield "self_attention.linear_qkv.layer_norm_weight", layer["input_layernorm.weight"]
    yield "self_attention.linear_qkv.weight", _part(joined, 0, rank)
    yield "self_attention.linear_proj.weight", _part(layer["self_attn.o_proj.weight"], 1, rank)
    yield "mlp.linear_fc1.layer_norm_weight", layer["post_attention_layernorm.weight"]
    yield "mlp.linear_fc1.weight", torch.cat([gate, up])
    yield "mlp.linear_fc2.weight", _part(layer["mlp.down_proj.weight"], 1, rank)


def _part(tensor: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    """A rank's part; a copy, since torch would save all of what a view belongs to."""
    return tensor.chunk(_TENSOR_PARALLEL, dim)[rank].clone(memory_format=torch.contiguous_format)


def compare(output: Path, other: Path) -> int:
    """Exit naming what differs, unless both folders have the same ranks with the same tensors; returns how many there are."""
    ours, theirs = ({path.parent.name: path for path in folder.rglob(_RANK_FILE)} for folder in (output, other))
    if not ours or ours.keys() != theirs.keys():
        sys.exit(f"{output} has the ranks {sorted(ours)} and {other} {sorted(theirs)}")
    count = 0
    for rank, path in ours.items():
        one, two = _tensors(path), _tensors(theirs[rank])
        differing = [name for name in sorted(one.keys() | two.keys()) if not _same(one.get(name), two.get(name))]
        if differing:
            sys.exit(f"{output} and {other} differ on {rank} in {', '.join(differing)}")
        count += len(one)
    return count


def _same(one: torch.Tensor | None, two: torch.Tensor | None) -> bool:
    return one is not None and two is not None and one.dtype == two.dtype and torch.equal(one, two)


def _tensors(path: Path) -> Tensors:
    """Tensors in the file of a rank, which this benchmark wrote itself."""
    model = torch.load(path, mmap=True, weights_only=False)["model"]
    return {name: value for name, value in model.items() if isinstance(value, torch.Tensor)}


def main() -> None:
    """Convert or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["convert", "compare"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("other", type=Path)
    args = parser.parse_args()
    if args.command == "convert":
        convert(args.folder, args.other)
    else:
        print(f"{compare(args.folder, args.other)} tensors are the same")


if __name__ == "__main__":
    main()

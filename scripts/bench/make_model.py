"""Random bf16 model for benchmarks, a Llama or a Qwen3-MoE, in shards as `save_pretrained` writes them; needs numpy alone.

    python scripts/bench/make_model.py FOLDER LAYERS HIDDEN [EXPERTS] [--ffn 4*HIDDEN]

Without experts it is a Llama. `94 256 128 --ffn 128` has the 36,945 tensors of Qwen3-235B-A22B, of 64 KiB each: 2.4 GB.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_VOCABULARY, _HEAD_DIM, _MAX_GROUPS, _SHARD_BYTES = 32000, 64, 8, 10**9
_Shapes = dict[str, tuple[int, ...]]


def feed_shapes(hidden: int, ffn: int, experts: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a layer's MLP, or of its router and experts."""
    if experts:
        yield "mlp.gate.weight", (experts, hidden)
    for prefix in [f"mlp.experts.{expert}." for expert in range(experts)] or ["mlp."]:
        yield f"{prefix}gate_proj.weight", (ffn, hidden)
        yield f"{prefix}up_proj.weight", (ffn, hidden)
        yield f"{prefix}down_proj.weight", (hidden, ffn)


def shapes(layers: int, hidden: int, ffn: int, experts: int) -> _Shapes:
    """Shapes of all tensors by name, in the model's order."""
    heads, groups = heads_of(hidden)
    query, key = heads * _HEAD_DIM, groups * _HEAD_DIM
    layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        **({"self_attn.q_norm.weight": (_HEAD_DIM,), "self_attn.k_norm.weight": (_HEAD_DIM,)} if experts else {}),
        **dict(feed_shapes(hidden, ffn, experts)),
    }
    return {
        "model.embed_tokens.weight": (_VOCABULARY, hidden),
        **{f"model.layers.{number}.{name}": shape for number in range(layers) for name, shape in layer.items()},
        "model.norm.weight": (hidden,),
        "lm_head.weight": (_VOCABULARY, hidden),
    }


def heads_of(hidden: int) -> tuple[int, int]:
    """Numbers of attention heads and of query groups."""
    heads = hidden // _HEAD_DIM
    return heads, min(heads, _MAX_GROUPS)


def shards_of(tensors: _Shapes) -> list[list[str]]:
    """Names of each shard's tensors: a shard is filled until the next tensor would exceed `_SHARD_BYTES`."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in tensors.items():
        if shards[-1] and filled + 2 * math.prod(shape) > _SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += 2 * math.prod(shape)
    return [sorted(shard) for shard in shards]  # as the safetensors library orders tensors of one dtype


def write_shard(path: Path, tensors: _Shapes, numbers: dict[str, int], noise: memoryview) -> None:
    """Write one shard. Tensors repeat one block of noise, each from a place of its own, which is fast to make."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in tensors.items():
            start, left = 2 * 997 * numbers[name] % len(noise), 2 * math.prod(shape)
            while left:
                part = noise[start : start + left]
                start, left = 0, left - file.write(part)


def write(folder: Path, layers: int, hidden: int, experts: int, ffn: int) -> None:
    """Write the model with its index and config.json, which comes last."""
    folder.mkdir(parents=True)
    normal = np.random.default_rng(0).standard_normal(1 << 24, np.float32)
    noise = memoryview((normal.view(np.uint32) >> 16).astype("<u2")).cast("B")
    tensors = shapes(layers, hidden, ffn, experts)
    numbers = {name: number for number, name in enumerate(tensors)}
    shards = shards_of(tensors)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / file, {name: tensors[name] for name in names}, numbers, noise)
        weight_map.update(dict.fromkeys(names, file))
    total = sum(2 * math.prod(shape) for shape in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config(layers, hidden, experts, ffn)), encoding="utf-8")


def config(layers: int, hidden: int, experts: int, ffn: int) -> dict[str, Any]:
    """Content of config.json."""
    heads, groups = heads_of(hidden)
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    if experts:
        kind = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    return {
        **kind,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": _HEAD_DIM,
        "vocab_size": _VOCABULARY,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **({"num_experts": experts, "num_experts_per_tok": min(8, experts)} if experts else {}),
        **({"moe_intermediate_size": ffn, "norm_topk_prob": True} if experts else {}),
    }


def main() -> None:
    """Write the model that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("layers", type=int)
    parser.add_argument("hidden", type=int)
    parser.add_argument("experts", type=int, nargs="?", default=0)
    parser.add_argument("--ffn", type=int, default=0)
    args = parser.parse_args()
    write(args.folder, args.layers, args.hidden, args.experts, args.ffn or 4 * args.hidden)


if __name__ == "__main__":
    main()

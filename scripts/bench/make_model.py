"""Make a bf16 Llama of random bits for benchmarks, shard by shard: python make_model.py FOLDER LAYERS HIDDEN [SHARDS]."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

_VOCABULARY, _HEAD_DIM, _GROUPS = 32000, 64, 8


def shapes(layers: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors, in the order of the files."""
    key, ffn = _GROUPS * _HEAD_DIM, 4 * hidden
    yield "model.embed_tokens.weight", (_VOCABULARY, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (key, hidden),
            "self_attn.v_proj": (key, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }.items():
            yield f"{prefix}{name}.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (_VOCABULARY, hidden)


def write(folder: Path, layers: int, hidden: int, shards: int) -> None:
    """Save the model; random bits are cheap to make as repeated stretches of one noise."""
    folder.mkdir(parents=True)
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    names = list(shapes(layers, hidden))
    per_shard = -(-len(names) // shards)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {}
        for index, (name, shape) in enumerate(names[shard * per_shard : (shard + 1) * per_shard]):
            count = torch.Size(shape).numel()
            tensors[name] = noise.roll(997 * (shard * per_shard + index)).repeat(count // noise.numel() + 1)[:count]
            tensors[name] = tensors[name].reshape(shape).clone()
            weight_map[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index_file = {
        "metadata": {"total_size": sum(2 * torch.Size(s).numel() for _, s in names)},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // _HEAD_DIM,
        "num_key_value_heads": _GROUPS,
        "vocab_size": _VOCABULARY,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else 3)

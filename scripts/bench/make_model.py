"""Random bf16 Llama or Mixtral for benchmarks, made shard by shard.

python make_model.py FOLDER LAYERS HIDDEN EXPERTS    (0 experts: a Llama)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

_VOCABULARY, _HEAD_DIM, _GROUPS, _SHARDS = 32000, 64, 8, 3


def mlp_shapes(hidden: int, experts: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a layer's MLP, or of its router and experts."""
    ffn = 4 * hidden
    if not experts:
        yield from {
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }.items()
        return
    yield "block_sparse_moe.gate", (experts, hidden)
    for expert in range(experts):
        for name, shape in {"w1": (ffn, hidden), "w2": (hidden, ffn), "w3": (ffn, hidden)}.items():
            yield f"block_sparse_moe.experts.{expert}.{name}", shape


def shapes(layers: int, hidden: int, experts: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors, in the order of the files."""
    key = _GROUPS * _HEAD_DIM
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
            **dict(mlp_shapes(hidden, experts)),
        }.items():
            yield f"{prefix}{name}.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (_VOCABULARY, hidden)


def write(folder: Path, layers: int, hidden: int, experts: int) -> None:
    """Save the model; its values repeat one block of random noise, which is fast to make."""
    folder.mkdir(parents=True)
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    names = list(shapes(layers, hidden, experts))
    per_shard = -(-len(names) // _SHARDS)
    weight_map = {}
    for shard in range(_SHARDS):
        file = f"model-{shard + 1:05d}-of-{_SHARDS:05d}.safetensors"
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
        "architectures": ["MixtralForCausalLM" if experts else "LlamaForCausalLM"],
        "model_type": "mixtral" if experts else "llama",
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
        **({"num_local_experts": experts, "num_experts_per_tok": 2} if experts else {}),
    }
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    write(Path(sys.argv[1]), *map(int, sys.argv[2:5]))

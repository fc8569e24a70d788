"""A Llama of a few kilobytes, written by hand and by torch, for tests that need a model and no transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, HEADS, GROUPS, DIM, MLP, LAYERS, VOCABULARY = 8, 4, 2, 2, 12, 2, 10
Tensors = dict[str, torch.Tensor]


def shapes(hidden: int = HIDDEN, vocabulary: int = VOCABULARY) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(LAYERS):
        parts: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (HEADS * DIM, hidden),
            "self_attn.k_proj": (GROUPS * DIM, hidden),
            "self_attn.v_proj": (GROUPS * DIM, hidden),
            "self_attn.o_proj": (hidden, HEADS * DIM),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (MLP, hidden),
            "mlp.up_proj": (MLP, hidden),
            "mlp.down_proj": (hidden, MLP),
        }
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def weights(seed: int = 0, **sizes: int) -> Tensors:
    """Random float32 tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes(**sizes).items()}


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """The same as torch casts them."""
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def write_llama(folder: Path, tensors: Tensors, **fields: Any) -> Path:
    """Write a folder with these tensors, and these fields of config.json; returns it."""
    folder.mkdir(parents=True)
    vocabulary, hidden = tensors["model.embed_tokens.weight"].shape
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": DIM,
        "vocab_size": vocabulary,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": str(tensors["model.norm.weight"].dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder

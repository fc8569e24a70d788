"""Hugging Face folder of a small Llama, written by hand: neither torch nor transformers is needed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

_HIDDEN, _MLP, _LAYERS, _HEADS = 16, 24, 2, 2
VOCABULARY = 32
#: Parameters of the model.
PARAMETERS = 2 * VOCABULARY * _HIDDEN + _LAYERS * (4 * _HIDDEN**2 + 3 * _HIDDEN * _MLP + 2 * _HIDDEN) + _HIDDEN


def shapes() -> dict[str, tuple[int, ...]]:
    """Shape of each tensor."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCABULARY, _HIDDEN)}
    for number in range(_LAYERS):
        layer = f"model.layers.{number}."
        found |= {f"{layer}self_attn.{name}_proj": (_HIDDEN, _HIDDEN) for name in "qkvo"}
        found |= {f"{layer}mlp.{name}_proj": (_MLP, _HIDDEN) for name in ("gate", "up")}
        found |= {f"{layer}mlp.down_proj": (_HIDDEN, _MLP)}
        found |= {f"{layer}{name}_layernorm": (_HIDDEN,) for name in ("input", "post_attention")}
    found |= {"model.norm": (_HIDDEN,), "lm_head": (VOCABULARY, _HIDDEN)}
    return {f"{name}.weight": shape for name, shape in found.items()}


def small_llama(folder: Path, shards: int = 1) -> Path:
    """Write the model in one file, or in several shards with an index; every element of it is another number."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": False,
        "hidden_size": _HIDDEN,
        "intermediate_size": _MLP,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "vocab_size": VOCABULARY,
    }
    (folder / "config.json").write_text(json.dumps(config))
    names = list(shapes())
    files = {
        "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors": names[
            number::shards
        ]
        for number in range(shards)
    }
    for number, (file, held) in enumerate(files.items()):
        _write(folder / file, held, first=1 + number * PARAMETERS)
    if shards > 1:
        weight_map = {name: file for file, held in files.items() for name in held}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _write(path: Path, names: list[str], first: int) -> None:
    """Write a safetensors file with these tensors of float32, whose elements count from `first`."""
    header, at = {}, 0
    for name in names:
        shape = shapes()[name]
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    data = np.arange(first, first + at // 4, dtype=np.float32).tobytes()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)

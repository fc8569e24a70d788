"""Hugging Face folders of published sizes: real headers, and files with holes for tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_converters.dtypes import dtype_named
from megatron_converters.endpoints.hf_names import parts_of
from megatron_converters.families import FAMILIES
from megatron_converters.hf_config import spec_of_config
from megatron_converters.slots import refs
from megatron_converters.storage import safetensors

_SHARD_BYTES = 5 * 10**9
LLAMA_405B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "torch_dtype": "bfloat16",
}
MIXTRAL_8X22B = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_hidden_layers": 56,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32768,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
}


def make_sparse(folder: Path, config: dict[str, Any]) -> Path:
    """A folder of this configuration whose every tensor is zero and takes no room on the disk."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    spec = spec_of_config(config)
    family, dtype = FAMILIES[spec.family], dtype_named(config["torch_dtype"])
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for ref in refs(spec):
        for part in parts_of(family, ref, spec, fused=False):
            nbytes = dtype.itemsize * part.rows.size * (part.shape[1] if len(part.shape) > 1 else 1)
            if size + nbytes > _SHARD_BYTES:
                shards.append({})
                size = 0
            shards[-1][part.name] = (dtype, part.shape)
            size += nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        layout = safetensors.layout(shard, {"format": "pt"})
        with open(folder / name, "wb") as file:
            file.truncate(layout.nbytes)
            for offset, data in layout.finish({}):
                file.seek(offset)
                file.write(data)
        weight_map.update(dict.fromkeys(shard, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder

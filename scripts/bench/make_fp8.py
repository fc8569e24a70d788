"""FP8 model with DeepSeek-V3's shapes and few layers and experts, as it is published; needs numpy alone.

    python scripts/bench/make_fp8.py FOLDER LAYERS EXPERTS [--hidden 7168] [--sparse]

The first layer is dense. With `--sparse` the files have their full size and headers, and nothing is written into them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_VOCABULARY, _BLOCK, _SHARD_BYTES = 2048, 128, 5 * 10**9
_SIZES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


class Tensor(NamedTuple):
    """Tensor of a file: its element type, as safetensors calls it, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * _SIZES[self.dtype]


def config(layers: int, experts: int, hidden: int) -> dict[str, Any]:
    """Content of config.json: DeepSeek-V3's, with these sizes; a smaller width has fewer heads and narrower layers."""
    share = 7168 // hidden
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": hidden,
        "intermediate_size": 18432 // share,
        "moe_intermediate_size": 2048 // share,
        "num_hidden_layers": layers,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "num_attention_heads": 128 // share,
        "num_key_value_heads": 128 // share,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": min(8, experts),
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "max_position_embeddings": 4096,
        "vocab_size": _VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [_BLOCK, _BLOCK],
        },
    }


def tensors(settings: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name, in the model's order."""
    hidden = settings["hidden_size"]
    yield "model.embed_tokens.weight", Tensor("BF16", (_VOCABULARY, hidden))
    for layer in range(settings["num_hidden_layers"]):
        yield from ((f"model.layers.{layer}.{name}", tensor) for name, tensor in _layer(settings, layer))
    yield "model.norm.weight", Tensor("BF16", (hidden,))
    yield "lm_head.weight", Tensor("BF16", (_VOCABULARY, hidden))


def _layer(settings: dict[str, Any], layer: int) -> Iterator[tuple[str, Tensor]]:
    hidden, heads, queries, latent = (
        settings[key] for key in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank")
    )
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{name}.weight", Tensor("BF16", (hidden,))
    yield "self_attn.q_a_layernorm.weight", Tensor("BF16", (queries,))
    yield "self_attn.kv_a_layernorm.weight", Tensor("BF16", (latent,))
    yield from _linear("self_attn.q_a_proj", queries, hidden)
    yield from _linear("self_attn.q_b_proj", heads * 192, queries)
    yield from _linear("self_attn.kv_a_proj_with_mqa", latent + 64, hidden)
    yield from _linear("self_attn.kv_b_proj", heads * 256, latent)
    yield from _linear("self_attn.o_proj", hidden, heads * 128)
    if layer < settings["first_k_dense_replace"]:
        yield from _mlp("mlp.", settings["intermediate_size"], hidden)
        return
    experts = settings["n_routed_experts"]
    yield "mlp.gate.weight", Tensor("BF16", (experts, hidden))
    yield "mlp.gate.e_score_correction_bias", Tensor("F32", (experts,))
    for prefix in (*(f"mlp.experts.{expert}." for expert in range(experts)), "mlp.shared_experts."):
        yield from _mlp(prefix, settings["moe_intermediate_size"], hidden)


def _mlp(prefix: str, size: int, hidden: int) -> Iterator[tuple[str, Tensor]]:
    yield from _linear(f"{prefix}gate_proj", size, hidden)
    yield from _linear(f"{prefix}up_proj", size, hidden)
    yield from _linear(f"{prefix}down_proj", hidden, size)


def _linear(name: str, rows: int, cols: int) -> Iterator[tuple[str, Tensor]]:
    """Codes, and scales of their blocks."""
    yield f"{name}.weight", Tensor("F8_E4M3", (rows, cols))
    yield f"{name}.weight_scale_inv", Tensor("F32", (-(-rows // _BLOCK), -(-cols // _BLOCK)))


def shards(model: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Tensors of each shard: one is filled until the next tensor would exceed `_SHARD_BYTES`."""
    found: list[dict[str, Tensor]] = [{}]
    for name, tensor in model.items():
        if sum(each.nbytes for each in found[-1].values()) + tensor.nbytes > _SHARD_BYTES:
            found.append({})
        found[-1][name] = tensor
    return found


def write_shard(path: Path, shard: dict[str, Tensor], noise: dict[str, memoryview] | None) -> None:
    """Write one shard; without noise, the header alone. Tensors repeat the noise of their type, each from another place."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in shard.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        if noise is None:
            file.truncate(file.tell() + end)
            return
        for number, tensor in enumerate(shard.values()):
            source, left = noise[tensor.dtype], tensor.nbytes
            start = 4096 * 997 * number % len(source)
            while left:
                part = source[start : start + left]
                start, left = 0, left - file.write(part)


def random_elements() -> dict[str, memoryview]:
    """Elements of each type: normal bf16, codes of every number, and scales around a thousandth."""
    chosen = np.random.default_rng(0)
    normal = (chosen.standard_normal(1 << 22, np.float32).view(np.uint32) >> 16).astype("<u2")
    codes = chosen.integers(0, 256, 1 << 25, np.uint8)
    codes[codes & 0x7F == 0x7F] = 0x31
    scales = (0.001 + 0.001 * chosen.random(1 << 20)).astype("<f4")
    return {"BF16": _bytes(normal), "F8_E4M3": _bytes(codes), "F32": _bytes(scales)}


def _bytes(array: Any) -> memoryview:
    return memoryview(array).cast("B")


def main() -> None:
    """Write the model that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("layers", type=int)
    parser.add_argument("experts", type=int)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--sparse", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    settings = config(args.layers, args.experts, args.hidden)
    parts, noise, weight_map = shards(dict(tensors(settings))), None if args.sparse else random_elements(), {}
    for number, shard in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_shard(args.folder / file, shard, noise)
        weight_map.update(dict.fromkeys(shard, file))
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (args.folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    (args.folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")


if __name__ == "__main__":
    main()

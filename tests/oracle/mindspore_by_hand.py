"""Weights of MindSpore Transformers made from a Hugging Face folder by hand, with torch, sharing no code with the converter.

Names and orders of rows: mindformers 1.8.0, parallel_core/training_graph.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
_RENAMED = (
    ("model.embed_tokens.", "embedding.word_embeddings."),
    ("model.norm.", "decoder.final_layernorm."),
    ("lm_head.", "output_layer."),
    ("model.layers.", "decoder.layers."),
    ("self_attn.o_proj.", "self_attention.linear_proj."),
    ("self_attn.q_norm.", "self_attention.q_layernorm."),
    ("self_attn.k_norm.", "self_attention.k_layernorm."),
    ("post_attention_layernorm.", "pre_mlp_layernorm."),
    ("mlp.down_proj.", "mlp.linear_fc2."),
    ("mlp.shared_experts.down_proj.", "mlp.shared_experts.linear_fc2."),
    ("mlp.shared_expert.down_proj.", "mlp.shared_experts.linear_fc2."),
    ("mlp.shared_expert_gate.", "mlp.shared_experts.shared_experts_gate."),
    ("mlp.gate.weight", "mlp.router.weight"),
    ("mlp.gate.e_score_correction_bias", "mlp.router.expert_bias"),
    ("self_attn.q_a_proj.", "self_attention.linear_q_down_proj."),
    ("self_attn.q_a_layernorm.", "self_attention.q_layernorm."),
    ("self_attn.q_b_proj.", "self_attention.linear_q_up_proj."),
    ("self_attn.kv_a_proj_with_mqa.", "self_attention.linear_kv_down_proj."),
    ("self_attn.kv_a_layernorm.", "self_attention.kv_layernorm."),
    ("self_attn.kv_b_proj.", "self_attention.linear_kv_up_proj."),
)


def tensors_by_hand(folder: Path, *, mlp: str = "interleaved", qkv: str = "grouped") -> Tensors:
    """Tensors of the model in a Hugging Face folder under MindSpore Transformers' names."""
    source: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        source |= load_file(path)
    config = json.loads((folder / "config.json").read_text())
    found: Tensors = {}
    for name, tensor in source.items():
        if not any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "mlp.experts.")):
            found[_renamed(name)] = tensor
    for layer in range(config["num_hidden_layers"]):
        prefix, new = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for kind in ("weight", "bias"):
            parts = [source.get(f"{prefix}self_attn.{part}_proj.{kind}") for part in "qkv"]
            if None not in parts:
                found[f"{new}self_attention.linear_qkv.{kind}"] = _qkv(parts, config, qkv)
        for old, name in (
            ("mlp.", "mlp."),
            ("mlp.shared_experts.", "mlp.shared_experts."),
            ("mlp.shared_expert.", "mlp.shared_experts."),
        ):
            gate = source.get(f"{prefix}{old}gate_proj.weight")
            if gate is not None:
                up = source[f"{prefix}{old}up_proj.weight"]
                joined = torch.stack([gate, up], dim=1).flatten(0, 1) if mlp == "interleaved" else torch.cat([gate, up])
                found[f"{new}{name}linear_fc1.weight"] = joined
        if f"{prefix}mlp.experts.0.gate_proj.weight" in source:
            found |= _experts(source, prefix, new)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _renamed(name: str) -> str:
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return name


def _qkv(parts: list[Any], config: Mapping[str, Any], order: str) -> torch.Tensor:
    if order == "contiguous":
        return torch.cat(parts)
    groups = config["num_key_value_heads"]
    return torch.cat([part.view(groups, -1, *part.shape[1:]) for part in parts], dim=1).flatten(0, 1)


def _experts(source: Tensors, prefix: str, new: str) -> Tensors:
    count = sum(1 for name in source if name.startswith(f"{prefix}mlp.experts.") and name.endswith("up_proj.weight"))
    gates, ups, downs = (
        torch.stack([source[f"{prefix}mlp.experts.{number}.{part}_proj.weight"] for number in range(count)])
        for part in ("gate", "up", "down")
    )
    first = torch.cat([gates, ups], dim=1).transpose(1, 2)  # [experts, hidden, 2 · size]
    return {
        f"{new}mlp.experts.weight1": first.flatten(0, 1),
        f"{new}mlp.experts.weight2": downs.transpose(1, 2).flatten(0, 1),
    }


def write_by_hand(folder: Path, out: Path, *, parts: int = 1, **orders: str) -> Path:
    """Write such weights as `unified_safetensors` does: `part*.safetensors` and their map."""
    tensors = tensors_by_hand(folder, **orders)
    out.mkdir(parents=True)
    names = sorted(tensors)
    weight_map = {}
    for part in range(parts):
        own = names[part::parts]
        save_file({name: tensors[name] for name in own}, out / f"part{part}.safetensors", metadata={"format": "ms"})
        weight_map |= dict.fromkeys(own, f"part{part}.safetensors")
    (out / "param_name_map.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return out


def yaml_of(folder: Path, **more: Any) -> str:
    """MindFormers' YAML for the model in a Hugging Face folder."""
    config = json.loads((folder / "config.json").read_text())
    kept = {
        name: config[name]
        for name in (
            *(
                "num_hidden_layers",
                "hidden_size",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "vocab_size",
            ),
            *("intermediate_size", "rms_norm_eps", "max_position_embeddings", "num_experts", "num_experts_per_tok"),
            *(
                "moe_intermediate_size",
                "norm_topk_prob",
                "n_routed_experts",
                "n_shared_experts",
                "n_group",
                "topk_group",
            ),
            *("routed_scaling_factor", "first_k_dense_replace", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim"),
            *("qk_rope_head_dim", "v_head_dim"),
        )
        if config.get(name) is not None
    }
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    kept |= {"rope_theta": rope["rope_theta"], "normalization": "RMSNorm", **more}
    lines = [f"    {name}: {json.dumps(value)}" for name, value in kept.items()]
    return "\n".join(["trainer: &trainer", "  type: x", "again: *trainer", "model:", "  model_config:", *lines, ""])

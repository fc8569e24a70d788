"""Weights of MindSpore Transformers made by hand from those of Hugging Face: explicit rows, one after the other.

With torch, sharing no code with the converter.

Source: mindformers 2.1.0, models/*/utils.py (names) and parallel_core/utils/model_mixin.py, 1.8.0 (orders of rows).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

#: Parts of names, replaced in this order; a model has those that its family has.
_RENAMED = (
    ("model.embed_tokens.weight", "embedding.word_embeddings.weight"),
    ("model.norm.", "decoder.final_layernorm."),
    ("lm_head.", "output_layer."),
    ("model.layers.", "decoder.layers."),
    (".self_attn.o_proj.", ".self_attention.linear_proj."),
    (".self_attn.q_norm.", ".self_attention.q_layernorm."),
    (".self_attn.k_norm.", ".self_attention.k_layernorm."),
    (".self_attn.q_a_proj.", ".self_attention.linear_q_down_proj."),
    (".self_attn.q_a_layernorm.", ".self_attention.q_layernorm."),
    (".self_attn.q_b_proj.", ".self_attention.linear_q_up_proj."),
    (".self_attn.kv_a_proj_with_mqa.", ".self_attention.linear_kv_down_proj."),
    (".self_attn.kv_a_layernorm.", ".self_attention.kv_layernorm."),
    (".self_attn.kv_b_proj.", ".self_attention.linear_kv_up_proj."),
    (".post_attention_layernorm.", ".pre_mlp_layernorm."),
    (".mlp.gate.e_score_correction_bias", ".mlp.router.expert_bias"),
    (".mlp.gate.", ".mlp.router."),
    (".mlp.shared_expert_gate.", ".mlp.shared_experts.shared_experts_gate."),
    (".mlp.shared_expert.", ".mlp.shared_experts."),
    (".down_proj.", ".linear_fc2."),
    (".c_fc.", ".linear_fc1."),
    (".c_proj.", ".linear_fc2."),
)
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.gate_proj\.weight")


def converted(hf: Mapping[str, torch.Tensor], groups: int, dim: int, *, mlp: str, qkv: str) -> Tensors:
    """All tensors. `groups` query groups have heads of `dim`; `mlp` and `qkv` are the layouts of rows."""
    found: Tensors = {}
    for name, tensor in hf.items():
        if ".self_attn.q_proj." in name and name.replace(".q_proj.", ".k_proj.") in hf:
            parts = [hf[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            joined = by_group(*parts, groups, dim) if qkv == "grouped" else torch.cat(parts)
            found[renamed(name).replace(".self_attn.q_proj.", ".self_attention.linear_qkv.")] = joined
        elif ".mlp.experts." in name:
            found |= dict(stacked(hf, name))
        elif ".gate_proj." in name:
            up = hf[name.replace(".gate_proj.", ".up_proj.")]
            joined = alternating(tensor, up) if mlp == "interleaved" else torch.cat([tensor, up])
            found[renamed(name).replace(".gate_proj.", ".linear_fc1.")] = joined
        elif not re.search(r"\.(k|v|up)_proj\.", name):
            found[renamed(name)] = tensor
    return found


def by_group(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: int, dim: int) -> torch.Tensor:
    """Rows of each group: its query heads, its key head, its value head."""
    heads = query.shape[0] // groups
    rows = []
    for group in range(groups):
        rows.append(query[group * heads : (group + 1) * heads])
        rows += [part[group * dim : (group + 1) * dim] for part in (key, value)]
    return torch.cat(rows)


def alternating(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Rows of gate at even places, of up at odd ones."""
    joined = torch.empty(2 * gate.shape[0], *gate.shape[1:], dtype=gate.dtype)
    joined[0::2], joined[1::2] = gate, up
    return joined


def stacked(hf: Mapping[str, torch.Tensor], name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Both tensors of a layer's experts, from the name of the first expert's gate; nothing from other names."""
    found = _EXPERT.fullmatch(name)
    if found is None or found[2] != "0":
        return
    start, count = found[1], sum(bool((match := _EXPERT.fullmatch(key)) and match[1] == found[1]) for key in hf)
    experts = [
        {part: hf[f"{start}.{number}.{part}_proj.weight"] for part in ("gate", "up", "down")} for number in range(count)
    ]
    size, hidden = experts[0]["gate"].shape
    first = torch.empty(count, hidden, 2 * size, dtype=experts[0]["gate"].dtype)
    second = torch.empty(count, size, hidden, dtype=first.dtype)
    for number, expert in enumerate(experts):
        first[number, :, :size], first[number, :, size:] = expert["gate"].T, expert["up"].T
        second[number] = expert["down"].T
    yield f"{renamed(start)}.weight1", first.reshape(count * hidden, 2 * size)
    yield f"{renamed(start)}.weight2", second.reshape(count * size, hidden)


def renamed(name: str) -> str:
    """Name of a tensor that is its own."""
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return name


def tensors_by_hand(folder: Path, *, mlp: str = "interleaved", qkv: str = "grouped") -> Tensors:
    """Tensors of the model in a Hugging Face folder."""
    source: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        source |= load_file(path)
    config = json.loads((folder / "config.json").read_text())
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    found = converted(source, config["num_key_value_heads"], dim, mlp=mlp, qkv=qkv)
    return {name: tensor.contiguous() for name, tensor in found.items()}


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

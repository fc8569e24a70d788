"""A conversion from Hugging Face to Megatron-LM written out by hand, for small dense models.

It is the naive one, tensor after tensor and with nothing in common with the package: what the real megatron-core makes
of its output is compared with transformers in `test_oracle.py`, so the package's output can be compared with it.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from . import checkpoint
from .args import megatron_args

Tensors = dict[str, torch.Tensor]


def convert(hf: Path, root: Path, *, tp: int = 1, pp: int = 1, impl: str = "local", **overrides: Any) -> Path:
    """Write the model in `hf` (one safetensors file, even stages) as iteration 1 into `root`, and return `root`.

    `impl` is "local" or "transformer_engine"; `overrides` replace arguments that the model's config would give.
    """
    config = json.loads((hf / "config.json").read_text())
    args = _args(
        config, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, transformer_impl=impl, **overrides
    )
    tensors = load_file(hf / "model.safetensors")
    for pp_rank in range(pp):
        for tp_rank in range(tp):
            path = checkpoint.rank_file(root / "iter_0000001", tp_rank, pp_rank, pp)
            path.parent.mkdir(parents=True)
            state = _rank_state(tensors, config, args, tp_rank, pp_rank)
            torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 1, "model": state}, path)
    checkpoint.write_tracker(root, 1)
    return root


def _args(config: dict[str, Any], **more: Any) -> Namespace:
    rope = config["rope_parameters"]
    window = config.get("sliding_window")
    known = dict(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        kv_channels=config.get("head_dim"),
        max_position_embeddings=config["max_position_embeddings"],
        vocab_size=config["vocab_size"],
        layernorm_epsilon=config["rms_norm_eps"],
        untie_embeddings_and_output_weights=not config["tie_word_embeddings"],
        rotary_base=int(rope["rope_theta"]),
        use_rope_scaling=rope["rope_type"] == "llama3",
        rope_scaling_factor=rope.get("factor", 8.0),
        window_size=(window - 1, 0) if window else None,  # Megatron counts the positions before the current one
        add_bias_linear=bool(config.get("mlp_bias")),
        add_qkv_bias=config["model_type"] == "qwen2",
        qk_layernorm=config["model_type"] == "qwen3",
        params_dtype=getattr(torch, config["dtype"]),
    )
    args = megatron_args(**{**known, **more})
    del args.exit_signal  # an enum: a file that anyone may load holds none
    return args


def _rank_state(hf: Tensors, config: dict[str, Any], args: Namespace, tp_rank: int, pp_rank: int) -> dict[str, Any]:
    pp_size, last = args.pipeline_model_parallel_size, args.pipeline_model_parallel_size - 1
    embedding = hf["model.embed_tokens.weight"]
    state: dict[str, Any] = {}
    if pp_rank == 0:
        state["embedding.word_embeddings.weight"] = _vocabulary(embedding, args, tp_rank)
    per_stage = args.num_layers // pp_size
    for layer in range(per_stage):
        source = f"model.layers.{pp_rank * per_stage + layer}."
        part = {name.removeprefix(source): tensor for name, tensor in hf.items() if name.startswith(source)}
        state |= {f"decoder.layers.{layer}.{name}": value for name, value in _layer(part, args, tp_rank).items()}
    if pp_rank == last:
        state["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        if args.untie_embeddings_and_output_weights:
            state["output_layer.weight"] = _vocabulary(hf["lm_head.weight"], args, tp_rank)
        elif last > 0:
            state["output_layer.weight"] = _vocabulary(embedding, args, tp_rank)
    return state


def _layer(hf: Tensors, args: Namespace, tp_rank: int) -> dict[str, Any]:
    tp, groups, channels = args.tensor_model_parallel_size, args.num_query_groups, args.kv_channels

    def rows(name: str) -> torch.Tensor:
        return hf[name].chunk(tp)[tp_rank]

    def columns(name: str) -> torch.Tensor:
        return hf[name].chunk(tp, dim=1)[tp_rank].clone()

    def qkv(kind: str) -> torch.Tensor:
        q, k, v = (hf[f"self_attn.{name}_proj.{kind}"] for name in "qkv")
        each = [x.reshape(groups, -1, channels, *x.shape[1:]) for x in (q, k, v)]  # [group, heads of it, d, …]
        return torch.cat(each, dim=1).reshape(-1, *q.shape[1:]).chunk(tp)[tp_rank].clone()

    def gate_and_up(kind: str) -> torch.Tensor:
        return torch.cat([rows(f"mlp.gate_proj.{kind}"), rows(f"mlp.up_proj.{kind}")])

    fused = args.transformer_impl == "transformer_engine"
    state: dict[str, Any] = {
        f"{'self_attention.linear_qkv.layer_norm_' if fused else 'input_layernorm.'}weight": hf[
            "input_layernorm.weight"
        ],
        f"{'mlp.linear_fc1.layer_norm_' if fused else 'pre_mlp_layernorm.'}weight": hf[
            "post_attention_layernorm.weight"
        ],
        "self_attention.linear_qkv.weight": qkv("weight"),
        "self_attention.linear_proj.weight": columns("self_attn.o_proj.weight"),
        "mlp.linear_fc1.weight": gate_and_up("weight"),
        "mlp.linear_fc2.weight": columns("mlp.down_proj.weight"),
    }
    if args.qk_layernorm:
        state["self_attention.q_layernorm.weight"] = hf["self_attn.q_norm.weight"]
        state["self_attention.k_layernorm.weight"] = hf["self_attn.k_norm.weight"]
    if args.add_bias_linear or args.add_qkv_bias:
        state["self_attention.linear_qkv.bias"] = qkv("bias")
    if args.add_bias_linear:
        state["self_attention.linear_proj.bias"] = hf["self_attn.o_proj.bias"]
        state["mlp.linear_fc1.bias"] = gate_and_up("bias")
        state["mlp.linear_fc2.bias"] = hf["mlp.down_proj.bias"]
    if fused:
        owners = ("self_attention.core_attention", "self_attention.linear_qkv", "self_attention.linear_proj")
        state |= {f"{owner}._extra_state": None for owner in (*owners, "mlp.linear_fc1", "mlp.linear_fc2")}
    return state


def _vocabulary(weight: torch.Tensor, args: Namespace, tp_rank: int) -> torch.Tensor:
    padding = weight[-1:].expand(args.padded_vocab_size - len(weight), -1)
    return torch.cat([weight, padding]).chunk(args.tensor_model_parallel_size)[tp_rank].clone()

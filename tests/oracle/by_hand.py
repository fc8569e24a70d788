"""Hand-written conversion of small models from Hugging Face to Megatron-LM.

It converts tensor by tensor and shares nothing with the package. `test_oracle.py` compares the logits of the real megatron-core on
its output with those of transformers, so the package's output can be compared with it.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from . import checkpoint
from .args import megatron_args
from .checkpoint import Grid, Rank

Tensors = dict[str, torch.Tensor]


def convert(
    hf: Path,
    root: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    impl: str = "local",
    **overrides: Any,
) -> Path:
    """Write the model in `hf` (one safetensors file, even stages) as iteration 1 into `root`, and return `root`.

    Experts are read under their own names, not fused ones. `etp` None is the TP size. `impl` is "local" or
    "transformer_engine". `overrides` replace arguments derived from the model's config; with `moe_grouped_gemm`
    experts are written as the grouped module that the implementation builds.
    """
    config = json.loads((hf / "config.json").read_text())
    sizes = dict(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    args = _args(config, transformer_impl=impl, **{**sizes, **overrides})
    tensors = load_file(hf / "model.safetensors")
    grid = Grid.of(args)
    checkpoint.check_grid(grid)
    for rank in grid.ranks():
        path = checkpoint.rank_file(root / "iter_0000001", grid, rank)
        path.parent.mkdir(parents=True)
        state = _rank_state(tensors, args, rank)
        torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 1, "model": state}, path)
    checkpoint.write_tracker(root, 1)
    return root


def _args(config: dict[str, Any], **overrides: Any) -> Namespace:
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
        add_qkv_bias=config["model_type"] in ("qwen2", "qwen2_moe"),
        qk_layernorm=config["model_type"] in ("qwen3", "qwen3_moe", "olmoe"),
        params_dtype=getattr(torch, config["dtype"]),
        **_experts_args(config),
    )
    args = megatron_args(**{**known, **overrides})
    del args.exit_signal  # an enum, which a file for any loader must not hold
    return args


def _experts_args(config: dict[str, Any]) -> dict[str, Any]:
    experts = config.get("num_local_experts") or config.get("num_experts")
    if not experts:
        return {}
    dense, step = config.get("mlp_only_layers", []), config.get("decoder_sparse_step", 1)
    layers = range(config["num_hidden_layers"])
    return dict(
        num_experts=experts,
        moe_ffn_hidden_size=config.get("moe_intermediate_size", config["intermediate_size"]),
        moe_layer_freq=[int(layer not in dense and (layer + 1) % step == 0) for layer in layers],
        moe_router_topk=config["num_experts_per_tok"],
        moe_router_pre_softmax=not config.get("norm_topk_prob", True),  # Mixtral always normalises
        moe_shared_expert_intermediate_size=config.get("shared_expert_intermediate_size"),
        moe_shared_expert_gate="shared_expert_intermediate_size" in config,
    )


def _rank_state(hf: Tensors, args: Namespace, rank: Rank) -> dict[str, Any]:
    pp_size, last = args.pipeline_model_parallel_size, args.pipeline_model_parallel_size - 1
    tp_rank, pp_rank = rank.tp, rank.pp
    embedding = hf["model.embed_tokens.weight"]
    state: dict[str, Any] = {}
    if pp_rank == 0:
        state["embedding.word_embeddings.weight"] = vocabulary(embedding, args, tp_rank)
    per_stage = args.num_layers // pp_size
    for layer in range(per_stage):
        source = f"model.layers.{pp_rank * per_stage + layer}."
        part = {name.removeprefix(source): tensor for name, tensor in hf.items() if name.startswith(source)}
        state |= {f"decoder.layers.{layer}.{name}": value for name, value in _layer(part, args, rank).items()}
    if pp_rank == last:
        state["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        if args.untie_embeddings_and_output_weights:
            state["output_layer.weight"] = vocabulary(hf["lm_head.weight"], args, tp_rank)
        elif last > 0:
            state["output_layer.weight"] = vocabulary(embedding, args, tp_rank)
    return state


def _layer(hf: Tensors, args: Namespace, rank: Rank) -> dict[str, Any]:
    moe = next((prefix for prefix in ("mlp", "block_sparse_moe") if f"{prefix}.gate.weight" in hf), None)
    fused = args.transformer_impl == "transformer_engine"
    norm = "mlp.linear_fc1.layer_norm_weight" if fused and not moe else "pre_mlp_layernorm.weight"
    state = _attention(hf, args, rank.tp) | {norm: hf["post_attention_layernorm.weight"]}
    if not moe:
        return state | _mlp(hf, "mlp", "mlp", args, rank.tp)
    state["mlp.router.weight"] = hf[f"{moe}.gate.weight"]
    if args.moe_shared_expert_intermediate_size:
        state |= _mlp(hf, "mlp.shared_expert", "mlp.shared_experts", args, rank.tp)
        state["mlp.shared_experts.gate_weight"] = hf["mlp.shared_expert_gate.weight"]
    return state | _experts(hf, moe, args, rank)


def _experts(hf: Tensors, prefix: str, args: Namespace, rank: Rank) -> dict[str, Any]:
    count, etp = args.num_experts // args.expert_model_parallel_size, args.expert_tensor_parallel_size
    gate, down, up = ("w1", "w2", "w3") if prefix == "block_sparse_moe" else ("gate_proj", "down_proj", "up_proj")
    fc1, fc2 = [], []
    for expert in range(rank.ep * count, (rank.ep + 1) * count):
        part = {name: hf[f"{prefix}.experts.{expert}.{name}.weight"] for name in (gate, down, up)}
        fc1.append(torch.cat([part[name].chunk(etp)[rank.etp] for name in (gate, up)]))
        fc2.append(part[down].chunk(etp, dim=1)[rank.etp].clone())
    return {f"mlp.experts.{name}": value for name, value in stored_experts(fc1, fc2, args)}


def stored_experts(fc1: list[torch.Tensor], fc2: list[torch.Tensor], args: Namespace) -> Iterator[tuple[str, Any]]:
    """Names and tensors of a rank's experts, whose weights are given one by one, in the module that the args ask for."""
    fused = args.transformer_impl == "transformer_engine"
    if args.moe_grouped_gemm and (args.moe_use_legacy_grouped_gemm or not fused):  # GroupedMLP
        yield "weight1", torch.stack([weight.T for weight in fc1]).reshape(args.hidden_size, -1)
        yield "weight2", torch.stack([weight.T for weight in fc2]).reshape(-1, args.hidden_size)
        return
    for name, weights in (("linear_fc1", fc1), ("linear_fc2", fc2)):
        if args.moe_grouped_gemm:  # TEGroupedMLP
            yield from ((f"{name}.weight{local}", weight) for local, weight in enumerate(weights))
            yield f"{name}._extra_state", None
            continue
        for local, weight in enumerate(weights):  # SequentialMLP
            yield f"local_experts.{local}.{name}.weight", weight
            if fused:
                yield f"local_experts.{local}.{name}._extra_state", None


def _mlp(hf: Tensors, source: str, target: str, args: Namespace, tp_rank: int) -> dict[str, Any]:
    tp = args.tensor_model_parallel_size

    def gate_and_up(kind: str) -> torch.Tensor:
        return torch.cat([hf[f"{source}.{name}_proj.{kind}"].chunk(tp)[tp_rank] for name in ("gate", "up")])

    state: dict[str, Any] = {
        f"{target}.linear_fc1.weight": gate_and_up("weight"),
        f"{target}.linear_fc2.weight": hf[f"{source}.down_proj.weight"].chunk(tp, dim=1)[tp_rank].clone(),
    }
    if args.add_bias_linear:
        state[f"{target}.linear_fc1.bias"] = gate_and_up("bias")
        state[f"{target}.linear_fc2.bias"] = hf[f"{source}.down_proj.bias"]
    if args.transformer_impl == "transformer_engine":
        state |= {f"{target}.{name}._extra_state": None for name in ("linear_fc1", "linear_fc2")}
    return state


def _attention(hf: Tensors, args: Namespace, tp_rank: int) -> dict[str, Any]:
    tp, groups, channels = args.tensor_model_parallel_size, args.num_query_groups, args.kv_channels

    def columns(name: str) -> torch.Tensor:
        return hf[name].chunk(tp, dim=1)[tp_rank].clone()

    def qkv(kind: str) -> torch.Tensor:
        q, k, v = (hf[f"self_attn.{name}_proj.{kind}"] for name in "qkv")
        each = [x.reshape(groups, -1, channels, *x.shape[1:]) for x in (q, k, v)]  # [group, heads in group, d, …]
        return torch.cat(each, dim=1).reshape(-1, *q.shape[1:]).chunk(tp)[tp_rank].clone()

    fused = args.transformer_impl == "transformer_engine"
    state: dict[str, Any] = {
        f"{'self_attention.linear_qkv.layer_norm_' if fused else 'input_layernorm.'}weight": hf[
            "input_layernorm.weight"
        ],
        "self_attention.linear_qkv.weight": qkv("weight"),
        "self_attention.linear_proj.weight": columns("self_attn.o_proj.weight"),
    }
    if args.qk_layernorm:
        state["self_attention.q_layernorm.weight"] = hf["self_attn.q_norm.weight"]
        state["self_attention.k_layernorm.weight"] = hf["self_attn.k_norm.weight"]
    if args.add_bias_linear or args.add_qkv_bias:
        state["self_attention.linear_qkv.bias"] = qkv("bias")
    if args.add_bias_linear:
        state["self_attention.linear_proj.bias"] = hf["self_attn.o_proj.bias"]
    if fused:
        owners = ("self_attention.core_attention", "self_attention.linear_qkv", "self_attention.linear_proj")
        state |= {f"{owner}._extra_state": None for owner in owners}
    return state


def vocabulary(weight: torch.Tensor, args: Namespace, tp_rank: int) -> torch.Tensor:
    """Rank's rows of an embedding or head, which is padded with copies of its last row."""
    padding = weight[-1:].expand(args.padded_vocab_size - len(weight), -1)
    return torch.cat([weight, padding]).chunk(args.tensor_model_parallel_size)[tp_rank].clone()

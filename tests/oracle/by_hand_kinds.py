"""Hand-written conversion of small models that differ from Llama in kind, from Hugging Face to Megatron-LM.

Like `by_hand.py` it uses torch alone. First every family's tensors get one form, `_plain`, with Llama's names; then each tensor
of Megatron-LM's is a `Piece`: whole, with the way in which ranks share it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from . import checkpoint, kinds_args
from .by_hand import stored_experts, vocabulary
from .checkpoint import Grid, Rank

Tensors = dict[str, torch.Tensor]


class Piece(NamedTuple):
    """A whole tensor of Megatron-LM's, and its blocks of rows that are each cut over ranks, or the dimension, or None."""

    tensor: torch.Tensor
    cut: int | tuple[int, ...] | None = None

    def of(self, rank: int, ranks: int) -> torch.Tensor:
        """Part that one of the ranks holds."""
        if self.cut is None:
            return self.tensor
        if isinstance(self.cut, int):
            return self.tensor.chunk(ranks, dim=self.cut)[rank].clone()
        return torch.cat([block.chunk(ranks)[rank] for block in self.tensor.split(self.cut)])


Pieces = dict[str, Piece]


def convert(hf: Path, root: Path, *, down_cut: bool = False, **overrides: Any) -> Path:
    """Write the model in `hf` (one safetensors file, even stages) as iteration 1 into `root`, and return `root`.

    `down_cut` cuts the down projections of latent attention over ranks, as Megatron-LM did up to 0.13; from 0.14 on each rank
    holds all of them. `overrides` are arguments, such as the parallel sizes, that replace those derived from the config.
    """
    args = kinds_args.args_of(kinds_args.read(hf), **overrides)
    tensors = load_file(hf / "model.safetensors")
    grid = Grid.of(args)
    checkpoint.check_grid(grid)
    for rank in grid.ranks():
        path = checkpoint.rank_file(root / "iter_0000001", grid, rank)
        path.parent.mkdir(parents=True)
        state = _rank_state(_plain_names(tensors), args, rank, down_cut)
        torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 1, "model": state}, path)
    checkpoint.write_tracker(root, 1)
    return root


_GPT2_NAMES = {
    "transformer.wte.": "model.embed_tokens.",
    "transformer.ln_f.": "model.norm.",
    "transformer.h.": "model.layers.",
    ".ln_1.": ".input_layernorm.",
    ".ln_2.": ".post_attention_layernorm.",
    ".attn.c_proj.": ".self_attn.o_proj.",
}


def _plain_names(hf: Tensors) -> Tensors:
    """Tensors with Llama's names; GPT-2's linear layers, which are stored [in, out], are transposed."""
    result = {}
    for name, tensor in hf.items():
        if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")) and name.startswith("transformer."):
            tensor = tensor.T.contiguous()
        for old, new in _GPT2_NAMES.items():
            name = name.replace(old, new)
        result[name] = tensor
    return result


def _rank_state(hf: Tensors, args: Namespace, rank: Rank, down_cut: bool) -> dict[str, Any]:
    stages, tp = args.pipeline_model_parallel_size, args.tensor_model_parallel_size
    embedding = hf["model.embed_tokens.weight"]
    state: dict[str, Any] = {}
    if rank.pp == 0:
        state["embedding.word_embeddings.weight"] = vocabulary(embedding, args, rank.tp)
        if args.position_embedding_type == "learned_absolute":
            state["embedding.position_embeddings.weight"] = hf["transformer.wpe.weight"]
    per_stage = args.num_layers // stages
    for local in range(per_stage):
        prefix = f"model.layers.{rank.pp * per_stage + local}."
        part = {name.removeprefix(prefix): tensor for name, tensor in hf.items() if name.startswith(prefix)}
        pieces = {name: piece.of(rank.tp, tp) for name, piece in _layer(part, args, down_cut).items()}
        values = pieces | _experts(part, args, rank) | _extra_states(pieces, args)
        state |= {f"decoder.layers.{local}.{name}": value for name, value in values.items()}
    if rank.pp == stages - 1:
        for kind in ("weight", "bias"):
            if f"model.norm.{kind}" in hf:
                state[f"decoder.final_layernorm.{kind}"] = hf[f"model.norm.{kind}"]
        state |= {f"decoder.{name}": value for name, value in _extra_states({"final_layernorm.": None}, args).items()}
        if args.untie_embeddings_and_output_weights or stages > 1:
            head = hf["lm_head.weight"] if args.untie_embeddings_and_output_weights else embedding
            state["output_layer.weight"] = vocabulary(head, args, rank.tp)
    return state


def _extra_states(pieces: Mapping[str, Any], args: Namespace) -> dict[str, Any]:
    """Empty states of Transformer Engine 2's modules: its linear layers, norms and attention."""
    if args.transformer_impl != "transformer_engine":
        return {}
    owners = ("linear_", "_proj.", "norm.")
    modules = {name.rpartition(".")[0] for name in pieces if any(owner in name for owner in owners)}
    if "self_attention.linear_proj.weight" in pieces:
        modules.add("self_attention.core_attention")
    return {f"{module}._extra_state": None for module in modules}


def _layer(hf: Tensors, args: Namespace, down_cut: bool) -> Pieces:
    if "linear_attn.A_log" in hf:
        pieces, before = _linear_attention(hf, args), "self_attention.in_proj.layer_norm_"
    elif args.multi_latent_attention:
        pieces, before = _latent_attention(hf, args, down_cut), "input_layernorm."
    else:
        pieces, before = _attention(hf, args), "self_attention.linear_qkv.layer_norm_"
    moe = "mlp.gate.weight" in hf
    fused = args.transformer_impl == "transformer_engine"
    norms = {
        "input_layernorm": before if fused else "input_layernorm.",
        "post_attention_layernorm": "mlp.linear_fc1.layer_norm_" if fused and not moe else "pre_mlp_layernorm.",
    }
    for source, target in norms.items():
        for kind in ("weight", "bias"):
            if f"{source}.{kind}" in hf:
                pieces[f"{target}{kind}"] = Piece(hf[f"{source}.{kind}"])
    return pieces | (_router_and_shared(hf) if moe else _mlp(hf, "mlp.", "mlp."))


def _queries_keys_values(hf: Tensors, args: Namespace, kind: str) -> Iterator[torch.Tensor]:
    """Tensors of queries, keys and values apart, from whichever form the family stores."""
    if f"self_attn.q_proj.{kind}" in hf:
        yield from (hf[f"self_attn.{name}_proj.{kind}"] for name in "qkv")
    elif f"attn.c_attn.{kind}" in hf:
        yield from hf[f"attn.c_attn.{kind}"].chunk(3)
    elif f"self_attn.qkv_proj.{kind}" in hf:
        rows = [heads * args.kv_channels for heads in (args.num_attention_heads, _groups(args), _groups(args))]
        yield from hf[f"self_attn.qkv_proj.{kind}"].split(rows)


def _groups(args: Namespace) -> int:
    return int(args.num_query_groups if args.group_query_attention else args.num_attention_heads)


def _attention(hf: Tensors, args: Namespace) -> Pieces:
    """Attention with query groups, [group: query heads, gates of these heads, key, value] (gates only in Qwen3-Next)."""
    groups, channels = _groups(args), args.kv_channels
    pieces: Pieces = {"self_attention.linear_proj.weight": Piece(hf["self_attn.o_proj.weight"], 1)}
    for kind in ("weight", "bias"):
        parts = list(_queries_keys_values(hf, args, kind))
        if not parts:
            continue
        q, k, v = (x.reshape(groups, -1, channels, *x.shape[1:]) for x in parts)
        if getattr(args, "attention_output_gate", False):  # each head of the source: its query, then its gate
            q = torch.cat([q[:, 0::2], q[:, 1::2]], dim=1)
        grouped = torch.cat([q, k, v], dim=1).reshape(-1, *parts[0].shape[1:])
        pieces[f"self_attention.linear_qkv.{kind}"] = Piece(grouped, 0)
    if "self_attn.o_proj.bias" in hf:
        pieces["self_attention.linear_proj.bias"] = Piece(hf["self_attn.o_proj.bias"])
    for name in "qk":
        if f"self_attn.{name}_norm.weight" in hf:
            pieces[f"self_attention.{name}_layernorm.weight"] = Piece(hf[f"self_attn.{name}_norm.weight"])
    return pieces


def _latent_attention(hf: Tensors, args: Namespace, down_cut: bool) -> Pieces:
    """Multi-head latent attention; its rotary rows stay as they are, since Megatron-LM, too, rotates neighbours."""
    down = 0 if down_cut else None
    norms = ("linear_q_up_proj.layer_norm_", "linear_kv_up_proj.layer_norm_")
    if args.experimental_attention_variant == "dsa":
        norms = ("q_layernorm.", "kv_layernorm.")
    names = {
        "q_proj": ("linear_q_proj.weight", 0),
        "q_a_proj": ("linear_q_down_proj.weight", down),
        "q_a_layernorm": (f"{norms[0]}weight", None),
        "q_b_proj": ("linear_q_up_proj.weight", 0),
        "kv_a_proj_with_mqa": ("linear_kv_down_proj.weight", down),
        "kv_a_layernorm": (f"{norms[1]}weight", None),
        "kv_b_proj": ("linear_kv_up_proj.weight", 0),
        "o_proj": ("linear_proj.weight", 1),
    }
    pieces = {
        f"self_attention.{target}": Piece(hf[f"self_attn.{source}.weight"], cut)
        for source, (target, cut) in names.items()
        if f"self_attn.{source}.weight" in hf
    }
    modules = {"wq_b": "linear_wq_b", "wk": "linear_wk", "k_norm": "k_norm", "weights_proj": "linear_weights_proj"}
    for name, tensor in hf.items():
        if name.startswith("self_attn.indexer."):  # whole on every rank
            module, kind = name.removeprefix("self_attn.indexer.").split(".")
            pieces[f"self_attention.core_attention.indexer.{modules[module]}.{kind}"] = Piece(tensor)
    return pieces


def _linear_attention(hf: Tensors, args: Namespace) -> Pieces:
    """Gated DeltaNet, whose projections Megatron-LM stores as blocks that are cut one by one."""
    key_heads, value_heads = args.linear_num_key_heads, args.linear_num_value_heads
    key, value = args.linear_key_head_dim, args.linear_value_head_dim
    convolved = (key_heads * key, key_heads * key, value_heads * value)
    rows = (*convolved, value_heads * value, value_heads, value_heads)
    return {
        "self_attention.in_proj.weight": Piece(_delta_projections(hf, args), rows),
        "self_attention.conv1d.weight": Piece(hf["linear_attn.conv1d.weight"], convolved),
        "self_attention.A_log": Piece(hf["linear_attn.A_log"], 0),
        "self_attention.dt_bias": Piece(hf["linear_attn.dt_bias"], 0),
        "self_attention.out_norm.weight": Piece(hf["linear_attn.norm.weight"] - 1),  # Megatron-LM adds 1 to every norm
        "self_attention.out_proj.weight": Piece(hf["linear_attn.out_proj.weight"], 1),
    }


def _delta_projections(hf: Tensors, args: Namespace) -> torch.Tensor:
    """All of them in one tensor: Qwen3-Next stores them for each key head, Qwen3.5 in this order."""
    if "linear_attn.in_proj_qkv.weight" in hf:
        return torch.cat([hf[f"linear_attn.in_proj_{part}.weight"] for part in ("qkv", "z", "b", "a")])
    key_heads, key, value = args.linear_num_key_heads, args.linear_key_head_dim, args.linear_value_head_dim
    ratio = args.linear_num_value_heads // key_heads
    projections = hf["linear_attn.in_proj_qkvz.weight"].unflatten(0, (key_heads, -1))
    gates = hf["linear_attn.in_proj_ba.weight"].unflatten(0, (key_heads, 2 * ratio))
    blocks = [*projections.split([key, key, ratio * value, ratio * value], dim=1), *gates.split(ratio, dim=1)]
    return torch.cat([block.flatten(0, 1) for block in blocks])


def _mlp(hf: Tensors, source: str, target: str) -> Pieces:
    pieces: Pieces = {}
    for kind in ("weight", "bias"):
        if f"{source}c_fc.{kind}" in hf:
            pieces[f"{target}linear_fc1.{kind}"] = Piece(hf[f"{source}c_fc.{kind}"], 0)
            pieces[f"{target}linear_fc2.{kind}"] = Piece(hf[f"{source}c_proj.{kind}"], 1 if kind == "weight" else None)
    if pieces:
        return pieces
    together = hf.get(f"{source}gate_up_proj.weight")
    if together is None:
        together = torch.cat([hf[f"{source}{name}_proj.weight"] for name in ("gate", "up")])
    half = len(together) // 2
    pieces[f"{target}linear_fc1.weight"] = Piece(together, (half, half))
    pieces[f"{target}linear_fc2.weight"] = Piece(hf[f"{source}down_proj.weight"], 1)
    return pieces


def _router_and_shared(hf: Tensors) -> Pieces:
    pieces = {"mlp.router.weight": Piece(hf["mlp.gate.weight"])}
    if "mlp.gate.e_score_correction_bias" in hf:
        pieces["mlp.router.expert_bias"] = Piece(hf["mlp.gate.e_score_correction_bias"].float())
    if "mlp.shared_expert_gate.weight" in hf:
        pieces["mlp.shared_experts.gate_weight"] = Piece(hf["mlp.shared_expert_gate.weight"])
    shared = "mlp.shared_expert." if "mlp.shared_expert.down_proj.weight" in hf else "mlp.shared_experts."
    return pieces | _mlp(hf, shared, "mlp.shared_experts.")


def _experts(hf: Tensors, args: Namespace, rank: Rank) -> dict[str, Any]:
    if "mlp.gate.weight" not in hf:
        return {}
    count, ranks = args.num_experts // args.expert_model_parallel_size, args.expert_tensor_parallel_size
    both: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for expert in range(rank.ep * count, (rank.ep + 1) * count):
        pieces = _mlp(hf, f"mlp.experts.{expert}.", "")
        for weights, number in zip(both, (1, 2), strict=True):
            weights.append(pieces[f"linear_fc{number}.weight"].of(rank.etp, ranks))
    return {f"mlp.experts.{name}": value for name, value in stored_experts(*both, args)}

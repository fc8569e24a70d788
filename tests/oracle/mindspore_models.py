"""Tiny models as MindSpore Transformers saves them: their values, in Hugging Face's names and in MindSpore's.

numpy and the standard library alone, since mindspore's own environment imports this module, too. Names and layouts are written
out from the published mindformers 1.7 to 2.1 packages, independently of `megatron_converters`. Every weight is a function of its
Hugging Face name, so that each element of a converted model has one right value.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Weights = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Latent:
    """Sizes of multi-latent attention."""

    q_rank: int = 12
    kv_rank: int = 10
    nope: int = 6
    rotated: int = 4
    value: int = 7


@dataclass(frozen=True)
class Model:
    """Sizes of a model, by default those of a dense one."""

    layers: int = 2
    hidden: int = 32
    heads: int = 4
    groups: int = 2
    dim: int = 8
    ffn: int = 48
    vocab: int = 61
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: int = 0
    dense_layers: int = 0  # of a model with experts: the first layers, which have none
    expert_ffn: int = 8
    shared_ffn: int = 0
    expert_bias: bool = False
    latent: Latent | None = None  # instead of heads, groups and their dim: multi-latent attention, with `heads` heads


#: By model_type of Hugging Face.
MODELS = {
    "llama": Model(),
    "qwen2": Model(qkv_bias=True),
    "qwen3": Model(tied=True, qk_norm=True),
    "qwen3_moe": Model(qk_norm=True, experts=4),
    "glm4_moe": Model(experts=4, dense_layers=1, shared_ffn=16, expert_bias=True),
    "deepseek_v3": Model(experts=4, dense_layers=1, shared_ffn=16, expert_bias=True, latent=Latent()),
}


@dataclass(frozen=True)
class Layout:
    """Order of the rows where MindSpore Transformers knows two; the defaults are those since 1.7."""

    mlp: str = (
        "interleaved"  # row 2i is the gate's i, row 2i + 1 the up projection's; "contiguous": all of the gate first
    )
    qkv: str = "grouped"  # per group: its queries, key, value; "contiguous": all queries, all keys, all values
    latent: str = (
        "split"  # tensors as in Megatron; "joined": both down projections are one tensor, and others have other names
    )


def values(name: str, *shape: int) -> npt.NDArray[np.float32]:
    """Float32 values between -0.25 and 0.25 of 24 random bits, or around 1 for a norm's weight."""
    state = np.arange(np.prod(shape), dtype=np.uint64) + (np.uint64(zlib.crc32(name.encode())) << np.uint64(32))
    for factor in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9):
        state = (state ^ (state >> np.uint64(29))) * np.uint64(factor)
    random = (state >> np.uint64(40)).astype(np.float64) / 2**25 - 0.25
    return (random + ("norm" in name)).astype(np.float32).reshape(shape)


def bfloat16_bits(array: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Bits of the values as bfloat16, rounded to the nearest, ties to even."""
    bits = array.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def hf_weights(model: Model) -> Weights:
    """All weights in Hugging Face's names; a tied model has no `lm_head.weight`."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab, model.hidden)}
    for layer in range(model.layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _layer_shapes(model, layer).items()}
    shapes["model.norm.weight"] = (model.hidden,)
    if not model.tied:
        shapes["lm_head.weight"] = (model.vocab, model.hidden)
    return {name: values(name, *shape) for name, shape in shapes.items()}


def _layer_shapes(model: Model, layer: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (model.hidden,)}
    shapes |= _latent_shapes(model, model.latent) if model.latent else _attention_shapes(model)
    shapes["post_attention_layernorm.weight"] = (model.hidden,)
    if not has_experts(model, layer):
        return shapes | _mlp_shapes("mlp", model.hidden, model.ffn)
    shapes["mlp.gate.weight"] = (model.experts, model.hidden)
    if model.expert_bias:
        shapes["mlp.gate.e_score_correction_bias"] = (model.experts,)
    for expert in range(model.experts):
        shapes |= _mlp_shapes(f"mlp.experts.{expert}", model.hidden, model.expert_ffn)
    if model.shared_ffn:
        shapes |= _mlp_shapes("mlp.shared_experts", model.hidden, model.shared_ffn)
    return shapes


def _attention_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    rows = {"q": model.heads * model.dim, "k": model.groups * model.dim, "v": model.groups * model.dim}
    shapes: dict[str, tuple[int, ...]] = {
        f"self_attn.{part}_proj.weight": (count, model.hidden) for part, count in rows.items()
    }
    if model.qkv_bias:
        shapes |= {f"self_attn.{part}_proj.bias": (count,) for part, count in rows.items()}
    if model.qk_norm:
        shapes |= {f"self_attn.{part}_norm.weight": (model.dim,) for part in "qk"}
    return shapes | {"self_attn.o_proj.weight": (model.hidden, rows["q"])}


def _latent_shapes(model: Model, latent: Latent) -> dict[str, tuple[int, ...]]:
    return {
        "self_attn.q_a_proj.weight": (latent.q_rank, model.hidden),
        "self_attn.q_a_layernorm.weight": (latent.q_rank,),
        "self_attn.q_b_proj.weight": (model.heads * (latent.nope + latent.rotated), latent.q_rank),
        "self_attn.kv_a_proj_with_mqa.weight": (latent.kv_rank + latent.rotated, model.hidden),
        "self_attn.kv_a_layernorm.weight": (latent.kv_rank,),
        "self_attn.kv_b_proj.weight": (model.heads * (latent.nope + latent.value), latent.kv_rank),
        "self_attn.o_proj.weight": (model.hidden, model.heads * latent.value),
    }


def _mlp_shapes(name: str, hidden: int, ffn: int) -> dict[str, tuple[int, ...]]:
    inner = {f"{name}.{part}_proj.weight": (ffn, hidden) for part in ("gate", "up")}
    return inner | {f"{name}.down_proj.weight": (hidden, ffn)}


def has_experts(model: Model, layer: int) -> bool:
    """Whether a layer has experts instead of one MLP."""
    return model.experts > 0 and layer >= model.dense_layers


def mindspore_weights(model: Model, layout: Layout, prefix: str = "") -> Weights:
    """The same weights in MindSpore Transformers' names and layouts, in the order of the modules."""
    hf = hf_weights(model)
    found = {"embedding.word_embeddings.weight": hf["model.embed_tokens.weight"]}
    for layer in range(model.layers):
        start = f"model.layers.{layer}."
        of_layer = {name.removeprefix(start): array for name, array in hf.items() if name.startswith(start)}
        named = {**_attention(of_layer, model, layout), **_feed_forward(of_layer, model, layout)}
        found |= {f"decoder.layers.{layer}.{name}": array for name, array in named.items()}
    found["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
    if not model.tied:
        found["output_layer.weight"] = hf["lm_head.weight"]
    return {prefix + name: np.ascontiguousarray(array) for name, array in found.items()}


def _attention(hf: Weights, model: Model, layout: Layout) -> Weights:
    found = {"input_layernorm.weight": hf["input_layernorm.weight"]}
    for kind in ("weight", "bias"):
        if f"self_attn.q_proj.{kind}" in hf:
            parts = [hf[f"self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"self_attention.linear_qkv.{kind}"] = _qkv(parts, model, layout)
    if model.latent:
        found |= {f"self_attention.{name}.weight": array for name, array in _latent(hf, layout).items()}
    for part in "qk":
        if f"self_attn.{part}_norm.weight" in hf:
            found[f"self_attention.{part}_layernorm.weight"] = hf[f"self_attn.{part}_norm.weight"]
    found["self_attention.linear_proj.weight"] = hf["self_attn.o_proj.weight"]
    found["pre_mlp_layernorm.weight"] = hf["post_attention_layernorm.weight"]
    return found


def _latent(hf: Weights, layout: Layout) -> Weights:
    parts = ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj")
    q_down, q_norm, q_up, kv_down, kv_norm, kv_up = (hf[f"self_attn.{part}.weight"] for part in parts)
    if layout.latent == "joined":
        down = np.concatenate([q_down, kv_down])
        return dict(linear_qkv=down, q_layernorm=q_norm, linear_qb=q_up, k_layernorm=kv_norm, linear_kvb=kv_up)
    queries = dict(linear_q_down_proj=q_down, q_layernorm=q_norm, linear_q_up_proj=q_up)
    return queries | dict(linear_kv_down_proj=kv_down, kv_layernorm=kv_norm, linear_kv_up_proj=kv_up)


def _qkv(parts: list[npt.NDArray[np.float32]], model: Model, layout: Layout) -> npt.NDArray[np.float32]:
    if layout.qkv == "contiguous":
        return np.concatenate(parts)
    queries, keys, values_ = (np.split(part, model.groups) for part in parts)
    return np.concatenate([rows for group in zip(queries, keys, values_, strict=True) for rows in group])


def _fc1(gate: npt.NDArray[np.float32], up: npt.NDArray[np.float32], layout: Layout) -> npt.NDArray[np.float32]:
    if layout.mlp == "contiguous":
        return np.concatenate([gate, up])
    return np.stack([gate, up], axis=1).reshape(-1, gate.shape[1])


def _feed_forward(hf: Weights, model: Model, layout: Layout) -> Weights:
    if "mlp.gate_proj.weight" in hf:
        return _mlp(hf, "mlp", layout)
    found = {"mlp.router.weight": hf["mlp.gate.weight"]}
    if model.expert_bias:
        found["mlp.router.expert_bias"] = hf["mlp.gate.e_score_correction_bias"]
    gates, ups, downs = (
        [hf[f"mlp.experts.{expert}.{part}_proj.weight"].T for expert in range(model.experts)]
        for part in ("gate", "up", "down")
    )
    # Experts one below the other, each (in, out); their gate and up projections are never interleaved.
    found["mlp.experts.weight1"] = np.concatenate([np.hstack(pair) for pair in zip(gates, ups, strict=True)])
    found["mlp.experts.weight2"] = np.concatenate(downs)
    return found | (_mlp(hf, "mlp.shared_experts", layout) if model.shared_ffn else {})


def _mlp(hf: Weights, name: str, layout: Layout) -> Weights:
    gate, up, down = (hf[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return {f"{name}.linear_fc1.weight": _fc1(gate, up, layout), f"{name}.linear_fc2.weight": down}

"""Names of slots in Megatron-LM checkpoints, one table per dialect, and the modules that own an `_extra_state`.

The dialects differ in their norms: the local spec has separate modules, Transformer Engine fuses them into the next linear.
Source: Megatron-LM core_v0.16.1, core/models/gpt/gpt_layer_specs.py, and state dicts written by core_v0.17.1 with
Transformer Engine 2.14.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...model.spec import ModelSpec

_LAYER = "decoder.layers.{layer}."
_ATTENTION = _LAYER + "self_attention."
_MLP = _LAYER + "mlp."

LOCAL = {
    "word_embeddings": "embedding.word_embeddings.weight",
    "input_norm": _LAYER + "input_layernorm.weight",
    "qkv": _ATTENTION + "linear_qkv.weight",
    "qkv_bias": _ATTENTION + "linear_qkv.bias",
    "q_norm": _ATTENTION + "q_layernorm.weight",
    "k_norm": _ATTENTION + "k_layernorm.weight",
    "proj": _ATTENTION + "linear_proj.weight",
    "proj_bias": _ATTENTION + "linear_proj.bias",
    "mlp_norm": _LAYER + "pre_mlp_layernorm.weight",
    "fc1": _MLP + "linear_fc1.weight",
    "fc1_bias": _MLP + "linear_fc1.bias",
    "fc2": _MLP + "linear_fc2.weight",
    "fc2_bias": _MLP + "linear_fc2.bias",
    "moe_norm": _LAYER + "pre_mlp_layernorm.weight",
    "router": _MLP + "router.weight",
    "shared_fc1": _MLP + "shared_experts.linear_fc1.weight",
    "shared_fc2": _MLP + "shared_experts.linear_fc2.weight",
    "shared_gate": _MLP + "shared_experts.gate_weight",
    "final_norm": "decoder.final_layernorm.weight",
    "output_layer": "output_layer.weight",
}
TRANSFORMER_ENGINE = {
    **LOCAL,
    "input_norm": _ATTENTION + "linear_qkv.layer_norm_weight",
    "mlp_norm": _MLP + "linear_fc1.layer_norm_weight",
}
DIALECTS = {"local": LOCAL, "transformer_engine": TRANSFORMER_ENGINE}

#: Layout of Megatron-LM's older grouped experts (`GroupedMLP` up to core_v0.18): one tensor for all experts of a rank, which holds
#: their transposed matrices one after the other, with the shapes [hidden, experts * rows] and [experts * columns, hidden].
STACKED = "stacked"
#: Names of experts by layout: `{expert}` is the number on the rank, `{global_expert}` the number in the model. Sequential and
#: grouped are Megatron-LM's (core/transformer/moe/experts.py), dynamic is Habana's.
EXPERTS = {
    "sequential": {
        "expert_fc1": _MLP + "experts.local_experts.{expert}.linear_fc1.weight",
        "expert_fc2": _MLP + "experts.local_experts.{expert}.linear_fc2.weight",
    },
    "grouped": {
        "expert_fc1": _MLP + "experts.linear_fc1.weight{expert}",
        "expert_fc2": _MLP + "experts.linear_fc2.weight{expert}",
    },
    "dynamic": {
        "expert_fc1": _MLP + "experts.local_expert_{global_expert}_linear_fc1_weight",
        "expert_fc2": _MLP + "experts.local_expert_{global_expert}_linear_fc2_weight",
    },
    STACKED: {"expert_fc1": _MLP + "experts.weight1", "expert_fc2": _MLP + "experts.weight2"},
}

#: Keys of distributed checkpoints, whichever implementation wrote them; stacked layers leave out "{layer}.".
DISTRIBUTED = {
    **TRANSFORMER_ENGINE,
    "expert_fc1": _MLP + "experts.experts.linear_fc1.weight",
    "expert_fc2": _MLP + "experts.experts.linear_fc2.weight",
}
#: The local implementation renames every layer's norm before the MLP as if the MLP were dense
#: (`sharded_state_dict_keys_map` of `get_gpt_layer_local_spec`).
DISTRIBUTED_LOCAL = {**DISTRIBUTED, "moe_norm": DISTRIBUTED["mlp_norm"]}
#: Part of a key before the expert's number, where each expert has its own keys (`singleton_local_shards`).
DISTRIBUTED_EXPERTS = "mlp.experts.experts."
#: Suffixes of an expert's gate and up where each expert has its own keys; they are separate tensors there.
GATE_AND_UP = ("_w", "_v")

_ATTENTION_LINEARS = (_ATTENTION + "linear_proj", _ATTENTION + "linear_qkv")
_MLP_LINEARS = (_MLP + "linear_fc1", _MLP + "linear_fc2")
_SHARED_LINEARS = (_MLP + "shared_experts.linear_fc1", _MLP + "shared_experts.linear_fc2")
_TE_ATTENTION = (_ATTENTION + "core_attention",)
_TE_QK_NORMS = (_ATTENTION + "q_layernorm", _ATTENTION + "k_layernorm")
_EXPERT_LINEARS = {
    "sequential": (
        _MLP + "experts.local_experts.{expert}.linear_fc1",
        _MLP + "experts.local_experts.{expert}.linear_fc2",
    ),
    "grouped": (_MLP + "experts.linear_fc1", _MLP + "experts.linear_fc2"),
    "dynamic": (),
    STACKED: (),
}


def keys(slot: str, layer: int | None, expert: int | None, global_expert: int | None) -> tuple[str, ...]:
    """All keys that a slot can have in a `torch` checkpoint; `layer` and `expert` are numbers on the rank."""
    tables = EXPERTS.values() if slot in EXPERTS[STACKED] else DIALECTS.values()
    numbers = {"layer": layer, "expert": expert, "global_expert": global_expert}
    return tuple(dict.fromkeys(table[slot].format(**numbers) for table in tables))


def extra_state(dialect: str, expert_layout: str, spec: ModelSpec, layer: int, experts: int) -> Iterator[str]:
    """Modules of a layer that own an `_extra_state`, with `{layer}` as placeholder; `layer` counts over all stages."""
    engine = dialect == "transformer_engine"
    yield from (*(_TE_ATTENTION if engine else ()), *_ATTENTION_LINEARS)
    if engine and spec.qk_norm:
        yield from _TE_QK_NORMS
    if not spec.is_moe(layer):
        yield from _MLP_LINEARS
        return
    if engine:
        yield _LAYER + "pre_mlp_layernorm"
    if spec.shared_ffn_hidden_size:
        yield from _SHARED_LINEARS
    for expert in range(experts if expert_layout == "sequential" else 1):
        yield from (name.replace("{expert}", str(expert)) for name in _EXPERT_LINEARS[expert_layout])


def distributed_extra_state(spec: ModelSpec, layer: int) -> Iterator[str]:
    """Modules of a layer whose `_extra_state` at least one release of megatron-core reads from a distributed checkpoint.

    `{layer}` stays a placeholder. Releases ignore surplus ones. Those of experts are under `DISTRIBUTED_EXPERTS`.
    """
    yield from (*_TE_ATTENTION, *_ATTENTION_LINEARS)
    if spec.qk_norm:
        yield from _TE_QK_NORMS
    if not spec.is_moe(layer):
        yield from _MLP_LINEARS
        return
    yield _LAYER + "pre_mlp_layernorm"
    if spec.shared_ffn_hidden_size:
        yield from _SHARED_LINEARS
    yield from (_LAYER + DISTRIBUTED_EXPERTS + linear for linear in ("linear_fc1", "linear_fc2"))


#: Modules of the last stage that own an `_extra_state`, by dialect.
LAST_EXTRA_STATE = {"local": ("output_layer",), "transformer_engine": ("decoder.final_layernorm", "output_layer")}
EXTRA_STATE_SUFFIX = "_extra_state"

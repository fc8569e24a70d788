"""Names of slots in Megatron-LM checkpoints, one table per dialect, and the modules that own an `_extra_state`.

The dialects differ in their norms: the local spec has separate modules, Transformer Engine fuses them into the next linear.
Source: Megatron-LM core_v0.16.1, core/models/gpt/gpt_layer_specs.py, and state dicts written by core_v0.17.1 with
Transformer Engine 2.14; for sparse attention core_v0.19.0, core/models/gpt/experimental_attention_variant_module_specs.py.
Transformer Engine 2.14. Norms after blocks, which Megatron-LM lacks, are named as by Megatron-Bridge (models/common/te_layers.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple

from ...model.layers import Attention, BlockExperts, GatedDelta, Latent, Layer, Mixture, Mlp
from ...model.slots import DECODER, SLOTS, Slot
from ...model.sparse_latent import SparseLatent
from ...model.spec import ModelSpec
from .options import DYNAMIC, GROUPED, SEQUENTIAL, SINGLE, STACKED

_LAYER = "decoder.layers.{layer}."
_ATTENTION = _LAYER + "self_attention."
_INDEXER = _ATTENTION + "core_attention.indexer."
_MLP = _LAYER + "mlp."
_MTP = "mtp.layers.{layer}."

#: Name of a slot; where it depends on what is in the layer, one for each kind of record, and with `Layer` that of a shared norm.
Name = str | Mapping[type, str]

EMBEDDINGS = "embedding.word_embeddings.weight"
#: End of the names of attention's output biases, in any dialect.
OUTPUT_BIAS = "self_attention.linear_proj.bias"
LOCAL: dict[str, Name] = {
    "word_embeddings": EMBEDDINGS,
    "position_embeddings": "embedding.position_embeddings.weight",
    "input_norm": _LAYER + "input_layernorm.weight",
    "input_norm_bias": _LAYER + "input_layernorm.bias",
    "qkv": _ATTENTION + "linear_qkv.weight",
    "qkv_bias": _ATTENTION + "linear_qkv.bias",
    "q_norm": _ATTENTION + "q_layernorm.weight",
    "q_norm_bias": _ATTENTION + "q_layernorm.bias",
    "k_norm": _ATTENTION + "k_layernorm.weight",
    "k_norm_bias": _ATTENTION + "k_layernorm.bias",
    "sinks": _ATTENTION + "core_attention.softmax_offset",
    "q_down": _ATTENTION + "linear_q_down_proj.weight",
    "q_latent_norm": _ATTENTION + "q_layernorm.weight",
    "q_up": _ATTENTION + "linear_q_up_proj.weight",
    "q_whole": _ATTENTION + "linear_q_proj.weight",
    "kv_down": _ATTENTION + "linear_kv_down_proj.weight",
    "kv_latent_norm": _ATTENTION + "kv_layernorm.weight",
    "kv_up": _ATTENTION + "linear_kv_up_proj.weight",
    "indexer_query": _INDEXER + "linear_wq_b.weight",
    "indexer_key": _INDEXER + "linear_wk.weight",
    "indexer_norm": _INDEXER + "k_norm.weight",
    "indexer_norm_bias": _INDEXER + "k_norm.bias",
    "indexer_weights": _INDEXER + "linear_weights_proj.weight",
    "delta_in": _ATTENTION + "in_proj.weight",
    "delta_conv": _ATTENTION + "conv1d.weight",
    "delta_a_log": _ATTENTION + "A_log",
    "delta_dt_bias": _ATTENTION + "dt_bias",
    "delta_norm": _ATTENTION + "out_norm.weight",
    "delta_out": _ATTENTION + "out_proj.weight",
    "proj": _ATTENTION + "linear_proj.weight",
    "proj_bias": _ATTENTION + "linear_proj.bias",
    "attention_post_norm": _ATTENTION + "linear_proj.post_layernorm.weight",
    "attention_post_norm_bias": _ATTENTION + "linear_proj.post_layernorm.bias",
    "mlp_norm": _LAYER + "pre_mlp_layernorm.weight",
    "mlp_norm_bias": _LAYER + "pre_mlp_layernorm.bias",
    "fc1": _MLP + "linear_fc1.weight",
    "fc1_bias": _MLP + "linear_fc1.bias",
    "fc2": _MLP + "linear_fc2.weight",
    "fc2_bias": _MLP + "linear_fc2.bias",
    "mlp_post_norm": _MLP + "linear_fc2.post_layernorm.weight",
    "mlp_post_norm_bias": _MLP + "linear_fc2.post_layernorm.bias",
    "router": _MLP + "router.weight",
    "router_bias": _MLP + "router.bias",
    "expert_bias": _MLP + "router.expert_bias",
    "shared_fc1": _MLP + "shared_experts.linear_fc1.weight",
    "shared_fc2": _MLP + "shared_experts.linear_fc2.weight",
    "shared_gate": _MLP + "shared_experts.gate_weight",
    "block_router": _MLP + "moe_router.weight",
    "block_router_norm": _MLP + "router_norm.weight",
    "block_in": _MLP + "moe_w_in.weight",
    "block_out": _MLP + "moe_w_out.weight",
    "mtp_embedding_norm": _MTP + "enorm.weight",
    "mtp_embedding_norm_bias": _MTP + "enorm.bias",
    "mtp_hidden_norm": _MTP + "hnorm.weight",
    "mtp_hidden_norm_bias": _MTP + "hnorm.bias",
    "mtp_proj": _MTP + "eh_proj.weight",
    "mtp_final_norm": _MTP + "final_layernorm.weight",
    "mtp_final_norm_bias": _MTP + "final_layernorm.bias",
    "final_norm": "decoder.final_layernorm.weight",
    "final_norm_bias": "decoder.final_layernorm.bias",
    "output_layer": "output_layer.weight",
    "output_layer_bias": "output_layer.bias",
    "score": "output_layer.weight",
}


def _fused(kind: str) -> dict[str, Name]:
    """Names of the norms before both blocks and of latents, `kind` "weight" or "bias", which are part of the next linear."""
    own = f"_norm{'' if kind == 'weight' else '_bias'}"
    return {
        "input" + own: {
            Attention: f"{_ATTENTION}linear_qkv.layer_norm_{kind}",
            Latent: f"{_LAYER}input_layernorm.{kind}",
            SparseLatent: f"{_LAYER}input_layernorm.{kind}",
            GatedDelta: f"{_ATTENTION}in_proj.layer_norm_{kind}",
            Layer: f"{_LAYER}input_layernorm.{kind}",  # two linears read it, so that it is part of neither
        },
        "mlp" + own: {
            Mlp: f"{_MLP}linear_fc1.layer_norm_{kind}",
            Mixture: f"{_LAYER}pre_mlp_layernorm.{kind}",
            BlockExperts: f"{_LAYER}pre_mlp_layernorm.{kind}",
        },
    }


TRANSFORMER_ENGINE: dict[str, Name] = {
    **LOCAL,
    **_fused("weight"),
    **_fused("bias"),
    # An indexer reads the latents of queries behind their norm, which is therefore part of no linear.
    "q_latent_norm": {
        Latent: _ATTENTION + "linear_q_up_proj.layer_norm_weight",
        SparseLatent: _ATTENTION + "q_layernorm.weight",
    },
    "kv_latent_norm": {
        Latent: _ATTENTION + "linear_kv_up_proj.layer_norm_weight",
        SparseLatent: _ATTENTION + "kv_layernorm.weight",
    },
}
DIALECTS = {"local": LOCAL, "transformer_engine": TRANSFORMER_ENGINE}

#: Slots that `--mla-down-proj-fusion` stores as one tensor, in this order, and that tensor.
DOWN_PROJECTIONS = ("q_down", "kv_down")
DOWN_PROJECTION = _ATTENTION + "linear_qkv_down_proj.weight"


def _with_fused_down(slot: str, fused: str) -> Name:
    """Name of a slot of which attention over latents alone, without an indexer, has the name `fused`."""
    usual = TRANSFORMER_ENGINE[slot]
    by_kind = dict.fromkeys((Latent, SparseLatent), usual) if isinstance(usual, str) else usual
    return {**by_kind, Latent: fused}


#: Names with fused down projections, which Transformer Engine alone has; the norm before them is part of their linear.
FUSED_DOWN: dict[str, Name] = {
    **TRANSFORMER_ENGINE,
    **{slot: _with_fused_down(slot, DOWN_PROJECTION) for slot in DOWN_PROJECTIONS},
    **{
        slot: _with_fused_down(slot, f"{_ATTENTION}linear_qkv_down_proj.layer_norm_{kind}")
        for slot, kind in (("input_norm", "weight"), ("input_norm_bias", "bias"))
    },
}

#: Names of experts by layout: `{expert}` is the number on the rank, `{global_expert}` the number in the model. Sequential and
#: grouped are Megatron-LM's (core/transformer/moe/experts.py), dynamic is Habana's. Single is that of `moe_single_grouped_weight`
#: and `moe_single_grouped_bias` (core_v0.18 on): one tensor [experts, rows, columns] for all experts of a rank. Stacked is that of
#: Megatron-LM's older grouped experts (`GroupedMLP` up to core_v0.18): one tensor for all experts of a rank, which holds their
#: transposed matrices one after the other, with the shapes [hidden, experts * rows] and [experts * columns, hidden]. Neither
#: stacked nor dynamic experts have biases.
EXPERTS = {
    SEQUENTIAL: {
        "expert_fc1": _MLP + "experts.local_experts.{expert}.linear_fc1.weight",
        "expert_fc2": _MLP + "experts.local_experts.{expert}.linear_fc2.weight",
        "expert_fc1_bias": _MLP + "experts.local_experts.{expert}.linear_fc1.bias",
        "expert_fc2_bias": _MLP + "experts.local_experts.{expert}.linear_fc2.bias",
    },
    GROUPED: {
        "expert_fc1": _MLP + "experts.linear_fc1.weight{expert}",
        "expert_fc2": _MLP + "experts.linear_fc2.weight{expert}",
        "expert_fc1_bias": _MLP + "experts.linear_fc1.bias{expert}",
        "expert_fc2_bias": _MLP + "experts.linear_fc2.bias{expert}",
    },
    SINGLE: {
        "expert_fc1": _MLP + "experts.linear_fc1.weight",
        "expert_fc2": _MLP + "experts.linear_fc2.weight",
        "expert_fc1_bias": _MLP + "experts.linear_fc1.bias",
        "expert_fc2_bias": _MLP + "experts.linear_fc2.bias",
    },
    DYNAMIC: {
        "expert_fc1": _MLP + "experts.local_expert_{global_expert}_linear_fc1_weight",
        "expert_fc2": _MLP + "experts.local_expert_{global_expert}_linear_fc2_weight",
    },
    STACKED: {"expert_fc1": _MLP + "experts.weight1", "expert_fc2": _MLP + "experts.weight2"},
}

#: Keys of distributed checkpoints, whichever implementation wrote them; stacked layers leave out "{layer}.".
DISTRIBUTED: dict[str, Name] = {
    **TRANSFORMER_ENGINE,
    "expert_fc1": _MLP + "experts.experts.linear_fc1.weight",
    "expert_fc2": _MLP + "experts.experts.linear_fc2.weight",
    "expert_fc1_bias": _MLP + "experts.experts.linear_fc1.bias",
    "expert_fc2_bias": _MLP + "experts.experts.linear_fc2.bias",
}
#: The local implementation renames every layer's norm before the MLP as if the MLP were dense
#: (`sharded_state_dict_keys_map` of `get_gpt_layer_local_spec`).
LOCAL_ENDS = {f"pre_mlp_layernorm.{kind}": f"mlp.linear_fc1.layer_norm_{kind}" for kind in ("weight", "bias")}
DISTRIBUTED_LOCAL: dict[str, Name] = {
    **DISTRIBUTED,
    "mlp_norm": _LAYER + LOCAL_ENDS["pre_mlp_layernorm.weight"],
    "mlp_norm_bias": _LAYER + LOCAL_ENDS["pre_mlp_layernorm.bias"],
}
#: Part of a key before the expert's number, where each expert has its own keys (`singleton_local_shards`).
DISTRIBUTED_EXPERTS = "mlp.experts.experts."
#: Suffixes of an expert's gate and up where each expert has its own keys; they are separate tensors there.
GATE_AND_UP = ("_w", "_v")
#: Slots whose blocks are separate tensors of a distributed checkpoint, named after the block (core/ssm/gated_delta_net.py).
_SPLIT = frozenset({"delta_in", "delta_conv"})

#: Names, in rank files, of the module that holds the layer of a multi-token prediction layer: from 0.17 on, and before. In a
#: distributed checkpoint it is always the older one.
MTP_MODULES = ("mtp_model_layer", "transformer_layer")


def name_of(table: Mapping[str, Name], slot: str, kind: Layer, stack: str, module: str = MTP_MODULES[-1]) -> str:
    """Name template of a slot in one kind of layer, with `{layer}` and experts as placeholders.

    In a `stack` of multi-token prediction the layer is in the module `module`.
    """
    name = table[slot]
    if not isinstance(name, str):
        records = [kind] if kind.shares_norm else [kind.mixer, kind.feed]
        name = next(name[type(record)] for record in records if type(record) in name)
    return _in_stack(name, stack, module)


def _in_stack(name: str, stack: str, module: str) -> str:
    """Template of a decoder layer's name as it is in `stack`, where multi-token prediction has the layer in `module`."""
    return name if stack == DECODER else name.replace(_LAYER, f"{_MTP}{module}.")


def keys(slot: str, kind: Layer, stack: str) -> tuple[str, ...]:
    """Templates of all names that a slot can have in rank files."""
    of_experts: list[Mapping[str, Name]] = [table for table in EXPERTS.values() if slot in table]
    tables = of_experts or (*DIALECTS.values(), FUSED_DOWN)
    modules = MTP_MODULES if stack != DECODER else MTP_MODULES[-1:]
    return tuple(dict.fromkeys(name_of(table, slot, kind, stack, module) for table in tables for module in modules))


class _Owner(NamedTuple):
    """Module that owns an `_extra_state` where its layer has the slot; those not `local` do so in Transformer Engine alone.

    `sparse` is whether it does so in sparse attention alone, or in other attention alone; None in both.
    """

    module: str
    slot: str
    local: bool = True
    sparse: bool | None = None


_OWNERS = (
    _Owner(_ATTENTION + "core_attention", "proj", local=False, sparse=False),
    _Owner(_ATTENTION + "linear_proj", "proj"),
    _Owner(_ATTENTION + "linear_qkv", "qkv"),
    _Owner(_ATTENTION + "q_layernorm", "q_norm", local=False),
    _Owner(_ATTENTION + "k_layernorm", "k_norm", local=False),
    _Owner(_LAYER + "input_layernorm", "kv_down", local=False),
    _Owner(_ATTENTION + "linear_q_down_proj", "q_down"),
    _Owner(_ATTENTION + "linear_q_up_proj", "q_up"),
    _Owner(_ATTENTION + "linear_q_proj", "q_whole"),
    _Owner(_ATTENTION + "linear_kv_down_proj", "kv_down"),
    _Owner(_ATTENTION + "linear_kv_up_proj", "kv_up"),
    _Owner(_ATTENTION + "q_layernorm", "q_latent_norm", local=False, sparse=True),
    _Owner(_ATTENTION + "kv_layernorm", "kv_latent_norm", local=False, sparse=True),
    _Owner(_INDEXER + "linear_wq_b", "indexer_query"),
    _Owner(_INDEXER + "linear_wk", "indexer_key"),
    _Owner(_INDEXER + "k_norm", "indexer_norm", local=False),
    _Owner(_INDEXER + "linear_weights_proj", "indexer_weights"),
    _Owner(_ATTENTION + "in_proj", "delta_in"),
    _Owner(_ATTENTION + "out_proj", "delta_out"),
    _Owner(_ATTENTION + "out_norm", "delta_norm", local=False),
    _Owner(_MLP + "linear_fc1", "fc1"),
    _Owner(_MLP + "linear_fc2", "fc2"),
    _Owner(_ATTENTION + "linear_proj.post_layernorm", "attention_post_norm", local=False),
    _Owner(_MLP + "linear_fc2.post_layernorm", "mlp_post_norm", local=False),
    _Owner(_LAYER + "pre_mlp_layernorm", "router", local=False),
    _Owner(_MLP + "shared_experts.linear_fc1", "shared_fc1"),
    _Owner(_MLP + "shared_experts.linear_fc2", "shared_fc2"),
)
#: Norms that have none where they span all heads: Transformer Engine has no such norm.
_HEAD_NORMS = ("q_norm", "k_norm")
#: Norm that both blocks of a layer share, which is no part of a linear.
_SHARED_NORM = _Owner(_LAYER + "input_layernorm", "input_norm", local=False)
_MTP_OWNERS = (
    _Owner(_MTP + "enorm", "mtp_embedding_norm", local=False),
    _Owner(_MTP + "hnorm", "mtp_hidden_norm", local=False),
    _Owner(_MTP + "eh_proj", "mtp_proj"),
    _Owner(_MTP + "final_layernorm", "mtp_final_norm", local=False),
)
_EXPERT_LINEARS = {
    "sequential": (
        _MLP + "experts.local_experts.{expert}.linear_fc1",
        _MLP + "experts.local_experts.{expert}.linear_fc2",
    ),
    **dict.fromkeys((GROUPED, SINGLE), (_MLP + "experts.linear_fc1", _MLP + "experts.linear_fc2")),
    "dynamic": (),
    STACKED: (),
}


def extra_state(
    dialect: str,
    expert_layout: str,
    spec: ModelSpec,
    kind: Layer,
    experts: int,
    stack: str,
    module: str,
    *,
    fused_down: bool = False,
) -> Iterator[str]:
    """Modules of a layer that own an `_extra_state`, with `{layer}` as placeholder; `experts` counts those of a rank.

    `fused_down` is whether the down projections of latents are one module.
    """
    engine = dialect == "transformer_engine"
    found = [owner.module for owner in _owners(spec, kind, stack) if engine or owner.local]
    if fused_down and type(kind.mixer) is Latent:
        apart = (_LAYER + "input_layernorm", *(_module_of(str(LOCAL[slot])) for slot in DOWN_PROJECTIONS))
        found = [_module_of(DOWN_PROJECTION), *(name for name in found if name not in apart)]
    if kind.is_moe:
        for expert in range(experts if expert_layout == "sequential" else 1):
            found += (name.replace("{expert}", str(expert)) for name in _EXPERT_LINEARS[expert_layout])
    yield from (_in_stack(name, stack, module) for name in found)


def _module_of(name: str) -> str:
    """Module of a tensor."""
    return name.rpartition(".")[0]


def distributed_extra_state(spec: ModelSpec, kind: Layer, stack: str) -> Iterator[str]:
    """Modules of a layer whose `_extra_state` at least one release of megatron-core reads from a distributed checkpoint.

    `{layer}` stays a placeholder. Releases ignore surplus ones. Those of experts are under `DISTRIBUTED_EXPERTS`.
    """
    found = [owner.module for owner in _owners(spec, kind, stack)]
    if kind.is_moe:
        found += (_LAYER + DISTRIBUTED_EXPERTS + linear for linear in ("linear_fc1", "linear_fc2"))
    yield from (_in_stack(name, stack, MTP_MODULES[-1]) for name in found)


def _owners(spec: ModelSpec, kind: Layer, stack: str) -> Iterator[_Owner]:
    """Owners of an `_extra_state` in a layer, without its experts."""
    if kind.shares_norm:
        yield _SHARED_NORM
    others = (None, isinstance(kind.mixer, SparseLatent))
    for owner in (*_OWNERS, *(_MTP_OWNERS if stack != DECODER else ())):
        over_heads = owner.slot in _HEAD_NORMS and kind.norms_over_heads
        if owner.sparse in others and not over_heads and SLOTS[owner.slot].extent(spec, kind) is not None:
            yield owner


class SplitPart(NamedTuple):
    """Block of a slot that is a tensor of its own: the end of its key, and its rows in the slot."""

    suffix: str
    first_row: int
    rows: int


def split_parts(slot: Slot, kind: Layer, spec: ModelSpec) -> tuple[SplitPart, ...]:
    """Parts of a slot that a distributed checkpoint stores as separate tensors; empty if it stores the slot whole."""
    if slot.name not in _SPLIT:
        return ()
    blocks = slot.size(spec, kind).blocks
    starts = accumulate((block.rows for block in blocks), initial=0)
    return tuple(SplitPart(f".{block.name}", start, block.rows) for start, block in zip(starts, blocks, strict=False))


def stacks_layers(spec: ModelSpec) -> bool:
    """Whether a distributed checkpoint has a tensor for all layers, with these as first axis: if all are of one kind.

    Source: `sharded_state_dict` of core/transformer/transformer_block.py. It does not look at shared indexers, whose layers have
    no tensors to stack; models that share have dense layers, too.
    """
    kinds = {spec.kinds[number] for number in spec.order}
    uneven = any(isinstance(kind.mixer, GatedDelta) or getattr(kind.mixer, "shared_indexer", False) for kind in kinds)
    return len({type(kind.feed) for kind in kinds}) == 1 and not uneven


#: Modules of the last stage that own an `_extra_state`, by dialect.
LAST_EXTRA_STATE = {"local": ("output_layer",), "transformer_engine": ("decoder.final_layernorm", "output_layer")}
EXTRA_STATE_SUFFIX = "_extra_state"

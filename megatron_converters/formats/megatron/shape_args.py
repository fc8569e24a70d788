"""Args that tensors tell: what a checkpoint without args, or with few, can be read by. Heads are the one thing that shapes lack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...model.layers import LAYER_NORM, RMS_NORM
from ...storage.tensor import StoredTensor
from .detecting import Detected, Shape
from .names import EMBEDDINGS

_HEAD = "output_layer.weight"
#: Attributes of an uneven split of layers over stages.
_SPLIT = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
#: Rows that are compared at a time.
_ROWS = 1024
#: Attributes that change no weight, and what stands for them where nothing says them.
PLACEHOLDERS = {
    "max_position_embeddings": 4096,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "layernorm_epsilon": 1e-5,
    "moe_router_topk": 2,
}


def size_args(found: Detected) -> dict[str, Any]:
    """Attributes of how the checkpoint is cut."""
    sizes, vpp = found.sizes, len(found.stages) // found.sizes.pp
    return {
        "tensor_model_parallel_size": sizes.tp,
        "pipeline_model_parallel_size": sizes.pp,
        "expert_model_parallel_size": sizes.ep,
        **({"virtual_pipeline_model_parallel_size": vpp} if vpp > 1 else {}),
        **_uneven_args(found),
        **({"num_experts": _experts(found), "moe_ffn_hidden_size": _expert_size(found)} if _experts(found) else {}),
    }


def _uneven_args(found: Detected) -> dict[str, Any]:
    """Layout of stages that hold different numbers of layers, unless the args have the split."""
    if len(set(found.layers_of_stages)) == 1 or any(map(found.arg, _SPLIT)):
        return {}
    stages = ["t" * count for count in found.layers_of_stages]
    return {"pipeline_model_parallel_layout": f"E{'|'.join(stages)}L"}


def shape_args(found: Detected, heads: int, groups: int) -> dict[str, Any]:
    """Attributes of the model, with these numbers of query heads and of query groups; placeholders for what changes no weight."""
    attention = _latent_args(found, heads) if found.is_latent else _attention_args(found, heads, groups)
    return {
        **PLACEHOLDERS,
        **size_args(found),
        "num_layers": found.num_layers,
        "hidden_size": found.hidden_size,
        "ffn_hidden_size": found.ffn_hidden_size or _expert_size(found),
        "swiglu": found.is_gated,
        "normalization": LAYER_NORM if found.has("norm.bias") or found.has("layer_norm_bias") else RMS_NORM,
        "add_bias_linear": found.has("self_attention.linear_proj.bias"),
        "untie_embeddings_and_output_weights": not is_tied(found),
        **attention,
        **_mixture_args(found),
    }


def is_tied(found: Detected) -> bool:
    """Whether the output layer is the embeddings: it is absent, or, on another stage than these, equal to them."""
    first, last = found.ends
    head, embeddings = last.get(_HEAD), first.get(EMBEDDINGS)
    if head is None:
        return True
    return found.sizes.pp > 1 and embeddings is not None and _equal(head, embeddings)


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    a, b = one.array(), other.array()
    return all(bool((a[row : row + _ROWS] == b[row : row + _ROWS]).all()) for row in range(0, len(a), _ROWS))


def _attention_args(found: Detected, heads: int, groups: int) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": (found.query_rows or 0) // heads,
        "add_qkv_bias": found.has("self_attention.linear_qkv.bias"),
        "qk_layernorm": found.head_dim is not None,
    }


def _latent_args(found: Detected, heads: int) -> dict[str, Any]:
    """Attributes of multi-latent attention. Releases before 0.14 cut the rows of down projections."""
    tp = found.sizes.tp
    proj, up, down = (
        found.shape(f"self_attention.linear_{name}.weight") or (0, 0) for name in ("proj", "kv_up_proj", "kv_down_proj")
    )
    q_up = found.shape("self_attention.linear_q_up_proj.weight")
    queries = q_up or found.shape("self_attention.linear_q_proj.weight") or (0, 0)
    rank = up[1]
    rotated = (down[0] if down[0] > rank else down[0] * tp) - rank
    return {
        "multi_latent_attention": True,
        "num_attention_heads": heads,
        "q_lora_rank": None if q_up is None else q_up[1],
        "kv_lora_rank": rank,
        "qk_pos_emb_head_dim": rotated,
        "qk_head_dim": queries[0] * tp // heads - rotated,
        "v_head_dim": proj[1] * tp // heads,
        "rope_type": "rope",
    }


def _mixture_args(found: Detected) -> dict[str, Any]:
    if not _experts(found):
        return {}
    shared = found.shape("mlp.shared_experts.linear_fc2.weight")
    return {
        "moe_layer_freq": [int(_router(layer) is not None) for layer in found.layers],
        "moe_shared_expert_intermediate_size": None if shared is None else shared[1] * found.sizes.tp,
        "moe_shared_expert_gate": found.has("mlp.shared_experts.gate_weight"),
        "moe_router_enable_expert_bias": found.has("mlp.router.expert_bias"),
    }


def _router(layer: Mapping[str, Shape]) -> Shape | None:
    return layer.get("mlp.router.weight")


def _experts(found: Detected) -> int:
    return next((shape[0] for layer in found.layers if (shape := _router(layer)) is not None), 0)


def _expert_size(found: Detected) -> int | None:
    """Size of an expert's MLP, if experts are cut as other linears are."""
    columns = next(_expert_columns(found), None)
    return None if columns is None else columns * found.sizes.tp


def _expert_columns(found: Detected) -> Iterator[int]:
    """Columns of experts' second linears on one rank."""
    for layer in found.layers:
        for key, shape in layer.items():
            if key.startswith("mlp.experts.") and "linear_fc2" in key and len(shape) == 2:
                yield shape[1]

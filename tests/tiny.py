"""Tiny specs and in-memory pieces, for tests of the arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_converters.basics.dtypes import dtype_named
from megatron_converters.conversion.composing import Piece, StoredName
from megatron_converters.formats.queue.source import MemoryTensor
from megatron_converters.model.layers import ALL_HEADS, AROUND, EACH_HEAD, GELU, LAYER_NORM, QUICK_GELU
from megatron_converters.model.spec import ModelSpec, PerLayer

_MOE: dict[str, Any] = dict(num_experts=4, moe_ffn_hidden_size=4, moe_router_topk=2)
_LATENT: dict[str, Any] = dict(mixer="latent", kv_lora_rank=6, qk_head_dim=4, qk_pos_emb_head_dim=2, v_head_dim=4)
_DELTA: dict[str, Any] = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=2,
    linear_value_head_dim=4,
    linear_conv_kernel_dim=3,
)


def tiny_spec(**fields: Any) -> ModelSpec:
    """Spec with 4 heads in 2 query groups and head dimension 2; `fields` replace its properties."""
    return ModelSpec.of(
        **{
            "family": "llama",
            "num_layers": 2,
            "hidden_size": 8,
            "ffn_hidden_size": 4,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 2,
            "vocab_size": 5,
            "max_position_embeddings": 64,
            "norm_epsilon": 1e-5,
            "rotary_base": 10000.0,
            "dtype": dtype_named("float32"),
            **fields,
        }
    )


def piece(values: npt.NDArray[Any], rows: Sequence[int], col: int = 0, dtype: str = "int64", where: str = "") -> Piece:
    """Piece of a slot: `values` in the carrier type of `dtype`; `rows` are the slot's rows of its rows."""
    data = MemoryTensor(dtype_named(dtype), values.shape, values)
    return Piece(
        data, np.array(rows, np.int64), col, StoredName("here", where or f"rows {list(rows)} from column {col}")
    )


#: Models that differ in kind; together they have every slot.
KINDS: dict[str, ModelSpec] = {
    "dense": tiny_spec(),
    "layer norms and all biases": tiny_spec(
        normalization=LAYER_NORM,
        learned_positions=True,
        rope=False,
        qk_norm=EACH_HEAD,
        qkv_bias=True,
        proj_bias=True,
        mlp_bias=True,
        mtp_num_layers=1,
    ),
    "no gate": tiny_spec(activation=GELU, gated=False, mlp_bias=True),
    "parallel blocks": tiny_spec(
        **dict(normalization=LAYER_NORM, activation=GELU, gated=False, parallel_block=True, head_bias=True),
        **dict(qkv_bias=True, proj_bias=True, mlp_bias=True),
    ),
    "norms before and after blocks": tiny_spec(normalization=LAYER_NORM, block_norms=AROUND),
    "mixture": tiny_spec(
        **_MOE, qk_norm=ALL_HEADS, moe_router_enable_expert_bias=True, shared_ffn_hidden_size=6, shared_gate=True
    ),
    "mixture with biases": tiny_spec(
        **_MOE,
        **dict(qkv_bias=True, proj_bias=True, mlp_bias=True, sinks=True),
        **dict(activation=QUICK_GELU, glu_linear_offset=1.0, activation_func_clamp_value=7.0),
    ),
    "classifier": tiny_spec(num_labels=3),
    "block experts": tiny_spec(feed=PerLayer(["mlp", "block experts"]), block_experts=3, block_expert_size=4),
    "latents": tiny_spec(**_LATENT, q_lora_rank=4, feed=PerLayer(["mlp", "moe"]), **_MOE),
    "latents of keys and values alone": tiny_spec(**_LATENT),
    "sparse attention": tiny_spec(
        **{**_LATENT, "mixer": "sparse latent", "q_lora_rank": 4, "mtp_num_layers": 1},
        **dict(dsa_indexer_n_heads=3, dsa_indexer_head_dim=4, dsa_indexer_topk=8),
        shared_indexer=PerLayer([False, True]),
    ),
    "gated DeltaNet": tiny_spec(
        **_DELTA, mixer=PerLayer(["gated delta", "attention"]), attention_output_gate=True, zero_centred=True
    ),
}

"""The hub's vocabulary: every kind of tensor a GPT can have, its shape, and how tensor parallelism cuts it.

A slot's tensor is Megatron's whole tensor: unsharded, without vocabulary padding, query groups packed, gate above up.
Shapes and cuts: Megatron-LM core_v0.16.1, megatron/core/transformer/{attention,multi_latent_attention,mlp}.py,
core/ssm/gated_delta_net.py, core/transformer/moe/, multi_token_prediction.py, and core/tensor_parallel/layers.py; of indexers
core_v0.19.0, core/transformer/experimental_attention_variant/dsa.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from . import extents
from .extents import (
    Extent,
    SizeOf,
    after_blocks,
    before_attention,
    before_mlp,
    of_block_experts,
    of_feed,
    of_mixer,
    of_model,
    of_norm,
)
from .layers import Attention, GatedDelta, Latent, Layer, Mixture, Mlp
from .sparse_latent import SparseLatent
from .spec import ModelSpec


class Shard(Enum):
    """The dimension that tensor parallelism cuts."""

    COLUMN = "dim 0"
    ROW = "dim 1"
    REPLICATED = "not cut"

    @property
    def cuts(self) -> bool:
        """Whether each rank holds a share of its own; otherwise all hold the same."""
        return self is not Shard.REPLICATED


class Scope(Enum):
    """Where a slot belongs: to the first stage, to a layer, to the last stage, or to a multi-token prediction layer."""

    FIRST = "first"
    LAYER = "layer"
    LAST = "last"
    MTP = "multi-token prediction layer"


class Precision(Enum):
    """Dtype that a slot keeps: the model's, one that is never rounded below the source's, or float32."""

    MODEL = "the model's"
    STORED = "at least the stored one"
    FLOAT32 = "float32 in Megatron-LM, at least the stored one elsewhere"


@dataclass(frozen=True, eq=False)
class Slot:
    """One kind of tensor; each kind is one object per process."""

    name: str
    scope: Scope
    shard: Shard
    extent: SizeOf
    vocab: bool = False
    precision: Precision = Precision.MODEL
    #: One tensor per expert; cut by expert-tensor parallelism instead of tensor parallelism.
    expert: bool = False

    def size(self, spec: ModelSpec, layer: Layer) -> Extent:
        """Size in a kind of layer that has the slot; raises `KeyError` where it has not."""
        found = self.extent(spec, layer)
        if found is None:
            raise KeyError(f"{self.name} is not in {layer}")
        return found

    def shape(self, spec: ModelSpec, layer: Layer) -> tuple[int, ...]:
        """The whole tensor's shape in elements."""
        found = self.size(spec, layer)
        return (found.rows, *found.rest)

    def matrix(self, spec: ModelSpec, layer: Layer) -> tuple[int, int]:
        """The shape as rows and columns, which are the product of all further dimensions; a vector has one column."""
        rows, *rest = self.shape(spec, layer)
        return rows, math.prod(rest)


DECODER, MTP = "decoder", "mtp"


class Ref(NamedTuple):
    """Address of one tensor of a model: the only address that endpoints exchange.

    `layer` counts from 0 over all stages, `expert` over all ranks. `stack` says whose layer it is: the decoder's, or one of
    multi-token prediction.
    """

    slot: Slot
    layer: int | None = None
    expert: int | None = None
    stack: str = DECODER

    def __str__(self) -> str:
        stack = "" if self.stack == DECODER else f"{self.stack} "
        where = "" if self.layer is None else f"{stack}layer {self.layer} "
        return where + ("" if self.expert is None else f"expert {self.expert} ") + self.slot.name

    def kind(self, spec: ModelSpec) -> Layer:
        """Kind of its layer; for a tensor of no layer the first kind, which does not matter there."""
        return spec.kinds[self.kind_number(spec)]

    def kind_number(self, spec: ModelSpec) -> int:
        """Number of its layer's kind."""
        if self.layer is None:
            return 0
        return (spec.order if self.stack == DECODER else spec.mtp)[self.layer]

    def shape(self, spec: ModelSpec) -> tuple[int, ...]:
        """The whole tensor's shape in elements."""
        return self._sizes(spec)[0]

    def matrix(self, spec: ModelSpec) -> tuple[int, int]:
        """The shape as rows and columns."""
        return self._sizes(spec)[1]

    def _sizes(self, spec: ModelSpec) -> tuple[tuple[int, ...], tuple[int, int]]:
        key = self.slot, self.kind_number(spec)
        found = spec.shapes.get(key)
        if found is None:
            kind = self.kind(spec)
            found = spec.shapes[key] = self.slot.shape(spec, kind), self.slot.matrix(spec, kind)
        return found


_FIRST, _LAYER, _LAST, _MTP = Scope.FIRST, Scope.LAYER, Scope.LAST, Scope.MTP
_COLUMN, _ROW, _REPLICATED = Shard.COLUMN, Shard.ROW, Shard.REPLICATED
_STORED = Precision.STORED
_ALL = (
    Slot("word_embeddings", _FIRST, _COLUMN, of_model(extents.vocab), vocab=True),
    Slot(
        *("position_embeddings", _FIRST, _REPLICATED),
        of_model(lambda s: extents.rows_of(s.max_position_embeddings, s.hidden_size) if s.learned_positions else None),
    ),
    # The layer of multi-token prediction begins with its own norms and a projection of embedding and hidden state.
    Slot("mtp_embedding_norm", _MTP, _REPLICATED, of_model(extents.hidden)),
    Slot("mtp_embedding_norm_bias", _MTP, _REPLICATED, of_model(extents.norm_bias)),
    Slot("mtp_hidden_norm", _MTP, _REPLICATED, of_model(extents.hidden)),
    Slot("mtp_hidden_norm_bias", _MTP, _REPLICATED, of_model(extents.norm_bias)),
    Slot("mtp_proj", _MTP, _COLUMN, of_model(lambda s: extents.rows_of(s.hidden_size, 2 * s.hidden_size))),
    Slot("input_norm", _LAYER, _REPLICATED, of_norm(before_attention, extents.hidden)),
    Slot("input_norm_bias", _LAYER, _REPLICATED, of_norm(before_attention, extents.norm_bias)),
    Slot("qkv", _LAYER, _COLUMN, of_mixer(Attention, lambda a, s: Extent((extents.qkv(a),), (s.hidden_size,)))),
    Slot(
        "qkv_bias",
        _LAYER,
        _COLUMN,
        of_mixer(Attention, lambda a, _: Extent((extents.qkv(a),)) if a.qkv_bias else None),
    ),
    Slot(
        "q_norm",
        _LAYER,
        _REPLICATED,
        of_mixer(Attention, lambda a, _: extents.head_norm(a, a.num_attention_heads)),
    ),
    Slot("q_norm_bias", _LAYER, _REPLICATED, of_mixer(Attention, extents.head_norm_bias)),
    Slot(
        "k_norm",
        _LAYER,
        _REPLICATED,
        of_mixer(Attention, lambda a, _: extents.head_norm(a, a.num_query_groups)),
    ),
    Slot("k_norm_bias", _LAYER, _REPLICATED, of_mixer(Attention, extents.head_norm_bias)),
    Slot(
        *("sinks", _LAYER, _COLUMN),
        of_mixer(Attention, lambda a, _: extents.rows_of(a.num_attention_heads) if a.sinks else None),
    ),
    Slot(
        *("q_down", _LAYER, _REPLICATED),
        of_mixer(Latent, lambda a, s: extents.rows_of(a.q_lora_rank, s.hidden_size) if a.q_lora_rank else None),
    ),
    Slot(
        "q_latent_norm",
        _LAYER,
        _REPLICATED,
        of_mixer(Latent, lambda a, _: extents.rows_of(a.q_lora_rank) if a.q_lora_rank else None),
    ),
    Slot("q_up", _LAYER, _COLUMN, of_mixer(Latent, extents.query_up)),
    Slot("q_whole", _LAYER, _COLUMN, of_mixer(Latent, extents.whole_query)),
    Slot(
        *("kv_down", _LAYER, _REPLICATED),
        of_mixer(Latent, lambda a, s: extents.rows_of(a.kv_lora_rank + a.qk_pos_emb_head_dim, s.hidden_size)),
    ),
    Slot("kv_latent_norm", _LAYER, _REPLICATED, of_mixer(Latent, lambda a, _: extents.rows_of(a.kv_lora_rank))),
    Slot(
        *("kv_up", _LAYER, _COLUMN),
        of_mixer(
            Latent, lambda a, _: extents.per_head(a.num_attention_heads, a.qk_head_dim + a.v_head_dim, a.kv_lora_rank)
        ),
    ),
    # Every rank has the whole indexer. Small differences of the weights of its heads change which tokens are chosen.
    Slot("indexer_query", _LAYER, _REPLICATED, of_mixer(SparseLatent, extents.indexer_query)),
    Slot("indexer_key", _LAYER, _REPLICATED, of_mixer(SparseLatent, extents.indexer_key)),
    Slot("indexer_norm", _LAYER, _REPLICATED, of_mixer(SparseLatent, extents.indexer_norm)),
    Slot("indexer_norm_bias", _LAYER, _REPLICATED, of_mixer(SparseLatent, extents.indexer_norm)),
    Slot(
        *("indexer_weights", _LAYER, _REPLICATED),
        of_mixer(SparseLatent, extents.indexer_weights),
        precision=_STORED,
    ),
    Slot(
        *("delta_in", _LAYER, _COLUMN),
        of_mixer(GatedDelta, lambda d, s: Extent(extents.delta_blocks(d, convolved=False), (s.hidden_size,))),
    ),
    Slot(
        *("delta_conv", _LAYER, _COLUMN),
        of_mixer(
            GatedDelta, lambda d, _: Extent(extents.delta_blocks(d, convolved=True), (1, d.linear_conv_kernel_dim))
        ),
    ),
    Slot(
        "delta_a_log",
        _LAYER,
        _COLUMN,
        of_mixer(GatedDelta, lambda d, _: extents.rows_of(d.linear_num_value_heads)),
    ),
    Slot(
        "delta_dt_bias",
        _LAYER,
        _COLUMN,
        of_mixer(GatedDelta, lambda d, _: extents.rows_of(d.linear_num_value_heads)),
    ),
    Slot(
        "delta_norm",
        _LAYER,
        _REPLICATED,
        of_mixer(GatedDelta, lambda d, _: extents.rows_of(d.linear_value_head_dim)),
    ),
    Slot(
        *("delta_out", _LAYER, _ROW),
        of_mixer(GatedDelta, lambda d, s: extents.rows_of(s.hidden_size, d.values, col_units=d.linear_num_value_heads)),
    ),
    Slot("proj", _LAYER, _ROW, extents.proj),
    Slot(
        "proj_bias",
        _LAYER,
        _REPLICATED,
        of_mixer(Attention, lambda a, s: extents.hidden(s) if a.proj_bias else None),
    ),
    Slot("attention_post_norm", _LAYER, _REPLICATED, of_norm(after_blocks, extents.hidden)),
    Slot("attention_post_norm_bias", _LAYER, _REPLICATED, of_norm(after_blocks, extents.norm_bias)),
    Slot("mlp_norm", _LAYER, _REPLICATED, of_norm(before_mlp, extents.hidden)),
    Slot("mlp_norm_bias", _LAYER, _REPLICATED, of_norm(before_mlp, extents.norm_bias)),
    Slot(
        "fc1",
        _LAYER,
        _COLUMN,
        of_feed(Mlp, lambda m, s: extents.first_linear(m.ffn_hidden_size, m.gated, s.hidden_size)),
    ),
    Slot(
        *("fc1_bias", _LAYER, _COLUMN),
        of_feed(Mlp, lambda m, _: extents.first_linear(m.ffn_hidden_size, m.gated) if m.mlp_bias else None),
    ),
    Slot("fc2", _LAYER, _ROW, of_feed(Mlp, lambda m, s: extents.rows_of(s.hidden_size, m.ffn_hidden_size))),
    Slot("fc2_bias", _LAYER, _REPLICATED, of_feed(Mlp, lambda m, s: extents.hidden(s) if m.mlp_bias else None)),
    Slot("mlp_post_norm", _LAYER, _REPLICATED, of_norm(after_blocks, extents.hidden)),
    Slot("mlp_post_norm_bias", _LAYER, _REPLICATED, of_norm(after_blocks, extents.norm_bias)),
    # Small differences of a router change which expert is chosen; Megatron-LM holds the bias of the choice in float32.
    Slot(
        "router",
        _LAYER,
        _REPLICATED,
        of_feed(Mixture, lambda m, s: extents.rows_of(m.num_experts, s.hidden_size)),
        precision=_STORED,
    ),
    Slot(
        *("router_bias", _LAYER, _REPLICATED),
        of_feed(Mixture, lambda m, _: extents.rows_of(m.num_experts) if m.mlp_bias else None),
        precision=_STORED,
    ),
    Slot(
        *("expert_bias", _LAYER, _REPLICATED),
        of_feed(Mixture, lambda m, _: extents.rows_of(m.num_experts) if m.moe_router_enable_expert_bias else None),
        precision=Precision.FLOAT32,
    ),
    Slot(
        *("expert_fc1", _LAYER, _COLUMN),
        of_feed(Mixture, lambda m, s: extents.first_linear(m.moe_ffn_hidden_size, m.gated, s.hidden_size)),
        expert=True,
    ),
    Slot(
        "expert_fc2",
        _LAYER,
        _ROW,
        of_feed(Mixture, lambda m, s: extents.rows_of(s.hidden_size, m.moe_ffn_hidden_size)),
        expert=True,
    ),
    # Megatron-LM has biases only in experts that it does not cut.
    Slot(
        *("expert_fc1_bias", _LAYER, _COLUMN),
        of_feed(Mixture, lambda m, _: extents.first_linear(m.moe_ffn_hidden_size, m.gated) if m.mlp_bias else None),
        expert=True,
    ),
    Slot(
        *("expert_fc2_bias", _LAYER, _REPLICATED),
        of_feed(Mixture, lambda m, s: extents.hidden(s) if m.mlp_bias else None),
        expert=True,
    ),
    Slot("shared_fc1", _LAYER, _COLUMN, of_feed(Mixture, extents.shared)),
    Slot(
        *("shared_fc2", _LAYER, _ROW),
        of_feed(
            Mixture,
            lambda m, s: extents.rows_of(s.hidden_size, m.shared_ffn_hidden_size) if m.shared_ffn_hidden_size else None,
        ),
    ),
    Slot(
        "shared_gate",
        _LAYER,
        _REPLICATED,
        of_feed(Mixture, lambda m, s: extents.rows_of(1, s.hidden_size) if m.shared_gate else None),
    ),
    Slot("block_router", _LAYER, _COLUMN, of_block_experts(lambda b, s: (s.hidden_size,)), precision=_STORED),
    Slot("block_router_norm", _LAYER, _COLUMN, of_block_experts(lambda b, _: () if b.router_norm else None)),
    Slot("block_in", _LAYER, _COLUMN, of_block_experts(lambda b, s: (b.block_expert_size, s.hidden_size))),
    Slot("block_out", _LAYER, _COLUMN, of_block_experts(lambda b, s: (s.hidden_size, b.block_expert_size))),
    Slot("mtp_final_norm", _MTP, _REPLICATED, of_model(extents.hidden)),
    Slot("mtp_final_norm_bias", _MTP, _REPLICATED, of_model(extents.norm_bias)),
    Slot("final_norm", _LAST, _REPLICATED, of_model(extents.hidden)),
    Slot("final_norm_bias", _LAST, _REPLICATED, of_model(extents.norm_bias)),
    Slot(
        *("output_layer", _LAST, _COLUMN),
        of_model(lambda s: extents.vocab(s) if s.num_labels is None and not s.tied else None),
        vocab=True,
    ),
    # The head of a classifier, which verl and mcore-bridge hold where the output layer would be, whole on each rank.
    Slot(
        *("score", _LAST, _REPLICATED),
        of_model(lambda s: extents.rows_of(s.num_labels, s.hidden_size) if s.num_labels else None),
    ),
    Slot(
        "output_layer_bias",
        _LAST,
        _COLUMN,
        of_model(lambda s: extents.rows_of(s.vocab_size) if s.head_bias else None),
        vocab=True,
    ),
)
SLOTS = {slot.name: slot for slot in _ALL}


def refs(spec: ModelSpec) -> Iterator[Ref]:
    """Every tensor of the model, in the order of Megatron-LM's queue protocol: embeddings, layers, final norm, output.

    Layers of multi-token prediction come after the others.
    """
    if not spec.addresses:
        spec.addresses[:] = _refs(spec)  # at once, since threads may ask at the same time
    return iter(spec.addresses)


def _refs(spec: ModelSpec) -> Iterator[Ref]:
    held = [[slot for slot in _ALL if slot.extent(spec, kind) is not None] for kind in spec.kinds]
    experts = {number: range(spec.num_experts) for number, kind in enumerate(spec.kinds) if kind.is_moe}
    first = held[0]
    yield from (Ref(slot) for slot in first if slot.scope is _FIRST)
    for stack, scopes, order in ((DECODER, (_LAYER,), spec.order), (MTP, (_LAYER, _MTP), spec.mtp)):
        for layer, kind in enumerate(order):
            for slot in held[kind]:
                if slot.scope in scopes:
                    numbers = experts[kind] if slot.expert else (None,)
                    yield from (Ref(slot, layer, expert, stack) for expert in numbers)
    yield from (Ref(slot) for slot in first if slot.scope is _LAST)

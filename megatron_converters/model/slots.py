"""The hub's vocabulary: every kind of tensor a GPT can have, its shape, and how tensor parallelism cuts it.

A slot's tensor is Megatron's whole tensor: unsharded, without vocabulary padding, query groups packed, gate above up.
Shapes and cuts: Megatron-LM core_v0.16.1, megatron/core/transformer/{attention,multi_latent_attention,mlp}.py,
core/ssm/gated_delta_net.py, core/transformer/moe/, multi_token_prediction.py, and core/tensor_parallel/layers.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, TypeVar

from .layers import ALL_HEADS, LAYER_NORM, Attention, GatedDelta, Latent, Layer, Mixture, Mlp
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


class Block(NamedTuple):
    """Rows of a slot that are cut on their own, in `units` that stay whole (0: single rows).

    A unit that is `shared` may be cut where there are more ranks than units (query groups).
    """

    name: str
    rows: int
    units: int = 0
    shared: bool = False

    def fits(self, ways: int) -> bool:
        """Whether it can be cut `ways` ways."""
        units = self.units or self.rows
        whole = units % ways == 0 or (self.shared and ways % units == 0)
        return whole and self.rows % ways == 0


class Extent(NamedTuple):
    """Size of a slot: its blocks of rows, its further dimensions, and the units of columns that stay whole (0: single ones)."""

    blocks: tuple[Block, ...]
    rest: tuple[int, ...] = ()
    units: int = 0

    @property
    def rows(self) -> int:
        """Rows of all blocks together."""
        return sum(block.rows for block in self.blocks)


#: Size of a slot in one kind of layer; None where that has none.
SizeOf = Callable[[ModelSpec, Layer], Extent | None]


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


_Record = TypeVar("_Record")


def _rows(count: int, *rest: int, name: str = "", units: int = 0, col_units: int = 0) -> Extent:
    return Extent((Block(name, count, units),), rest, col_units)


def _model(extent: Callable[[ModelSpec], Extent | None]) -> SizeOf:
    """Slot of the model, whatever its layers are."""
    return lambda spec, _: extent(spec)


def _mixer(record: type[_Record], extent: Callable[[_Record, ModelSpec], Extent | None]) -> SizeOf:
    """Slot of the layers whose mixer is a `record`."""
    return lambda spec, layer: extent(layer.mixer, spec) if isinstance(layer.mixer, record) else None


def _feed(record: type[_Record], extent: Callable[[_Record, ModelSpec], Extent | None]) -> SizeOf:
    """Slot of the layers whose second block is a `record`."""
    return lambda spec, layer: extent(layer.feed, spec) if isinstance(layer.feed, record) else None


def _hidden(spec: ModelSpec) -> Extent:
    return _rows(spec.hidden_size)


def _norm_bias(spec: ModelSpec) -> Extent | None:
    return _rows(spec.hidden_size) if spec.norm.normalization == LAYER_NORM else None


def _vocab(spec: ModelSpec) -> Extent:
    return _rows(spec.vocab_size, spec.hidden_size)


def _qkv(mixer: Attention) -> Block:
    heads, groups = mixer.num_attention_heads, mixer.num_query_groups
    packed = (2 if mixer.attention_output_gate else 1) * heads + 2 * groups
    return Block("groups", packed * mixer.kv_channels, groups, shared=True)


def _head_norm(mixer: Attention, heads: int) -> Extent | None:
    return _rows((heads if mixer.qk_norm == ALL_HEADS else 1) * mixer.kv_channels) if mixer.qk_norm else None


def _head_norm_bias(mixer: Attention, spec: ModelSpec) -> Extent | None:
    return _rows(mixer.kv_channels) if mixer.qk_norm and spec.norm.normalization == LAYER_NORM else None


def _proj(spec: ModelSpec, layer: Layer) -> Extent | None:
    mixer = layer.mixer
    if isinstance(mixer, GatedDelta):
        return None
    heads = mixer.num_attention_heads
    width = mixer.kv_channels if isinstance(mixer, Attention) else mixer.v_head_dim
    return _rows(spec.hidden_size, heads * width, col_units=heads)


def _per_head(heads: int, dim: int, *rest: int) -> Extent:
    return _rows(heads * dim, *rest, units=heads)


def _query_up(mixer: Latent, spec: ModelSpec) -> Extent | None:
    if mixer.q_lora_rank is None:
        return None
    return _per_head(mixer.num_attention_heads, mixer.qk_head_dim + mixer.qk_pos_emb_head_dim, mixer.q_lora_rank)


def _whole_query(mixer: Latent, spec: ModelSpec) -> Extent | None:
    if mixer.q_lora_rank is not None:
        return None
    return _per_head(mixer.num_attention_heads, mixer.qk_head_dim + mixer.qk_pos_emb_head_dim, spec.hidden_size)


def _delta_blocks(mixer: GatedDelta, *, convolved: bool) -> tuple[Block, ...]:
    """Blocks of the input projection of gated DeltaNet, or those that its convolution runs over."""
    keys, values = mixer.linear_num_key_heads, mixer.linear_num_value_heads
    blocks = (Block("query", mixer.keys, keys), Block("key", mixer.keys, keys), Block("value", mixer.values, values))
    if convolved:
        return blocks
    return (*blocks, Block("z", mixer.values, values), Block("beta", values, values), Block("alpha", values, values))


def _first_linear(size: int, gated: bool, *rest: int) -> Extent:
    return Extent((Block("gate", size), Block("up", size)), rest) if gated else _rows(size, *rest)


def _shared(mixture: Mixture, spec: ModelSpec) -> Extent | None:
    size = mixture.shared_ffn_hidden_size
    return _first_linear(size, mixture.gated, spec.hidden_size) if size else None


_FIRST, _LAYER, _LAST, _MTP = Scope.FIRST, Scope.LAYER, Scope.LAST, Scope.MTP
_COLUMN, _ROW, _REPLICATED = Shard.COLUMN, Shard.ROW, Shard.REPLICATED
_STORED = Precision.STORED

_ALL = (
    Slot("word_embeddings", _FIRST, _COLUMN, _model(_vocab), vocab=True),
    Slot(
        *("position_embeddings", _FIRST, _REPLICATED),
        _model(lambda s: _rows(s.max_position_embeddings, s.hidden_size) if s.learned_positions else None),
    ),
    # The layer of multi-token prediction begins with its own norms and a projection of embedding and hidden state.
    Slot("mtp_embedding_norm", _MTP, _REPLICATED, _model(_hidden)),
    Slot("mtp_embedding_norm_bias", _MTP, _REPLICATED, _model(_norm_bias)),
    Slot("mtp_hidden_norm", _MTP, _REPLICATED, _model(_hidden)),
    Slot("mtp_hidden_norm_bias", _MTP, _REPLICATED, _model(_norm_bias)),
    Slot("mtp_proj", _MTP, _COLUMN, _model(lambda s: _rows(s.hidden_size, 2 * s.hidden_size))),
    Slot("input_norm", _LAYER, _REPLICATED, _model(_hidden)),
    Slot("input_norm_bias", _LAYER, _REPLICATED, _model(_norm_bias)),
    Slot("qkv", _LAYER, _COLUMN, _mixer(Attention, lambda a, s: Extent((_qkv(a),), (s.hidden_size,)))),
    Slot("qkv_bias", _LAYER, _COLUMN, _mixer(Attention, lambda a, _: Extent((_qkv(a),)) if a.qkv_bias else None)),
    Slot("q_norm", _LAYER, _REPLICATED, _mixer(Attention, lambda a, _: _head_norm(a, a.num_attention_heads))),
    Slot("q_norm_bias", _LAYER, _REPLICATED, _mixer(Attention, _head_norm_bias)),
    Slot("k_norm", _LAYER, _REPLICATED, _mixer(Attention, lambda a, _: _head_norm(a, a.num_query_groups))),
    Slot("k_norm_bias", _LAYER, _REPLICATED, _mixer(Attention, _head_norm_bias)),
    Slot(
        *("q_down", _LAYER, _REPLICATED),
        _mixer(Latent, lambda a, s: _rows(a.q_lora_rank, s.hidden_size) if a.q_lora_rank else None),
    ),
    Slot(
        "q_latent_norm",
        _LAYER,
        _REPLICATED,
        _mixer(Latent, lambda a, _: _rows(a.q_lora_rank) if a.q_lora_rank else None),
    ),
    Slot("q_up", _LAYER, _COLUMN, _mixer(Latent, _query_up)),
    Slot("q_whole", _LAYER, _COLUMN, _mixer(Latent, _whole_query)),
    Slot(
        *("kv_down", _LAYER, _REPLICATED),
        _mixer(Latent, lambda a, s: _rows(a.kv_lora_rank + a.qk_pos_emb_head_dim, s.hidden_size)),
    ),
    Slot("kv_latent_norm", _LAYER, _REPLICATED, _mixer(Latent, lambda a, _: _rows(a.kv_lora_rank))),
    Slot(
        *("kv_up", _LAYER, _COLUMN),
        _mixer(Latent, lambda a, _: _per_head(a.num_attention_heads, a.qk_head_dim + a.v_head_dim, a.kv_lora_rank)),
    ),
    Slot(
        *("delta_in", _LAYER, _COLUMN),
        _mixer(GatedDelta, lambda d, s: Extent(_delta_blocks(d, convolved=False), (s.hidden_size,))),
    ),
    Slot(
        *("delta_conv", _LAYER, _COLUMN),
        _mixer(GatedDelta, lambda d, _: Extent(_delta_blocks(d, convolved=True), (1, d.linear_conv_kernel_dim))),
    ),
    Slot("delta_a_log", _LAYER, _COLUMN, _mixer(GatedDelta, lambda d, _: _rows(d.linear_num_value_heads))),
    Slot("delta_dt_bias", _LAYER, _COLUMN, _mixer(GatedDelta, lambda d, _: _rows(d.linear_num_value_heads))),
    Slot("delta_norm", _LAYER, _REPLICATED, _mixer(GatedDelta, lambda d, _: _rows(d.linear_value_head_dim))),
    Slot(
        *("delta_out", _LAYER, _ROW),
        _mixer(GatedDelta, lambda d, s: _rows(s.hidden_size, d.values, col_units=d.linear_num_value_heads)),
    ),
    Slot("proj", _LAYER, _ROW, _proj),
    Slot("proj_bias", _LAYER, _REPLICATED, _mixer(Attention, lambda a, s: _hidden(s) if a.proj_bias else None)),
    Slot("mlp_norm", _LAYER, _REPLICATED, _model(_hidden)),
    Slot("mlp_norm_bias", _LAYER, _REPLICATED, _model(_norm_bias)),
    Slot("fc1", _LAYER, _COLUMN, _feed(Mlp, lambda m, s: _first_linear(m.ffn_hidden_size, m.gated, s.hidden_size))),
    Slot(
        *("fc1_bias", _LAYER, _COLUMN),
        _feed(Mlp, lambda m, _: _first_linear(m.ffn_hidden_size, m.gated) if m.mlp_bias else None),
    ),
    Slot("fc2", _LAYER, _ROW, _feed(Mlp, lambda m, s: _rows(s.hidden_size, m.ffn_hidden_size))),
    Slot("fc2_bias", _LAYER, _REPLICATED, _feed(Mlp, lambda m, s: _hidden(s) if m.mlp_bias else None)),
    # Small differences of a router change which expert is chosen; Megatron-LM holds the bias of the choice in float32.
    Slot(
        "router",
        _LAYER,
        _REPLICATED,
        _feed(Mixture, lambda m, s: _rows(m.num_experts, s.hidden_size)),
        precision=_STORED,
    ),
    Slot(
        *("expert_bias", _LAYER, _REPLICATED),
        _feed(Mixture, lambda m, _: _rows(m.num_experts) if m.moe_router_enable_expert_bias else None),
        precision=Precision.FLOAT32,
    ),
    Slot(
        *("expert_fc1", _LAYER, _COLUMN),
        _feed(Mixture, lambda m, s: _first_linear(m.moe_ffn_hidden_size, m.gated, s.hidden_size)),
        expert=True,
    ),
    Slot(
        "expert_fc2",
        _LAYER,
        _ROW,
        _feed(Mixture, lambda m, s: _rows(s.hidden_size, m.moe_ffn_hidden_size)),
        expert=True,
    ),
    Slot("shared_fc1", _LAYER, _COLUMN, _feed(Mixture, _shared)),
    Slot(
        *("shared_fc2", _LAYER, _ROW),
        _feed(
            Mixture, lambda m, s: _rows(s.hidden_size, m.shared_ffn_hidden_size) if m.shared_ffn_hidden_size else None
        ),
    ),
    Slot(
        "shared_gate",
        _LAYER,
        _REPLICATED,
        _feed(Mixture, lambda m, s: _rows(1, s.hidden_size) if m.shared_gate else None),
    ),
    Slot("mtp_final_norm", _MTP, _REPLICATED, _model(_hidden)),
    Slot("mtp_final_norm_bias", _MTP, _REPLICATED, _model(_norm_bias)),
    Slot("final_norm", _LAST, _REPLICATED, _model(_hidden)),
    Slot("final_norm_bias", _LAST, _REPLICATED, _model(_norm_bias)),
    Slot("output_layer", _LAST, _COLUMN, _model(lambda s: None if s.tied else _vocab(s)), vocab=True),
)
SLOTS = {slot.name: slot for slot in _ALL}


def refs(spec: ModelSpec) -> Iterator[Ref]:
    """Every tensor of the model, in the order of Megatron-LM's queue protocol: embeddings, layers, final norm, output.

    Layers of multi-token prediction come after the others.
    """
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

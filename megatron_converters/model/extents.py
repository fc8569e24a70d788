"""Sizes of slots: their rows as blocks that are cut on their own, by the records of a kind of layer.

Shapes and cuts: Megatron-LM core_v0.16.1, megatron/core/transformer/{attention,multi_latent_attention,mlp}.py,
core/ssm/gated_delta_net.py and core/transformer/moe/.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from .layers import AFTER, ALL_HEADS, BEFORE, LAYER_NORM, Attention, BlockExperts, GatedDelta, Latent, Layer, Mixture
from .sparse_latent import SparseLatent
from .spec import ModelSpec


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


_Record = TypeVar("_Record")


def rows_of(count: int, *rest: int, name: str = "", units: int = 0, col_units: int = 0) -> Extent:
    """Rows without blocks, by further dimensions; `units` of rows and `col_units` of columns stay whole."""
    return Extent((Block(name, count, units),), rest, col_units)


def of_model(extent: Callable[[ModelSpec], Extent | None]) -> SizeOf:
    """Slot of the model, whatever its layers are."""
    return lambda spec, _: extent(spec)


def of_mixer(record: type[_Record], extent: Callable[[_Record, ModelSpec], Extent | None]) -> SizeOf:
    """Slot of the layers whose mixer is a `record`."""
    return lambda spec, layer: extent(layer.mixer, spec) if isinstance(layer.mixer, record) else None


def of_feed(record: type[_Record], extent: Callable[[_Record, ModelSpec], Extent | None]) -> SizeOf:
    """Slot of the layers whose second block is a `record`."""
    return lambda spec, layer: extent(layer.feed, spec) if isinstance(layer.feed, record) else None


def hidden(spec: ModelSpec) -> Extent:
    """Vector of the hidden size."""
    return rows_of(spec.hidden_size)


def norm_bias(spec: ModelSpec) -> Extent | None:
    """Bias of a norm that has one."""
    return rows_of(spec.hidden_size) if spec.norm.normalization == LAYER_NORM else None


def of_norm(has: Callable[[Layer], bool], extent: Callable[[ModelSpec], Extent | None]) -> SizeOf:
    """Slot of a norm of the layers that have it."""
    return lambda spec, layer: extent(spec) if has(layer) else None


def before_attention(layer: Layer) -> bool:
    """Whether a norm is before attention."""
    return layer.block_norms != AFTER


def before_mlp(layer: Layer) -> bool:
    """Whether a norm is before the MLP that is not attention's."""
    return layer.block_norms != AFTER and not layer.shares_norm


def after_blocks(layer: Layer) -> bool:
    """Whether norms are after attention and MLP."""
    return layer.block_norms != BEFORE


def vocab(spec: ModelSpec) -> Extent:
    """Embedding of each token."""
    return rows_of(spec.vocab_size, spec.hidden_size)


def qkv(mixer: Attention) -> Block:
    """Query groups: in each its query heads (with gates, if any), its key and its value."""
    heads, groups = mixer.num_attention_heads, mixer.num_query_groups
    packed = (2 if mixer.attention_output_gate else 1) * heads + 2 * groups
    return Block("groups", packed * mixer.kv_channels, groups, shared=True)


def head_norm(mixer: Attention, heads: int) -> Extent | None:
    """Norm of queries or keys: of each head, or of all `heads` together."""
    return rows_of((heads if mixer.qk_norm == ALL_HEADS else 1) * mixer.kv_channels) if mixer.qk_norm else None


def head_norm_bias(mixer: Attention, spec: ModelSpec) -> Extent | None:
    """Bias of a norm of queries or keys that has one."""
    return rows_of(mixer.kv_channels) if mixer.qk_norm and spec.norm.normalization == LAYER_NORM else None


def proj(spec: ModelSpec, layer: Layer) -> Extent | None:
    """Output projection of attention, whose columns are heads."""
    mixer = layer.mixer
    if isinstance(mixer, GatedDelta):
        return None
    heads = mixer.num_attention_heads
    width = mixer.kv_channels if isinstance(mixer, Attention) else mixer.v_head_dim
    return rows_of(spec.hidden_size, heads * width, col_units=heads)


def per_head(heads: int, dim: int, *rest: int) -> Extent:
    """Rows of heads, which stay whole."""
    return rows_of(heads * dim, *rest, units=heads)


def query_up(mixer: Latent, spec: ModelSpec) -> Extent | None:
    """Queries from their latents."""
    if mixer.q_lora_rank is None:
        return None
    return per_head(mixer.num_attention_heads, mixer.qk_head_dim + mixer.qk_pos_emb_head_dim, mixer.q_lora_rank)


def whole_query(mixer: Latent, spec: ModelSpec) -> Extent | None:
    """Queries without latents."""
    if mixer.q_lora_rank is not None:
        return None
    return per_head(mixer.num_attention_heads, mixer.qk_head_dim + mixer.qk_pos_emb_head_dim, spec.hidden_size)


def indexer_query(mixer: SparseLatent, spec: ModelSpec) -> Extent | None:
    """Queries of an indexer of its own, from the latents of the attention's."""
    rows = mixer.dsa_indexer_n_heads * mixer.dsa_indexer_head_dim
    return None if mixer.shared_indexer else rows_of(rows, mixer.q_lora_rank or spec.hidden_size)


def indexer_key(mixer: SparseLatent, spec: ModelSpec) -> Extent | None:
    """Key of an indexer of its own, which all of its heads share."""
    return None if mixer.shared_indexer else rows_of(mixer.dsa_indexer_head_dim, spec.hidden_size)


def indexer_norm(mixer: SparseLatent, _: ModelSpec) -> Extent | None:
    """LayerNorm of an indexer's key, whatever the norms of the model are: its weight, and its bias."""
    return None if mixer.shared_indexer else rows_of(mixer.dsa_indexer_head_dim)


def indexer_weights(mixer: SparseLatent, spec: ModelSpec) -> Extent | None:
    """Weights of an indexer's heads."""
    return None if mixer.shared_indexer else rows_of(mixer.dsa_indexer_n_heads, spec.hidden_size)


def delta_blocks(mixer: GatedDelta, *, convolved: bool) -> tuple[Block, ...]:
    """Blocks of the input projection of gated DeltaNet, or those that its convolution runs over."""
    keys, values = mixer.linear_num_key_heads, mixer.linear_num_value_heads
    blocks = (Block("query", mixer.keys, keys), Block("key", mixer.keys, keys), Block("value", mixer.values, values))
    if convolved:
        return blocks
    return (*blocks, Block("z", mixer.values, values), Block("beta", values, values), Block("alpha", values, values))


def first_linear(size: int, gated: bool, *rest: int) -> Extent:
    """Gate above up, or up alone."""
    return Extent((Block("gate", size), Block("up", size)), rest) if gated else rows_of(size, *rest)


def of_block_experts(rest: Callable[[BlockExperts, ModelSpec], tuple[int, ...] | None]) -> SizeOf:
    """Slot with a row for each block expert. How such rows would be cut is not known, so that all are one unit."""

    def extent(feed: BlockExperts, spec: ModelSpec) -> Extent | None:
        found = rest(feed, spec)
        return None if found is None else rows_of(feed.block_experts, *found, units=1)

    return of_feed(BlockExperts, extent)


def shared(mixture: Mixture, spec: ModelSpec) -> Extent | None:
    """First linear of a shared expert."""
    size = mixture.shared_ffn_hidden_size
    return first_linear(size, mixture.gated, spec.hidden_size) if size else None

"""Cuts against rows and columns written out by hand; padding against Megatron-LM."""

from __future__ import annotations

import random

import pytest

from megatron_converters.basics.errors import ConversionError
from megatron_converters.model.layers import ALL_HEADS, EACH_HEAD
from megatron_converters.model.slots import SLOTS, Shard, refs
from megatron_converters.model.spec import ModelSpec
from megatron_converters.sharding.ranks import Cut, Parallel, Rank, cut, padded_vocab, parallel_for
from tests.tiny import KINDS, tiny_spec

#: Model that has every slot of a dense Llama with biases.
BIASED = tiny_spec(qkv_bias=True, proj_bias=True, mlp_bias=True)


def share_of(slot: str, ways: int, index: int, padded: int = 8, spec: ModelSpec = BIASED) -> Cut:
    """Share of a slot in a model whose layers are all of one kind."""
    (kind,) = spec.kinds
    return cut(SLOTS[slot], spec, kind, ways, index, padded)


def rows_of(slot: str, tp: int, spec: ModelSpec = BIASED, padded: int = 8) -> list[list[int]]:
    """The slot's rows that each rank holds."""
    return [share_of(slot, tp, rank, padded, spec).rows.tolist() for rank in range(tp)]


@pytest.mark.parametrize(
    ("tp", "expected"),
    [
        (1, [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]]),
        (2, [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]]),  # a query group each
        (4, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]),  # tp > groups: plain chunks
    ],
)
@pytest.mark.parametrize("slot", ["qkv", "qkv_bias"])
def test_column_cut(slot: str, tp: int, expected: list[list[int]]) -> None:
    assert rows_of(slot, tp) == expected
    share = share_of(slot, tp, tp - 1)
    assert (share.col, share.padding) == (0, 0)
    assert share.shape == ((len(expected[0]),) if slot == "qkv_bias" else (len(expected[0]), 8))


@pytest.mark.parametrize(
    ("tp", "expected"),
    [
        (1, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (2, [[0, 1, 4, 5], [2, 3, 6, 7]]),  # gate rows 0-3, up rows 4-7: each rank holds its gate above its up
        (4, [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ],
)
@pytest.mark.parametrize("slot", ["fc1", "fc1_bias"])
def test_blocks_are_cut_each_on_its_own(slot: str, tp: int, expected: list[list[int]]) -> None:
    assert rows_of(slot, tp) == expected


@pytest.mark.parametrize(("slot", "columns"), [("proj", {1: 8, 2: 4, 4: 2}), ("fc2", {1: 4, 2: 2, 4: 1})])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_row_cut_keeps_all_rows_and_some_columns(slot: str, columns: dict[int, int], tp: int) -> None:
    shares = [share_of(slot, tp, rank) for rank in range(tp)]
    assert [share.shape for share in shares] == [(8, columns[tp])] * tp
    assert [share.col for share in shares] == [rank * columns[tp] for rank in range(tp)]
    assert all(share.rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7] for share in shares)


@pytest.mark.parametrize("slot", ["input_norm", "mlp_norm", "final_norm", "proj_bias", "fc2_bias"])
def test_replicated_slots_are_whole_on_every_rank(slot: str) -> None:
    for rank in range(4):
        share = share_of(slot, 4, rank)
        assert (share.shape, share.col, share.rows.tolist()) == ((8,), 0, [0, 1, 2, 3, 4, 5, 6, 7])
    assert share_of("q_norm", 2, 1, spec=tiny_spec(qk_norm=EACH_HEAD)).shape == (2,)  # one head's dimension
    every = tiny_spec(qk_norm=ALL_HEADS)
    assert [share_of(slot, 2, 1, spec=every).shape for slot in ("q_norm", "k_norm")] == [(8,), (4,)]


def test_vocabulary_padding_follows_the_last_row() -> None:
    """5 rows padded to 12."""
    for slot in ("word_embeddings", "output_layer"):
        assert rows_of(slot, 1, padded=12) == [[0, 1, 2, 3, 4, -1, -1, -1, -1, -1, -1, -1]]
        assert rows_of(slot, 2, padded=12) == [[0, 1, 2, 3, 4, -1], [-1] * 6]
        assert rows_of(slot, 4, padded=12) == [[0, 1, 2], [3, 4, -1], [-1] * 3, [-1] * 3]
        assert [share_of(slot, 4, rank, 12).padding for rank in range(4)] == [0, 1, 3, 3]


#: Layers of megatron-core that cut a weight: dim 0 of ColumnParallelLinear (with its bias) and of vocabularies, gated DeltaNet's
#: heads; dim 1 of RowParallelLinear. All else is whole. It has no block experts, which are in one unit.
CUT = {
    Shard.COLUMN: """word_embeddings output_layer output_layer_bias qkv qkv_bias sinks fc1 fc1_bias expert_fc1 shared_fc1
        expert_fc1_bias q_up q_whole kv_up delta_in delta_conv delta_a_log delta_dt_bias mtp_proj
        block_router block_router_norm block_in block_out""".split(),
    Shard.ROW: "proj fc2 expert_fc2 shared_fc2 delta_out".split(),
    Shard.REPLICATED: """input_norm input_norm_bias mlp_norm mlp_norm_bias q_norm q_norm_bias k_norm k_norm_bias final_norm
        final_norm_bias score proj_bias fc2_bias router router_bias expert_bias expert_fc2_bias shared_gate position_embeddings
        q_down q_latent_norm kv_down kv_latent_norm delta_norm
        attention_post_norm attention_post_norm_bias mlp_post_norm mlp_post_norm_bias
        indexer_query indexer_key indexer_norm indexer_norm_bias indexer_weights
        mtp_embedding_norm mtp_embedding_norm_bias mtp_hidden_norm mtp_hidden_norm_bias mtp_final_norm
        mtp_final_norm_bias""".split(),
}
#: Slots of several blocks, each cut on its own.
BLOCKS = {
    **{"fc1": {1, 2}, "fc1_bias": {1, 2}},  # without and with a gate
    **{"expert_fc1": {2}, "expert_fc1_bias": {2}, "shared_fc1": {2}},
    **{"delta_in": {6}, "delta_conv": {3}},
}


def test_every_slot_has_the_cut_that_megatron_core_gives_it() -> None:
    assert {name: slot.shard for name, slot in SLOTS.items()} == {
        name: shard for shard, names in CUT.items() for name in names
    }
    found: dict[str, set[int]] = {}
    for spec in KINDS.values():
        for ref in refs(spec):
            found.setdefault(ref.slot.name, set()).add(len(ref.slot.size(spec, ref.kind(spec)).blocks))
    assert found.keys() == SLOTS.keys()
    assert {name: counts for name, counts in found.items() if counts != {1}} == BLOCKS
    assert {name for name, slot in SLOTS.items() if slot.expert} == {
        *("expert_fc1", "expert_fc1_bias", "expert_fc2", "expert_fc2_bias")
    }
    vocabulary = {"word_embeddings", "output_layer", "output_layer_bias"}
    assert {name for name, slot in SLOTS.items() if slot.vocab} == vocabulary


@pytest.mark.parametrize(
    ("vocab", "divisor", "tp", "padded"),
    [
        *((32000, 128, 1, 32000), (32000, 128, 2, 32000), (32000, 128, 8, 32768), (128256, 128, 8, 129024)),
        *((151936, 128, 4, 152064), (1, 1, 1, 1), (199, 16, 4, 256), (5, 1, 4, 8), (256, 128, 2, 256)),
    ],
)
def test_padded_vocabulary(vocab: int, divisor: int, tp: int, padded: int) -> None:
    assert padded_vocab(vocab, divisor, tp) == padded


def test_padded_vocabulary_is_megatron_s_formula() -> None:
    """`_vocab_size_with_padding` of core_v0.8.0 counts up one by one."""
    random_ = random.Random(0)
    for _ in range(200):
        vocab, divisor, tp = random_.randint(1, 3000), random_.choice([1, 3, 16, 128]), random_.choice([1, 2, 3, 8])
        after, multiple = vocab, divisor * tp
        while (after % multiple) != 0:
            after += 1
        assert padded_vocab(vocab, divisor, tp) == after


def test_places_of_layers() -> None:
    parallel = Parallel(1, (1, 0, 3))
    assert [parallel.place(layer) for layer in range(4)] == [(0, 0), (2, 0), (2, 1), (2, 2)]
    with pytest.raises(ConversionError, match="layer 4 is beyond the 4 layers"):
        parallel.place(4)


def test_virtual_stages_of_ranks() -> None:
    """Rank p holds the stages p, p + pp, …"""
    parallel = Parallel(1, (1, 2, 0, 3), vpp=2)
    assert (parallel.pp, parallel.entries) == (2, ("model0", "model1"))
    assert [parallel.place(layer) for layer in range(6)] == [(0, 0), (1, 0), (1, 1), (3, 0), (3, 1), (3, 2)]
    assert [parallel.ranks(stage) for stage in range(4)] == [(Rank(0, 0),), (Rank(0, 1),)] * 2
    assert [parallel.prefix(stage) for stage in range(4)] == ["model0.", "model0.", "model1.", "model1."]
    assert Parallel(1, (3, 3)).entries == ("model",) and Parallel(1, (3, 3)).prefix(1) == ""


def test_directories_of_ranks() -> None:
    assert Parallel(2, (4,)).directory(Rank(1, 0)) == "mp_rank_01"
    assert Parallel(2, (4, 4)).directory(Rank(1, 0)) == "mp_rank_01_000"
    assert Parallel(128, (1,) * 12).directory(Rank(107, 11)) == "mp_rank_107_011"


@pytest.mark.parametrize(
    ("fields", "tp", "message"),
    [
        ({}, 3, r"4 attention heads of 2 in 2 query groups and an MLP of 4 cannot be cut over tp=3; use tp 1, 2 or 4"),
        ({}, 8, "use tp 1, 2 or 4"),
        ({"ffn_hidden_size": 6}, 4, "use tp 1 or 2$"),
        (
            {"num_attention_heads": 12, "num_query_groups": 4, "ffn_hidden_size": 12, "kv_channels": 6},
            6,
            "use tp 1, 2, 4 or 12$",
        ),
        # The packed QKV has 6 rows, which 4 ranks cannot share.
        ({"num_query_groups": 1, "kv_channels": 1}, 4, "use tp 1 or 2$"),
        ({}, 0, "at least 1"),
    ],
)
def test_tensor_parallel_sizes_that_cannot_be_name_those_that_can(
    fields: dict[str, int], tp: int, message: str
) -> None:
    with pytest.raises(ConversionError, match=message):
        parallel_for(tiny_spec(**fields), tp, 1)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_more_ranks_than_query_groups_are_allowed_where_groups_divide_them(tp: int) -> None:
    spec = tiny_spec(num_attention_heads=8, num_query_groups=2, ffn_hidden_size=8)
    assert parallel_for(spec, tp, 2).stages == (1, 1)
    assert [row for rows in rows_of("qkv", tp, spec) for row in rows] == list(range(24))


def test_a_cut_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConversionError, match="fc2: 4 cannot be cut 3 ways"):
        share_of("fc2", 3, 0)
    with pytest.raises(ConversionError, match="word_embeddings: 8 cannot be cut 3 ways"):
        share_of("word_embeddings", 3, 0)

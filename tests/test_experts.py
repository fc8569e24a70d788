"""Experts against tables written out by hand: ranks and directories, cuts, keys, fused files, and the queue."""

from __future__ import annotations

import json
import pickle
import queue
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_converters.basics.dtypes import BY_NAME
from megatron_converters.basics.errors import ConversionError, UsageError
from megatron_converters.basics.handover import receive_own_types, receives_own_types
from megatron_converters.conversion.composing import Piece, Planner, StoredName
from megatron_converters.conversion.gathering import materialise
from megatron_converters.formats.huggingface.source import HFSource
from megatron_converters.formats.megatron.argument import Context, Group
from megatron_converters.formats.megatron.arguments import spec_fields, uncut_args, written_args
from megatron_converters.formats.megatron.names import extra_state, keys
from megatron_converters.formats.megatron.rank_files_target import MegatronTarget
from megatron_converters.formats.megatron.writing import MegatronOptions
from megatron_converters.formats.queue.handles import StackedHandle, TensorHandle
from megatron_converters.formats.queue.source import QueueSource
from megatron_converters.formats.queue.target import QueueTarget
from megatron_converters.model.slots import DECODER, SLOTS, Ref, refs
from megatron_converters.model.spec import ModelSpec, PerLayer
from megatron_converters.sharding.ranks import Cut, Parallel, Rank, cut, kept_etp, parallel_for
from megatron_converters.storage import safetensors
from tests.conversions import hf_to_megatron, megatron_to_hf, reshard, run
from tests.helpers import (
    RANK_FILE,
    TRACKER,
    args_of,
    convert,
    edit_rank,
    hf_tensors,
    rank_content,
    refused,
    same_tensors,
    succeeded,
)
from tests.tiny import tiny_spec

HFModel = Callable[..., Path]
FIELDS: dict[str, Any] = {"num_experts": 8, "moe_ffn_hidden_size": 4, "moe_router_topk": 2}
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "num_local_experts": 4}

# --- ranks and directories: the numbers are (tensor, pipeline, expert, expert-tensor)

RANKS: dict[tuple[int, int, int, int], dict[str, tuple[int, int, int, int]]] = {
    (1, 1, 2, 1): {"mp_rank_00_000": (0, 0, 0, 0), "mp_rank_00_001": (0, 0, 1, 0)},
    (2, 1, 2, 2): {
        "mp_rank_00_000": (0, 0, 0, 0),
        "mp_rank_01_000": (1, 0, 0, 1),
        "mp_rank_00_001": (0, 0, 1, 0),
        "mp_rank_01_001": (1, 0, 1, 1),
    },
    (2, 1, 2, 1): {"mp_rank_00_000": (0, 0, 0, 0), "mp_rank_01_001": (1, 0, 1, 0)},
    (4, 1, 2, 1): {
        "mp_rank_00_000": (0, 0, 0, 0),
        "mp_rank_01_001": (1, 0, 1, 0),
        "mp_rank_02_000": (2, 0, 0, 0),
        "mp_rank_03_001": (3, 0, 1, 0),
    },
    (4, 2, 2, 2): {
        "mp_rank_00_000_000": (0, 0, 0, 0),
        "mp_rank_01_000_000": (1, 0, 0, 1),
        "mp_rank_02_000_001": (2, 0, 1, 0),
        "mp_rank_03_000_001": (3, 0, 1, 1),
        "mp_rank_00_001_000": (0, 1, 0, 0),
        "mp_rank_01_001_000": (1, 1, 0, 1),
        "mp_rank_02_001_001": (2, 1, 1, 0),
        "mp_rank_03_001_001": (3, 1, 1, 1),
    },
    (2, 1, 1, 1): {"mp_rank_00": (0, 0, 0, 0), "mp_rank_01": (1, 0, 0, 0)},
}


@pytest.mark.parametrize("sizes", RANKS, ids=str)
def test_ranks_and_their_directories(sizes: tuple[int, int, int, int]) -> None:
    tp, pp, ep, etp = sizes
    parallel = parallel_for(tiny_spec(**FIELDS), tp, pp, ep=ep, etp=etp)
    ranks = [rank for stage in range(pp) for rank in parallel.ranks(stage)]
    named = {parallel.directory(rank): (rank.tp, rank.pp, rank.ep, rank.etp) for rank in ranks}
    assert len(ranks) == len(named)
    assert named == RANKS[sizes]


@pytest.mark.parametrize("sizes", RANKS, ids=str)
def test_a_checkpoint_has_these_directories_and_goes_back(
    sizes: tuple[int, int, int, int], hf_model: HFModel, tmp_path: Path
) -> None:
    tp, pp, ep, etp = sizes
    source = hf_model("mixtral", **SMALL)
    meg = hf_to_megatron(source, tmp_path / "meg", tp=tp, pp=pp, ep=ep, etp=etp)
    assert {path.parent.name for path in meg.glob(f"*/*/{RANK_FILE}")} == RANKS[sizes].keys()
    same_tensors(hf_tensors(megatron_to_hf(meg, tmp_path / "hf")), hf_tensors(source))


def test_the_expert_tensor_parallel_size_is_by_default_the_tensor_parallel_size() -> None:
    assert parallel_for(tiny_spec(**FIELDS), 2, 1, ep=2) == parallel_for(tiny_spec(**FIELDS), 2, 1, ep=2, etp=2)


@pytest.mark.parametrize("sizes", [(1, 1, 2), (2, 1, 4), (1, 2, 2), (2, 2, 4), (1, 4, 4)], ids=str)
def test_ranks_that_would_share_a_directory_are_refused(sizes: tuple[int, int, int]) -> None:
    tp, ep, etp = sizes
    message = rf"^tp={tp} and ep={ep} with etp={etp}: several ranks would share one mp_rank_\* directory, .*divides tp$"
    with pytest.raises(ConversionError, match=message):
        parallel_for(tiny_spec(**FIELDS), tp, 1, ep=ep, etp=etp)


@pytest.mark.parametrize(
    ("fields", "sizes", "message"),
    [
        ({}, (1, 3, 1), "8 experts cannot be spread over ep=3; use ep 1, 2, 4 or 8$"),
        ({}, (1, 16, 1), "8 experts cannot be spread over ep=16"),
        ({}, (1, 0, 1), "8 experts cannot be spread over ep=0"),
        ({"moe_ffn_hidden_size": 3}, (2, 1, 2), "experts with an MLP of 3 cannot be cut over etp=2"),
        ({"shared_ffn_hidden_size": 5}, (2, 1, 1), "shared experts of 5 cannot be cut over tp=2"),
    ],
)
def test_sizes_that_cannot_cut_experts(fields: dict[str, int], sizes: tuple[int, int, int], message: str) -> None:
    tp, ep, etp = sizes
    with pytest.raises(ConversionError, match=message):
        parallel_for(tiny_spec(**{**FIELDS, **fields}), tp, 1, ep=ep, etp=etp)


def test_a_dense_model_has_no_experts_to_spread() -> None:
    with pytest.raises(UsageError, match=r"^--target-expert-parallel-size 2: a dense model has no experts"):
        parallel_for(tiny_spec(), 2, 1, ep=2)


@pytest.mark.parametrize("etp", [1, 2])
def test_a_dense_model_has_no_experts_to_cut(etp: int) -> None:
    assert parallel_for(tiny_spec(), 2, 1, etp=etp) == parallel_for(tiny_spec(), 2, 1)
    with pytest.raises(
        UsageError, match=r"^--target-expert-tensor-parallel-size 4: a dense model has no experts to cut"
    ):
        parallel_for(tiny_spec(), 2, 1, etp=4)


@pytest.mark.parametrize(
    ("source", "target", "kept"),
    [
        ((2, 1, 1), (2, 1), 1),
        ((2, 1, 1), (4, 2), 1),
        ((4, 1, 2), (4, 2), 2),
        ((4, 1, 2), (2, 1), 2),
        ((4, 1, 2), (1, 1), 1),  # two expert-tensor ranks would share a directory
        ((4, 2, 2), (8, 2), 2),
        ((2, 2, 2), (4, 1), 4),  # that of the source is Megatron-LM's default
        ((1, 1, 1), (4, 1), 4),
    ],
)
def test_resharding_keeps_an_expert_tensor_parallel_size_of_its_own(
    source: tuple[int, int, int], target: tuple[int, int], kept: int
) -> None:
    tp, ep, etp = source
    before = parallel_for(tiny_spec(**FIELDS), tp, 1, ep=ep, etp=etp)
    assert (kept_etp(before, *target) or target[0]) == kept
    assert kept_etp(None, *target) is None


def test_a_checkpoint_s_expert_tensor_parallel_size_stays_with_other_stages(hf_model: HFModel, tmp_path: Path) -> None:
    source = hf_model("mixtral", **SMALL)
    meg = hf_to_megatron(source, tmp_path / "meg", tp=2, ep=2, etp=1)
    args = args_of(reshard(meg, tmp_path / "pp", pp=2))
    assert (args.tensor_model_parallel_size, args.expert_tensor_parallel_size) == (2, 1)
    args = args_of(reshard(meg, tmp_path / "etp", etp=2))
    assert args.expert_tensor_parallel_size == 2
    dense = hf_to_megatron(hf_model("llama2"), tmp_path / "dense", tp=4)
    assert args_of(reshard(dense, tmp_path / "tp 2", tp=2)).expert_tensor_parallel_size == 2
    with pytest.raises(UsageError, match="a dense model has no experts to cut"):
        reshard(dense, tmp_path / "no", tp=4, etp=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shared_gate": "yes"}, "shared_gate is 'yes'; it must be true or false"),
        ({"moe_router_pre_softmax": 1}, "moe_router_pre_softmax is 1; it must be true or false"),
        ({"qk_norm": None}, "qk_norm is None; known are 'each head', 'all heads'"),
        ({"qk_norm": True}, "qk_norm is True; known are"),
        ({"moe_router_score_function": "max"}, "moe_router_score_function is 'max'; known are 'softmax', 'sigmoid'"),
        ({"moe_router_num_groups": 3, "moe_router_group_topk": 1}, "8 experts cannot be grouped so"),
        ({"moe_router_topk_scaling_factor": "2"}, "moe_router_topk_scaling_factor is '2'; it must be a number"),
        ({"num_experts": PerLayer([4, 8])}, r"num_experts differs between layers \(\[4, 8\]\); that is not supported"),
        ({"moe_router_topk": 9}, "moe_router_topk is 9, but there are 8 experts"),
        ({"shared_ffn_hidden_size": -1}, "shared_ffn_hidden_size is -1; it must be a whole number"),
        ({"shared_ffn_hidden_size": 4.0}, "shared_ffn_hidden_size is 4.0"),
        ({"shared_ffn_hidden_size": True}, "shared_ffn_hidden_size is True"),
    ],
)
def test_no_model_has_such_experts(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        tiny_spec(**{**FIELDS, **fields})


# --- which expert lies where, and how it is cut


@pytest.mark.parametrize(
    ("ep", "places"),
    [
        (1, [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, 6), (0, 7)]),
        (2, [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]),
        (4, [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]),
    ],
)
def test_expert_numbers(ep: int, places: list[tuple[int, int]]) -> None:
    """Each expert's expert-parallel rank, and its number there."""
    parallel = parallel_for(tiny_spec(**FIELDS), 1, 1, ep=ep)
    for expert, (home, local) in enumerate(places):
        assert [rank.ep for rank in parallel.ranks(0) if parallel.holds(rank, expert, 8)] == [home]
        assert parallel.local_expert(expert, 8) == local
    assert all(parallel.holds(rank, None, 8) for rank in parallel.ranks(0))
    assert parallel.local_expert(None, 8) is None


def test_experts_are_cut_by_expert_tensor_parallelism_and_all_else_by_tensor_parallelism() -> None:
    spec = tiny_spec(**FIELDS, shared_ffn_hidden_size=4)

    def share(parallel: Parallel, slot: str, rank: Rank) -> Cut:
        return cut(SLOTS[slot], spec, spec.layer(0), *parallel.ways(SLOTS[slot], rank), 8)

    for rank, rows, col in ((Rank(1, 0, 0, 0), [0, 1, 4, 5], 0), (Rank(0, 0, 0, 1), [2, 3, 6, 7], 2)):
        parallel = parallel_for(spec, 2, 1, etp=2)
        gate_and_up = share(parallel, "expert_fc1", rank)  # gate is rows 0-3, up rows 4-7
        assert (gate_and_up.rows.tolist(), gate_and_up.shape) == (rows, (4, 8))
        down = share(parallel, "expert_fc2", rank)
        assert (down.rows.tolist(), down.col, down.shape) == ([0, 1, 2, 3, 4, 5, 6, 7], col, (8, 2))
    uncut, rank = parallel_for(spec, 2, 1, etp=1), Rank(1, 0, 0, 0)
    assert share(uncut, "expert_fc1", rank).rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert share(uncut, "expert_fc2", rank).shape == (8, 4)
    assert share(uncut, "shared_fc1", rank).rows.tolist() == [2, 3, 6, 7]
    assert share(uncut, "shared_fc2", rank).col == 2
    assert share(uncut, "router", rank).shape == (8, 8)


def test_files_hold_gate_above_up_for_each_rank(hf_model: HFModel, tmp_path: Path) -> None:
    """Expert 3 of 4 is number 1 on the second of two expert-parallel ranks; its MLP of 112 is cut in two."""
    source = hf_model("mixtral", **SMALL)
    meg = hf_to_megatron(source, tmp_path, tp=2, pp=2, ep=2, expert_layout="sequential")
    expert = "model.layers.1.block_sparse_moe.experts.3."
    gate, down, up = (hf_tensors(source)[f"{expert}w{number}.weight"] for number in (1, 2, 3))
    for tp in (0, 1):
        model, mine = rank_content(meg, f"mp_rank_0{tp}_001_001")["model"], slice(56 * tp, 56 * tp + 56)
        local = "decoder.layers.0.mlp.experts.local_experts.1."
        assert torch.equal(model[local + "linear_fc1.weight"], torch.cat([gate[mine], up[mine]]))
        assert torch.equal(model[local + "linear_fc2.weight"], down[:, mine])


# --- names

EXPERTS = "decoder.layers.2.mlp.experts."


def test_every_layout_s_names() -> None:
    """Layer 2, expert 5 of 8 on the second of two ranks, where it is number 1."""
    spec = tiny_spec(**FIELDS, feed=PerLayer(["moe", "mlp"]))

    def keys_of(slot: str, kind: int = 0) -> tuple[str, ...]:
        templates = keys(slot, spec.layer(kind), DECODER)
        return tuple(template.format(layer=2, expert=1, global_expert=5) for template in templates)

    assert keys_of("expert_fc1") == (
        EXPERTS + "local_experts.1.linear_fc1.weight",
        EXPERTS + "linear_fc1.weight1",
        EXPERTS + "linear_fc1.weight",  # all of the rank's
        EXPERTS + "local_expert_5_linear_fc1_weight",
        EXPERTS + "weight1",  # all of the rank's
    )
    assert keys_of("expert_fc2") == (
        EXPERTS + "local_experts.1.linear_fc2.weight",
        EXPERTS + "linear_fc2.weight1",
        EXPERTS + "linear_fc2.weight",
        EXPERTS + "local_expert_5_linear_fc2_weight",
        EXPERTS + "weight2",  # all of the rank's
    )
    assert keys_of("router") == ("decoder.layers.2.mlp.router.weight",)
    assert keys_of("mlp_norm") == ("decoder.layers.2.pre_mlp_layernorm.weight",)
    assert keys_of("mlp_norm", 1) == (
        "decoder.layers.2.pre_mlp_layernorm.weight",
        "decoder.layers.2.mlp.linear_fc1.layer_norm_weight",
    )
    assert keys_of("shared_fc1") == ("decoder.layers.2.mlp.shared_experts.linear_fc1.weight",)
    assert keys_of("shared_gate") == ("decoder.layers.2.mlp.shared_experts.gate_weight",)


ATTENTION = ["core_attention._extra_state", "linear_proj._extra_state", "linear_qkv._extra_state"]
ATTENTION += ["linear_proj.weight", "linear_qkv.layer_norm_weight", "linear_qkv.weight"]
#: What NVIDIA's saver of Megatron-LM 0.17 leaves of one layer of a Mixtral with two experts on a rank; the other layouts'
#: experts by the modules that own them.
LAYER = [f"self_attention.{name}" for name in ATTENTION]
LAYER += ["pre_mlp_layernorm.weight", "pre_mlp_layernorm._extra_state", "mlp.router.weight"]
LAYOUTS = {
    "sequential": [
        "local_experts.0.linear_fc1.weight",
        "local_experts.0.linear_fc1._extra_state",
        "local_experts.0.linear_fc2.weight",
        "local_experts.0.linear_fc2._extra_state",
        "local_experts.1.linear_fc1.weight",
        "local_experts.1.linear_fc1._extra_state",
        "local_experts.1.linear_fc2.weight",
        "local_experts.1.linear_fc2._extra_state",
    ],
    "grouped": [
        "linear_fc1.weight0",
        "linear_fc1.weight1",
        "linear_fc1._extra_state",
        "linear_fc2.weight0",
        "linear_fc2.weight1",
        "linear_fc2._extra_state",
    ],
    "dynamic": [
        "local_expert_2_linear_fc1_weight",
        "local_expert_2_linear_fc2_weight",
        "local_expert_3_linear_fc1_weight",
        "local_expert_3_linear_fc2_weight",
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_s_names_are_complete_in_every_layout(layout: str, hf_model: HFModel, tmp_path: Path) -> None:
    """The second of two expert-parallel ranks, the last of two stages."""
    source = hf_model("mixtral", **SMALL)
    meg = hf_to_megatron(source, tmp_path / "meg", pp=2, ep=2, expert_layout=layout)
    layer = [*LAYER, *(f"mlp.experts.{name}" for name in LAYOUTS[layout])]
    last = ["decoder.final_layernorm.weight", "decoder.final_layernorm._extra_state"]
    last += ["output_layer.weight", "output_layer._extra_state"]
    found = rank_content(meg, "mp_rank_00_001_001")["model"]
    assert sorted(found) == sorted([*(f"decoder.layers.0.{name}" for name in layer), *last])
    assert all(value is None for name, value in found.items() if name.endswith("_extra_state"))
    args = args_of(meg)
    assert (args.moe_grouped_gemm, args.moe_dynamic_hpu) == (layout == "grouped", layout == "dynamic")
    assert (args.num_experts, args.expert_model_parallel_size, args.expert_tensor_parallel_size) == (4, 2, 1)
    same_tensors(hf_tensors(megatron_to_hf(meg, tmp_path / "hf")), hf_tensors(source))
    for other in LAYOUTS:
        moved = reshard(meg, tmp_path / other, pp=1, ep=4, expert_layout=other)
        same_tensors(hf_tensors(megatron_to_hf(moved, tmp_path / f"{other} hf")), hf_tensors(source))


def test_modules_with_extra_state_of_dense_and_local_layers() -> None:
    spec = tiny_spec(**FIELDS, feed=PerLayer(["moe", "mlp"]), shared_ffn_hidden_size=4)
    attention = ["self_attention.linear_proj", "self_attention.linear_qkv"]
    engine = ["self_attention.core_attention", *attention]
    shared = ["mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"]
    experts = ["mlp.experts.linear_fc1", "mlp.experts.linear_fc2"]
    locals_ = [f"mlp.experts.local_experts.{expert}.linear_fc{part}" for expert in (0, 1) for part in (1, 2)]
    expected = {
        ("transformer_engine", "grouped", 0): [*engine, "pre_mlp_layernorm", *shared, *experts],
        ("transformer_engine", "grouped", 1): [*engine, "mlp.linear_fc1", "mlp.linear_fc2"],
        ("local", "sequential", 0): [*attention, *shared, *locals_],
        ("local", "sequential", 1): [*attention, "mlp.linear_fc1", "mlp.linear_fc2"],
    }
    for (dialect, layout, layer), modules in expected.items():
        found = sorted(extra_state(dialect, layout, spec, spec.layer(layer), 2, DECODER, ""))
        assert found == sorted("decoder.layers.{layer}." + module for module in modules)


def expert_args(spec: ModelSpec, parallel: Parallel, layout: str) -> dict[str, Any]:
    return written_args(Context(spec, parallel, layout), (Group.EXPERTS, Group.EXPERT_LAYOUT))


def sequence_parallel(spec: ModelSpec, tp: int) -> Any:
    return written_args(Context(spec, parallel_for(spec, tp, 1)), (Group.LAYOUT,))["sequence_parallel"]


def test_args_of_experts_in_megatron_s_words() -> None:
    feed = PerLayer(["moe", "mlp", "moe"])
    spec = tiny_spec(**FIELDS, num_layers=3, feed=feed, shared_ffn_hidden_size=6, shared_gate=True)
    assert expert_args(spec, parallel_for(spec, 2, 1, ep=2, etp=1), "grouped") == {
        **{"moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False},
        **{"moe_router_topk_scaling_factor": None, "moe_router_num_groups": None},
        "num_experts": 8,
        "moe_ffn_hidden_size": 4,
        "moe_router_topk": 2,
        "moe_router_pre_softmax": False,
        "moe_aux_loss_coeff": 0.0,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_shared_expert_intermediate_size": 6,
        "moe_shared_expert_gate": True,
        "moe_layer_freq": [1, 0, 1],
        "moe_grouped_gemm": True,
        "moe_use_legacy_grouped_gemm": False,
        "moe_dynamic_hpu": False,
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    }
    assert sequence_parallel(spec, 2) is True and sequence_parallel(spec, 1) is False
    plain = tiny_spec(**FIELDS)
    args = expert_args(plain, parallel_for(plain, 1, 1), "dynamic")
    assert (args["moe_layer_freq"], args["moe_shared_expert_intermediate_size"]) == (1, None)
    assert (args["moe_grouped_gemm"], args["moe_dynamic_hpu"]) == (False, True)
    dense = tiny_spec()
    said = {name: value for name, value in expert_args(dense, parallel_for(dense, 2, 1), "grouped").items() if value}
    assert said == {
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": 2,
        "moe_router_score_function": "softmax",
    }
    assert sequence_parallel(dense, 2) is False


# --- fused files of transformers 5

NAMES = {
    "mixtral": ("block_sparse_moe.", "w1", "w3", "w2"),
    "qwen2-moe": ("mlp.", "gate_proj", "up_proj", "down_proj"),
    "qwen3-moe-dense-layers": ("mlp.", "gate_proj", "up_proj", "down_proj"),
}


def fuse(family: str, tensors: dict[str, torch.Tensor], layer: int, experts: int) -> dict[str, torch.Tensor]:
    """The experts of a layer as two stacks, [experts, 2 x MLP, hidden] and [experts, hidden, MLP], by hand."""
    block, *parts = NAMES[family]
    prefix, fused = f"model.layers.{layer}.{block}", f"model.layers.{layer}.mlp."
    if prefix + "gate.weight" not in tensors:
        return tensors  # a dense layer
    gate, up, down = ([f"{prefix}experts.{expert}.{part}.weight" for expert in range(experts)] for part in parts)
    stacks = {
        fused + "experts.gate_up_proj": torch.stack(
            [torch.cat([tensors[one], tensors[other]]) for one, other in zip(gate, up, strict=True)]
        ),
        fused + "experts.down_proj": torch.stack([tensors[name] for name in down]),
        fused + "gate.weight": tensors[prefix + "gate.weight"],
    }
    gone = {*gate, *up, *down, prefix + "gate.weight"}
    return {name: tensor for name, tensor in tensors.items() if name not in gone} | stacks


@pytest.mark.parametrize("family", NAMES)
def test_fused_files_are_read_as_the_experts_in_them(family: str, hf_model: HFModel, tmp_path: Path) -> None:
    source = hf_model(family)
    fused, tensors = tmp_path / "fused", hf_tensors(source)
    for layer in range(4):
        tensors = fuse(family, tensors, layer, 8)
    fused.mkdir()
    shutil.copy(source / "config.json", fused)
    save_file(tensors, fused / "model.safetensors")
    same_tensors(hf_tensors(hf_model(family, fused_experts=True)), tensors)  # transformers saves the same
    sizes = {"tp": 2, "pp": 2, "ep": 2}
    plain = hf_to_megatron(source, tmp_path / "plain", **sizes)
    other = hf_to_megatron(fused, tmp_path / "other", **sizes)
    ranks = sorted(path.parent.name for path in plain.glob(f"*/*/{RANK_FILE}"))
    assert len(ranks) == 8
    for rank in ranks:
        ours, theirs = (rank_content(folder, rank)["model"] for folder in (other, plain))
        assert ours.keys() == theirs.keys()
        same_tensors(*({k: v for k, v in model.items() if v is not None} for model in (ours, theirs)))
    same_tensors(hf_tensors(megatron_to_hf(other, tmp_path / "back")), hf_tensors(source))


def changed(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None], **config: Any) -> Path:
    """A copy of a model with other tensors or another configuration."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


def unchanged(_: dict[str, torch.Tensor]) -> None:
    """Nothing."""


EXPERT = "model.layers.1.block_sparse_moe.experts."


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (unchanged, {"num_local_experts": 5}, [f"{EXPERT}4.w1.weight (layer 1 expert 4 expert_fc1) is missing"]),
        (unchanged, {"num_local_experts": 5}, ["gate.weight (layer 1 router) has shape [4, 64]", "requires [5, 64]"]),
        (unchanged, {"num_local_experts": 3}, [f"{EXPERT}3.w2.weight is not a tensor of the mixtral family"]),
        (
            lambda tensors: tensors.pop(EXPERT + "2.w3.weight"),
            {},
            [f"  - {EXPERT}2.w3.weight (layer 1 expert 2 expert_fc1) is missing"],
        ),
        (
            lambda tensors: tensors.update({EXPERT + "4.w2.weight": tensors[EXPERT + "0.w2.weight"].clone()}),
            {},
            [f"  - {EXPERT}4.w2.weight is not a tensor"],
        ),
        (
            lambda tensors: tensors.update({EXPERT + "0.w2.weight": tensors[EXPERT + "0.w2.weight"].T.contiguous()}),
            {},
            [f"{EXPERT}0.w2.weight (layer 1 expert 0 expert_fc2) has shape [112, 64]; config.json requires [64, 112]"],
        ),
    ],
)
def test_files_with_other_experts_than_config_json_says(
    change: Callable[[dict[str, torch.Tensor]], None],
    config: dict[str, int],
    words: list[str],
    hf_model: HFModel,
    tmp_path: Path,
) -> None:
    folder = changed(hf_model("mixtral", **SMALL), tmp_path / "hf", change, **config)
    with pytest.raises(ConversionError) as caught:
        HFSource(folder)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_stack_of_another_number_of_experts_is_named(hf_model: HFModel, tmp_path: Path) -> None:
    source = hf_model("mixtral", **SMALL, fused_experts=True)
    folder = changed(source, tmp_path / "hf", unchanged, num_local_experts=5)
    message = r"layers\.0\.mlp\.experts\.down_proj .* has shape \[4, 64, 112\]; config\.json requires \[5, 64, 112\]"
    with pytest.raises(ConversionError, match=message):
        HFSource(folder)


def test_experts_that_are_stored_twice_are_refused(hf_model: HFModel, tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        fused = fuse("mixtral", tensors, 0, 4)
        tensors["model.layers.0.mlp.experts.down_proj"] = fused["model.layers.0.mlp.experts.down_proj"]

    folder = changed(hf_model("mixtral", **SMALL), tmp_path / "hf", add)
    with pytest.raises(ConversionError, match=r"layers\.0\.block_sparse_moe\.experts\.0\.w2\.weight is not a tensor"):
        HFSource(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda model: model.pop("decoder.layers.0.mlp.experts.linear_fc1.weight1"),
            "mp_rank_00_001: layer 0 expert 3 expert_fc1: .* is missing",
        ),
        (
            lambda model: model.update(
                {"decoder.layers.0.mlp.experts.linear_fc2.weight2": torch.ones_like(fc2_of(model))}
            ),
            r"mp_rank_00_001: decoder\.layers\.0\.mlp\.experts\.linear_fc2\.weight2 is not a tensor of this model",
        ),
        (
            lambda model: model.update(
                {"decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.weight": torch.ones_like(fc2_of(model))}
            ),
            r"mp_rank_00_001: layer 0 expert 2 expert_fc2: .*local_experts.* and .*weight0 are both there",
        ),
    ],
    ids=["missing", "extra", "two layouts"],
)
def test_checkpoints_with_other_experts_than_args_say(
    edit: Callable[[dict[str, Any]], None], message: str, hf_model: HFModel, tmp_path: Path
) -> None:
    meg = hf_to_megatron(hf_model("mixtral", **SMALL), tmp_path / "meg", ep=2)
    model = rank_content(meg, "mp_rank_00_001")["model"]
    edit(model)
    edit_rank(meg, "mp_rank_00_001", model=model)
    with pytest.raises(ConversionError, match=message):
        megatron_to_hf(meg, tmp_path / "hf")


@pytest.mark.parametrize("said", [True, False], ids=["in args", "by its tensor alone"])
def test_a_bias_of_the_router_s_choice_is_refused_by_name(said: bool, hf_model: HFModel, tmp_path: Path) -> None:
    meg = hf_to_megatron(hf_model("mixtral", **SMALL), tmp_path / "meg")
    content = rank_content(meg)
    content["args"].moe_router_enable_expert_bias = said
    content["model"]["decoder.layers.1.mlp.router.expert_bias"] = torch.zeros(4)
    edit_rank(meg, "mp_rank_00", **content)
    with pytest.raises(ConversionError, match=r"mlp\.router\.expert_bias"):
        megatron_to_hf(meg, tmp_path / "hf")


def test_a_router_in_float32_stays_so_and_is_recorded(hf_model: HFModel, tmp_path: Path) -> None:
    """Megatron-LM routes in float32 if `moe_router_dtype` says so, and has no place for float32 weights in a bfloat16 model."""
    source, meg = hf_model("mixtral", **SMALL), tmp_path / "meg"
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    told = run(HFSource(source), MegatronTarget(meg, MegatronOptions(ep=2)), BY_NAME["bfloat16"])
    assert not hasattr(args_of(meg), "moe_router_dtype")
    assert rank_content(meg, "mp_rank_00_001")["model"]["decoder.layers.0.mlp.router.weight"].dtype == torch.bfloat16

    def cast(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: value.bfloat16() for name, value in tensors.items() if not name.endswith("gate.weight")})

    mixed = changed(source, tmp_path / "mixed", cast)
    told = run(HFSource(mixed), MegatronTarget(tmp_path / "wide", MegatronOptions(ep=2)))
    model = rank_content(tmp_path / "wide", "mp_rank_00_001")["model"]
    assert torch.equal(model["decoder.layers.0.mlp.router.weight"], hf_tensors(source)[gate])
    args = args_of(tmp_path / "wide")
    assert (args.moe_router_dtype, args.moe_router_fp32, args.params_dtype) == ("fp32", True, torch.bfloat16)
    flags = (tmp_path / "wide" / "iter_0000001" / "pretrain_gpt_flags.txt").read_text()
    assert "--moe-router-dtype fp32" in flags
    assert any(line.startswith("warning: the router is stored in float32") for line in told)
    same_tensors(hf_tensors(megatron_to_hf(tmp_path / "wide", tmp_path / "back")), hf_tensors(mixed))
    again = reshard(tmp_path / "wide", tmp_path / "again", ep=1)
    assert args_of(again).moe_router_dtype == "fp32"


def fc2_of(model: dict[str, Any]) -> torch.Tensor:
    tensor: torch.Tensor = model["decoder.layers.0.mlp.experts.linear_fc2.weight0"]
    return tensor


@pytest.mark.parametrize("name", ["mp_rank_00_001", "mp_rank_01_000"])
def test_a_missing_rank_is_named(name: str, hf_model: HFModel, tmp_path: Path) -> None:
    meg = hf_to_megatron(hf_model("mixtral", **SMALL), tmp_path / "meg", tp=2, ep=2)
    shutil.rmtree(meg / "iter_0000001" / name)
    with pytest.raises(ConversionError, match=rf"tp=2, pp=1, ep=2:\n  - {name} is missing"):
        megatron_to_hf(meg, tmp_path / "hf")


# --- the queue


@pytest.fixture(params=[True, False], ids=["ours", "another's"])
def ours(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whose process unpickles."""
    before = receives_own_types()
    receive_own_types(request.param)
    yield request.param
    receive_own_types(before)


def test_stacked_handles_cross_as_handles_or_as_one_tensor(ours: bool, tmp_path: Path) -> None:
    values = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    save_file({str(expert): values[expert].contiguous() for expert in range(3)}, tmp_path / "a")
    stored = safetensors.read(tmp_path / "a").tensors
    pieces = [Piece(stored[str(expert)], np.arange(4), 0, StoredName("here", "a")) for expert in range(3)]
    handles = [TensorHandle((4, 2), BY_NAME["float32"], [piece]) for piece in pieces]
    found = pickle.loads(pickle.dumps(StackedHandle(handles)))
    if ours:
        assert isinstance(found, StackedHandle)
        assert [type(handle) for handle in found.handles] == [TensorHandle] * 3
        found = torch.stack(
            [
                torch.from_numpy(materialise(Planner(), handle.pieces, (4, 2), handle.dtype).view(np.float32))
                for handle in found.handles
            ]
        )
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, values)


@pytest.fixture
def stock_queue(hf_model: HFModel) -> Iterator[Any]:
    """What a stock saver receives of a Mixtral: tensors, in messages; none of what is only for our saver."""
    before = receives_own_types()
    receive_own_types(False)
    source, sent = HFSource(hf_model("mixtral", **SMALL)), queue.Queue[Any]()
    target = QueueTarget(sent, uncut_args, model_type="GPT", divisor=128)
    target.begin(source.spec, source.origin, source.dtype_of)
    for ref in refs(source.spec):
        target.write(ref, source.read(ref), target.fills(ref))
    target.end()
    received = queue.Queue[Any]()
    while not sent.empty():
        message = pickle.loads(pickle.dumps(sent.get()))
        if hasattr(message, "megatron_converters"):
            del message.megatron_converters
        received.put(message)
    yield received
    receive_own_types(before)


def test_a_stock_saver_receives_stacks_and_a_stock_loader_s_stacks_are_read(
    stock_queue: Any, hf_model: HFModel
) -> None:
    tensors = hf_tensors(hf_model("mixtral", **SMALL))
    layer = stock_queue.queue[2]
    assert (stock_queue.queue[0].num_experts, layer["name"]) == (4, "transformer layer 0")
    expert = "model.layers.0.block_sparse_moe.experts."
    for key, part in (("mlp l0 weight W", "w1"), ("mlp l0 weight V", "w3"), ("mlp l1 weight", "w2")):
        assert torch.equal(layer[key], torch.stack([tensors[f"{expert}{number}.{part}.weight"] for number in range(4)]))
    assert torch.equal(layer["router weight"], tensors["model.layers.0.block_sparse_moe.gate.weight"])

    source = QueueSource(stock_queue, spec_fields)
    names = ("family", "num_experts", "moe_ffn_hidden_size")
    assert [source.spec.values[name] for name in names] == ["mixtral", 4, 112]
    read = {ref: source.read(ref).pieces for ref in refs(source.spec)}
    source.close()
    gate, up = read[Ref(SLOTS["expert_fc1"], 1, 3)]
    assert (gate.rows.tolist(), up.rows.tolist()) == (list(range(112)), list(range(112, 224)))
    for piece, part in ((gate, "w1"), (up, "w3"), (read[Ref(SLOTS["expert_fc2"], 1, 3)][0], "w2")):
        found = torch.from_numpy(np.array(piece.data.array()).view(np.float32))
        assert torch.equal(found, tensors[f"model.layers.1.block_sparse_moe.experts.3.{part}.weight"])


def fuse_gate_and_up(received: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Messages as Habana's loader_mixtral_hf sends them without CUDA: its experts hold cat([w1, w3]), and it stacks them."""
    for layer in range(2):
        expert = f"model.layers.{layer}.block_sparse_moe.experts."
        parts = [[tensors[f"{expert}{number}.{part}.weight"] for part in ("w1", "w3")] for number in range(4)]
        message = received.queue[2 + layer]
        del message["mlp l0 weight W"], message["mlp l0 weight V"]
        message["mlp l0 weight"] = torch.stack([torch.cat(pair) for pair in parts])


def test_habana_s_fused_stacks_are_read(stock_queue: Any, hf_model: HFModel, tmp_path: Path) -> None:
    tensors = hf_tensors(hf_model("mixtral", **SMALL))
    fuse_gate_and_up(stock_queue, tensors)
    vars(stock_queue.queue[0]).update(previous_expert_tensor_parallel_size=1, previous_expert_model_parallel_size=2)
    run(QueueSource(stock_queue, spec_fields), MegatronTarget(tmp_path / "meg", MegatronOptions(tp=2, impl="local")))
    found = {path.parent.name for path in (tmp_path / "meg").glob(f"*/*/{RANK_FILE}")}
    assert found == RANKS[2, 1, 2, 2].keys()
    same_tensors(hf_tensors(megatron_to_hf(tmp_path / "meg", tmp_path / "hf")), tensors)


@pytest.mark.parametrize("shape", [(4, 112, 64), (4, 64, 224)], ids=["gate alone", "transposed"])
def test_a_fused_stack_of_another_shape_is_named(shape: tuple[int, ...], stock_queue: Any, hf_model: HFModel) -> None:
    fuse_gate_and_up(stock_queue, hf_tensors(hf_model("mixtral", **SMALL)))
    stock_queue.queue[2]["mlp l0 weight"] = torch.zeros(shape)
    source = QueueSource(stock_queue, spec_fields)
    message = f"mlp l0 weight has shape {list(shape[1:])}, expected [224, 64] for layer 0 expert 0 expert_fc1"
    with pytest.raises(ConversionError, match=re.escape(message)):
        for ref in refs(source.spec):
            source.read(ref)


def test_fused_and_split_stacks_together_are_refused(stock_queue: Any) -> None:
    stock_queue.queue[2]["mlp l0 weight"] = torch.zeros(4, 224, 64)
    source = QueueSource(stock_queue, spec_fields)
    with pytest.raises(ConversionError, match=r"does not have:\n  - 'mlp l0 weight V'\n  - 'mlp l0 weight W'"):
        for ref in refs(source.spec):
            source.read(ref)


@pytest.mark.parametrize(("shape", "said"), [((3, 64, 112), "[3, 64, 112]"), ((64, 112), "[64, 112]")])
def test_a_stack_of_another_shape_is_named(shape: tuple[int, ...], said: str, stock_queue: Any) -> None:
    stock_queue.queue[2]["mlp l1 weight"] = torch.zeros(shape)
    source = QueueSource(stock_queue, spec_fields)
    message = f"'transformer layer 0': mlp l1 weight has shape {said}; expected one matrix for each of 4 experts"
    with pytest.raises(ConversionError, match=re.escape(message)):
        for ref in refs(source.spec):
            source.read(ref)


@pytest.mark.parametrize("loader", ["mixtral_hf", "hf"])
def test_the_command_lines_of_experts_bit_by_bit(loader: str, hf_model: HFModel, tmp_path: Path) -> None:
    source = hf_model("mixtral", **SMALL)
    first, second, back = tmp_path / "first", tmp_path / "second", tmp_path / "back"
    forward = f"""--bf16 --model-type GPT --loader {loader} --saver mcore --saver-transformer-impl transformer_engine
        --target-tensor-parallel-size 2 --target-pipeline-parallel-size 2 --target-expert-paralell-size 2
        --load-dir {source} --save-dir {first}"""
    succeeded(convert(*forward.split()))
    assert len(list(first.glob(f"iter_0000001/mp_rank_0?_00?_00?/{RANK_FILE}"))) == 8
    resharding = f"""--loader core --saver mcore --load-dir {first} --save-dir {second} --expert-layout sequential
        --target-tensor-parallel-size 4 --target-pipeline-parallel-size 1 --target-expert-parallel-size 2
        --target-expert-tensor-parallel-size 1 --saver-transformer-impl local"""
    succeeded(convert(*resharding.split()))
    assert {path.parent.name for path in second.glob(f"*/*/{RANK_FILE}")} == RANKS[4, 1, 2, 1].keys()
    succeeded(convert("--loader", "core", "--saver", "hf", "--load-dir", second, "--save-dir", back))
    same_tensors(hf_tensors(back), {name: tensor.bfloat16() for name, tensor in hf_tensors(source).items()})


def test_experts_that_sizes_cannot_spread_are_refused(hf_model: HFModel, tmp_path: Path) -> None:
    source = hf_model("mixtral", **SMALL)
    run = convert("--loader", "hf", "--load-dir", source, "--save-dir", tmp_path, "--target-expert-parallel-size", 3)
    refused(run, "4 experts cannot be spread over ep=3; use ep 1, 2 or 4")
    assert not (tmp_path / TRACKER).exists()

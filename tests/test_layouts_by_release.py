"""Layouts of single releases: all experts of a rank in one tensor, and the down projections of latents in one.

The files by hand are made of separate tensors as Megatron-LM makes them when it loads older checkpoints: `torch.stack` over
experts, and on each rank `torch.cat` of its rows of queries and those of keys and values.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_converters.formats.megatron.rank_files_source import MegatronSource
from megatron_converters.logits.local_names import with_local_names
from tests.conversions import different, hf_to_megatron, hf_to_torch_dist, megatron_to_hf, reshard
from tests.helpers import convert, hf_tensors, nothing_complete, refused, succeeded, verb
from tests.oracle import by_hand_kinds

HFModel = Callable[..., Path]
State = dict[str, Any]
_ONE: dict[str, Any] = {"expert_layout": "single", "mla_layout": "fused"}
_EXPERT = re.compile(r"(.*\.experts\.linear_fc[12]\.(?:weight|bias))(\d+)")
_ATTENTION = "self_attention.linear_"


def in_one(model: State, *, flat: bool = False) -> State:
    """Tensors of a rank, with separate experts and down projections made one; `flat` leaves out the axis of experts."""
    found: State = {}
    experts: dict[str, list[torch.Tensor]] = {}
    for key, value in model.items():
        if (match := _EXPERT.fullmatch(key)) is not None:
            experts.setdefault(match[1], []).append(value)
        elif "linear_q_down_proj" in key:
            other = model[key.replace("linear_q_", "linear_kv_")]
            found[key.replace("linear_q_", "linear_qkv_")] = None if value is None else torch.cat([value, other])
        elif key.endswith("input_layernorm.weight"):
            found[key.replace("input_layernorm.", f"{_ATTENTION}qkv_down_proj.layer_norm_")] = value
        elif "linear_kv_down_proj" not in key and not key.endswith("input_layernorm._extra_state"):
            found[key] = value
    joined = {key: (torch.cat if flat else torch.stack)(values) for key, values in experts.items()}
    return found | joined


def ranks(root: Path) -> list[Path]:
    """Files of the ranks."""
    return sorted(root.glob("iter_0000001/*/*.pt"))


def rewrite(root: Path, change: Callable[[State], State], **args: Any) -> Path:
    """Change the models and args of all ranks."""
    for path in ranks(root):
        content = torch.load(path, weights_only=False)
        content["model"] = change(content["model"])
        vars(content["args"]).update(args)
        torch.save(content, path)
    return root


def local_names(root: Path) -> State:
    """Tensors of the first rank by the names of local layers, which `verify --logits` runs."""
    source = MegatronSource(root)
    state = {
        key: value
        for key, value in torch.load(ranks(root)[0], weights_only=False)["model"].items()
        if value is not None
    }
    return with_local_names(state, source.spec, source.parallel, source.parallel.ranks(0)[0], 0)


def same(theirs: Path, ours: Path) -> None:
    """Every rank has the same tensors of the same bits, and the same further entries."""
    assert [path.parent.name for path in ranks(theirs)] == [path.parent.name for path in ranks(ours)]
    for one, other in zip(ranks(theirs), ranks(ours), strict=True):
        wanted, found = (torch.load(path, weights_only=False)["model"] for path in (one, other))
        assert sorted(found) == sorted(wanted)
        for key, value in wanted.items():
            assert (found[key] is None) == (value is None), key
            assert value is None or torch.equal(found[key], value), key


@pytest.fixture(scope="module")
def hf(hf_model: HFModel) -> Path:
    return hf_model("deepseek-v3")


@pytest.fixture(scope="module")
def ours(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_to_megatron(hf, tmp_path_factory.mktemp("one"), tp=2, pp=2, ep=2, divisor=16, **_ONE)


@pytest.fixture(scope="module")
def theirs(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by hand. Each rank has its share of the down projections, as releases before 0.14 cut them, too."""
    root = by_hand_kinds.convert(
        hf,
        tmp_path_factory.mktemp("by_hand"),
        down_cut=True,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=2,
        transformer_impl="transformer_engine",
        moe_grouped_gemm=True,
    )

    def change(model: State) -> State:
        head = {"output_layer._extra_state": None} if "output_layer.weight" in model else {}
        return in_one(model) | head

    return rewrite(root, change, moe_single_grouped_weight=True, mla_down_proj_fusion=True)


def test_files_are_those_by_hand(theirs: Path, ours: Path) -> None:
    same(theirs, ours)
    args = torch.load(ranks(ours)[0], weights_only=False)["args"]
    assert (args.moe_single_grouped_weight, args.mla_down_proj_fusion, args.moe_grouped_gemm) == (True, True, True)


def test_files_by_hand_are_read(theirs: Path, hf: Path, tmp_path: Path) -> None:
    assert different(hf_tensors(hf), hf_tensors(megatron_to_hf(theirs, tmp_path / "hf", hf_config=hf))) == []
    run = succeeded(verb("inspect", theirs))
    assert "single" in run.out


def test_to_the_usual_layout_and_sizes(ours: Path, hf: Path, tmp_path: Path) -> None:
    usual: dict[str, Any] = {"tp": 1, "pp": 1, "ep": 1, "divisor": 16}
    same(hf_to_megatron(hf, tmp_path / "direct", **usual), reshard(ours, tmp_path / "back", **usual))
    other: dict[str, Any] = {"tp": 4, "pp": 1, "ep": 4, "etp": 1, "divisor": 16, **_ONE}
    same(hf_to_megatron(hf, tmp_path / "four", **other), reshard(tmp_path / "back", tmp_path / "again", **other))


def test_whole_down_projections_and_flat_experts(hf: Path, tmp_path: Path) -> None:
    """Without Transformer Engine's fused norm, down projections are on every rank; older grouped tensors have two dimensions."""
    root = hf_to_megatron(hf, tmp_path / "megatron", tp=2, ep=2)

    def change(model: State) -> State:
        norms = {key: value for key, value in model.items() if key.endswith("input_layernorm.weight")}
        joined = in_one(model, flat=True)
        return {
            key: value for key, value in joined.items() if not key.endswith("qkv_down_proj.layer_norm_weight")
        } | norms

    assert different(hf_tensors(hf), hf_tensors(megatron_to_hf(rewrite(root, change), tmp_path / "hf"))) == []


def test_biases_of_experts(hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_model("gpt-oss")
    one = hf_to_megatron(folder, tmp_path / "one", ep=2, expert_layout="single")
    grouped = hf_to_megatron(folder, tmp_path / "grouped", ep=2, expert_layout="grouped")
    local = [local_names(root) for root in (one, grouped)]
    assert different(*local) == [] and any("local_experts.1.linear_fc1.bias" in key for key in local[0])
    same(rewrite(grouped, in_one), one)
    assert torch.load(ranks(one)[0], weights_only=False)["args"].moe_single_grouped_bias is True
    assert different(hf_tensors(folder), hf_tensors(megatron_to_hf(one, tmp_path / "hf"))) == []


def test_torch_dist_has_the_same_keys(hf: Path, tmp_path: Path) -> None:
    """`sharded_state_dict` splits both, so that checkpoints of either layout load into the other; args alone differ."""
    made = hf_to_torch_dist(hf, tmp_path / "one", tp=2, pp=2, ep=2, divisor=16, **_ONE)
    usual = hf_to_torch_dist(hf, tmp_path / "usual", tp=2, pp=2, ep=2, divisor=16)
    for one, other in zip(sorted(made.rglob("*.distcp")), sorted(usual.rglob("*.distcp")), strict=True):
        assert one.read_bytes() == other.read_bytes()
    args = torch.load(made / "iter_0000001" / "common.pt", weights_only=False)["args"]
    assert (args.moe_single_grouped_weight, args.mla_down_proj_fusion) == (True, True)
    back = reshard(made, tmp_path / "torch", tp=2, pp=2, ep=2, divisor=16, **_ONE)
    same(hf_to_megatron(hf, tmp_path / "direct", tp=2, pp=2, ep=2, divisor=16, **_ONE), back)


def test_a_member_of_another_size_is_named(hf: Path, tmp_path: Path) -> None:
    root = hf_to_megatron(hf, tmp_path / "megatron", tp=2, **_ONE)
    rewrite(root, lambda model: {k: v[:-1] if "qkv_down_proj.weight" in k else v for k, v in model.items()})
    words = "linear_qkv_down_proj.weight (layer 0 q_down) has shape [35, 64]; the args require [36, 64]"
    refused(verb("verify", root, root), words, code=2)


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("mixtral", ("--expert-layout", "single", "--saver-transformer-impl", "local"), "transformer_engine alone"),
        ("deepseek-v3", ("--mla-layout", "fused", "--saver-transformer-impl", "local"), "transformer_engine alone"),
        ("mixtral", ("--mla-layout", "fused"), "has no multi-latent attention with both"),
        ("deepseek-v2-lite", ("--mla-layout", "fused"), "has no multi-latent attention with both"),
        ("mixtral", ("--expert-layout", "single", "--megatron-version", "0.18"), "--moe-single-grouped-weight"),
        ("deepseek-v3", ("--mla-layout", "fused", "--megatron-version", "0.18"), "--mla-down-proj-fusion"),
    ],
)
def test_refusals(family: str, options: tuple[str, ...], words: str, hf_model: HFModel, tmp_path: Path) -> None:
    folders = ("--load-dir", hf_model(family), "--save-dir", tmp_path / "megatron")
    run = convert("--loader", "mixtral_hf", "--saver", "mcore", *folders, *options)
    refused(run, words, code=run.code)
    nothing_complete(tmp_path / "megatron")

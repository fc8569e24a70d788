"""Checkpoints of `torch_dcp` and `fsdp_dtensor` that several processes of torch.distributed.checkpoint saved from DTensors.

Processes, DTensors and files are real; the names are those of Megatron-LM's `preprocess_fsdp_dtensor_state_dict`, made by hand.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from megatron_converters.formats.megatron.opening import open_megatron
from megatron_converters.formats.megatron.torch_dist_source import TorchDistSource
from megatron_converters.storage import dcp
from tests.conversions import different, hf_to_torch_dist, megatron_to_hf, refusal
from tests.dcp_processes import save_all
from tests.helpers import hf_tensors, rank_content, succeeded, verb
from tests.oracle import by_hand_kinds

HFModel = Callable[..., Path]
State = dict[str, Any]
#: Model, and what of it is under other names; format.
CASES = {
    "torch_dcp": ("deepseek-v3", ()),
    "gate and up apart": ("deepseek-v3", ("fc1",)),
    "fused down projections": ("deepseek-v3", ("fc1", "down")),
    "blocks of a gated DeltaNet apart": ("qwen3-next", ("fc1", "delta")),
}
_PROCESSES = 2


def halves(model: State, _: Namespace) -> State:
    """`handle_swiglu_in_state_dict`."""
    found: State = {}
    for key, value in model.items():
        if ".linear_fc1.weight" in key:
            found |= dict(zip((f"{key}_w", f"{key}_v"), value.chunk(2), strict=True))
        else:
            found[key] = value
    return found


def one_down_projection(model: State, _: Namespace) -> State:
    """`FusedMLASelfAttention`, whose names 0.17 to 0.19 leave as they are."""
    found: State = {}
    for key, value in model.items():
        if "linear_q_down_proj" in key:
            other = model[key.replace("linear_q_", "linear_kv_")]
            found[key.replace("linear_q_", "linear_qkv_")] = torch.cat([value, other])
        elif key.endswith("input_layernorm.weight"):
            found[key.replace("input_layernorm.", "self_attention.linear_qkv_down_proj.layer_norm_")] = value
        elif "linear_kv_down_proj" not in key:
            found[key] = value
    return found


def delta_blocks(model: State, args: Namespace) -> State:
    """`handle_gdn_in_state_dict` (0.18 on)."""
    keys = args.linear_num_key_heads * args.linear_key_head_dim
    values, heads = args.linear_num_value_heads * args.linear_value_head_dim, args.linear_num_value_heads
    rows = {
        "in_proj.weight": dict(query=keys, key=keys, value=values, z=values, beta=heads, alpha=heads),
        "conv1d.weight": dict(query=keys, key=keys, value=values),
    }
    found: State = {}
    for key, value in model.items():
        sizes = next((sizes for end, sizes in rows.items() if key.endswith(f".{end}")), None)
        if sizes is None:
            found[key] = value
        else:
            found |= {f"{key}.{name}": part for name, part in zip(sizes, value.split([*sizes.values()]), strict=True)}
    return found


_CHANGES = {"fc1": halves, "down": one_down_projection, "delta": delta_blocks}


def state_of(hf: Path, root: Path, changes: tuple[str, ...]) -> State:
    """State dict of a run on one tensor-parallel rank; Megatron-FSDP's has names of its own."""
    content = rank_content(by_hand_kinds.convert(hf, root, transformer_impl="transformer_engine"))
    model = {key: value for key, value in content["model"].items() if value is not None}
    for change in changes:
        model = _CHANGES[change](model, content["args"])
    if changes:
        model = {f"module.{key}": value for key, value in model.items()}
    moments = {key: {"exp_avg": value.float(), "exp_avg_sq": value.float()} for key, value in [*model.items()][:2]}
    return {**content, "model": model, "optimizer": {"state": moments}, "rng_state": [{"np_rng_state": torch.ones(3)}]}


@pytest.fixture(scope="module")
def saved(hf_model: HFModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the cases, saved by processes together."""
    root = tmp_path_factory.mktemp("sharded")
    jobs, folders = [], {}
    for number, (case, (family, changes)) in enumerate(CASES.items()):
        content, folders[case] = root / f"{number}.pt", root / f"{number}"
        torch.save(state_of(hf_model(family), root / f"legacy{number}", changes), content)
        jobs.append((content, folders[case]))
    mp.start_processes(save_all, (_PROCESSES, jobs, root / "store"), nprocs=_PROCESSES, start_method="fork")
    return folders


@pytest.mark.parametrize("case", CASES)
def test_to_hugging_face(case: str, saved: dict[str, Path], hf_model: HFModel, tmp_path: Path) -> None:
    hf, folder = hf_model(CASES[case][0]), saved[case]
    index = dcp.read_index(folder)
    assert len(index.files) == _PROCESSES
    assert any(len(tensor.chunks) == _PROCESSES for tensor in index.tensors.values())
    source = open_megatron(folder)
    assert isinstance(source, TorchDistSource)
    assert source.origin.checkpoint_format == ("fsdp_dtensor" if CASES[case][1] else "torch_dcp")
    assert different(hf_tensors(hf), hf_tensors(megatron_to_hf(folder, tmp_path / "hf", hf_config=hf))) == []


def test_verbs_see_them(saved: dict[str, Path], hf_model: HFModel, tmp_path: Path) -> None:
    folder = saved["fused down projections"]
    assert "Megatron-LM, fsdp_dtensor" in succeeded(verb("inspect", folder)).out
    ours = hf_to_torch_dist(hf_model("deepseek-v3"), tmp_path / "ours")
    assert "0 of 101 compared tensors differ in their elements" in verb("diff", folder, ours).out
    succeeded(verb("plan", folder, tmp_path / "hf"))


def test_blocks_of_a_cut_tensor_are_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    """With tensor parallelism the rows of queries alternate with those of keys and values; shapes do not tell."""
    content = torch.load(saved["fused down projections"].parent / "2.pt", weights_only=False)
    content["args"].tensor_model_parallel_size = 2
    path = tmp_path / "cut.pt"
    torch.save(content, path)
    mp.start_processes(save_all, (1, [(path, tmp_path / "cut")], tmp_path / "store"), nprocs=1, start_method="fork")
    assert "linear_qkv_down_proj.weight (layer 0 q_down) holds several blocks, and the args say" in refusal(
        tmp_path / "cut"
    )

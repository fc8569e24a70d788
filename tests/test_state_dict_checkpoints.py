"""Checkpoints that torch.distributed.checkpoint saved from a state dict: Megatron-LM's formats torch_dcp and fsdp_dtensor."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_converters.formats.megatron.opening import open_megatron
from tests.conversions import different, megatron_to_hf, refusal, reshard
from tests.helpers import hf_tensors, rank_content, refused, same_tensors, succeeded, verb
from tests.oracle import by_hand

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

HFModel = Callable[..., Path]
State = dict[str, Any]
_FC1 = ".linear_fc1.weight"


def state_dict(hf: Path, root: Path, **options: Any) -> State:
    """What `generate_state_dict` of Megatron-LM gives for a model on one rank."""
    content = rank_content(by_hand.convert(hf, root / "legacy", **options))
    return {**content, "num_floating_point_operations_so_far": 0, "rng_state": [{"np_rng_state": torch.ones(3)}]}


def with_halves(model: State) -> State:
    """Model with gate and up apart, as `handle_swiglu_in_state_dict` has them."""
    found: State = {}
    for key, value in model.items():
        if _FC1 in key and value is not None:
            found |= dict(zip((f"{key}_w", f"{key}_v"), value.chunk(2), strict=True))
        else:
            found[key] = value
    return found


def save(state: State, folder: Path) -> Path:
    """Save as Megatron-LM's `save_checkpoint` does, with torch's default planner, which flattens the state."""
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def save_fsdp(state: State, folder: Path) -> Path:
    """The same with the names and halves of Megatron-FSDP."""
    model = {f"module.{key}": value for key, value in with_halves(state["model"]).items()}
    moments = {
        f"module.module.{key}": {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)} for key in state["model"]
    }
    return save({**state, "model": model, "optimizer": {"state": moments}}, folder)


@pytest.mark.parametrize(
    ("family", "impl"),
    [("llama2", "local"), ("qwen2-tied", "transformer_engine"), ("mixtral", "local"), ("qwen3-moe", "local")],
)
@pytest.mark.parametrize("writer", [save, save_fsdp])
def test_to_hugging_face(
    writer: Callable[[State, Path], Path], family: str, impl: str, hf_model: HFModel, tmp_path: Path
) -> None:
    folder = writer(state_dict(hf_model(family), tmp_path, impl=impl), tmp_path / "dcp")
    source = open_megatron(folder)
    assert source.origin.checkpoint_format == ("torch_dcp" if writer is save else "fsdp_dtensor")
    assert source.origin.iteration == 1
    assert not [note for note in source.origin.notes if "which is taken off" in note]
    back = megatron_to_hf(folder, tmp_path / "hf")
    assert different(hf_tensors(hf_model(family)), hf_tensors(back)) == []


def test_to_other_sizes(hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_model("llama2")
    made = save_fsdp(state_dict(folder, tmp_path), tmp_path / "dcp")
    ours = reshard(made, tmp_path / "ours", tp=2, divisor=16, impl="local")
    wanted = by_hand.convert(folder, tmp_path / "wanted", tp=2)
    for rank in ("mp_rank_00", "mp_rank_01"):
        one, other = (rank_content(root, rank)["model"] for root in (ours, wanted))
        tensors = [key for key, value in other.items() if value is not None]
        same_tensors({key: one[key] for key in tensors}, {key: other[key] for key in tensors})


def test_verbs_take_them(hf_model: HFModel, tmp_path: Path) -> None:
    made = save(state_dict(hf_model("llama2"), tmp_path), tmp_path / "dcp")
    run = succeeded(verb("inspect", made))
    assert "Megatron-LM, torch_dcp" in run.out
    assert "rng_state: 1 tensor, " in run.out
    succeeded(verb("verify", hf_model("llama2"), made))
    refused(
        verb("verify", hf_model("llama2"), made, "--logits"),
        "is of the format torch_dcp",
        "--ckpt-format torch_dist",
        code=2,
    )


def test_gate_and_up_that_alternate(hf_model: HFModel, tmp_path: Path) -> None:
    """With tensor parallelism the whole first linear has each rank's gate above its up: shapes do not tell."""
    state = state_dict(hf_model("llama2"), tmp_path)
    state["args"].tensor_model_parallel_size = 2
    message = refusal(save(state, tmp_path / "whole"))
    assert (
        "decoder.layers.0.mlp.linear_fc1.weight (layer 0 fc1) holds several blocks, and the args say a tensor-parallel"
        in message
    )
    assert "linear_qkv" not in message
    folder = save_fsdp(state, tmp_path / "halves")
    back = megatron_to_hf(folder, tmp_path / "hf")
    assert different(hf_tensors(hf_model("llama2")), hf_tensors(back)) == []


def test_gate_and_up_of_experts_that_alternate(hf_model: HFModel, tmp_path: Path) -> None:
    state = state_dict(hf_model("mixtral"), tmp_path)
    state["args"].expert_tensor_parallel_size = 2
    message = refusal(save(state, tmp_path / "whole"))
    assert (
        "local_experts.7.linear_fc1.weight (layer 0 expert 7 expert_fc1) holds several blocks, and the args say"
        in message
    )


def test_without_args(hf_model: HFModel, tmp_path: Path) -> None:
    state = state_dict(hf_model("llama2"), tmp_path)
    del state["args"]
    whole = save(state, tmp_path / "whole")
    assert ".metadata has no args, which describe the model" in refusal(whole)
    assert "and the args do not say by which tensor-parallel size" in refusal(whole, hf_config=hf_model("llama2"))
    halves = save_fsdp(state, tmp_path / "halves")
    back = megatron_to_hf(halves, tmp_path / "hf", hf_config=hf_model("llama2"))
    assert different(hf_tensors(hf_model("llama2")), hf_tensors(back)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda model: model.pop("decoder.final_layernorm.weight"),
            "decoder.final_layernorm.weight (final_norm) is missing",
        ),
        (
            lambda model: model.update({"decoder.layers.0.mlp.linear_fc1.weight_w": torch.ones(2)}),
            "layer 0 fc1: decoder.layers.0.mlp.linear_fc1.weight and decoder.layers.0.mlp.linear_fc1.weight_w are both there",
        ),
        (lambda model: model.update(extra=torch.ones(2)), "model.extra is not a tensor of this model"),
    ],
)
def test_what_is_missing_or_too_much(
    change: Callable[[State], object], words: str, hf_model: HFModel, tmp_path: Path
) -> None:
    state = state_dict(hf_model("llama2"), tmp_path)
    change(state["model"])
    assert words in refusal(save(state, tmp_path / "dcp"))


def test_args_that_are_none(hf_model: HFModel, tmp_path: Path) -> None:
    state = state_dict(hf_model("llama2"), tmp_path)
    state["args"] = Namespace()
    assert "num_layers" in refusal(save(state, tmp_path / "dcp"))


def test_weights_of_another_library(tmp_path: Path) -> None:
    """As FSDP of transformers or torchtitan saves them."""
    model = {"model.layers.0.self_attn.q_proj.weight": torch.ones(2), "model.embed_tokens.weight": torch.ones(2)}
    folder = save({"model": model, "optimizer": {"state": {"x": torch.ones(2)}}}, tmp_path / "pytorch_model_fsdp_0")
    assert "so this is not a checkpoint of a GPT; the names are model.model.embed_tokens.weight, " in refusal(folder)

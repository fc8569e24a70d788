"""Training state beside a model: said in a few lines, however many tensors, and where it has the weights unrounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_converters.formats.megatron.opening import open_megatron
from tests.bare import edit
from tests.conversions import hf_to_megatron
from tests.helpers import succeeded, verb
from tests.oracle import by_hand_dist

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

HFModel = Callable[..., Path]
BUCKET = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0"
WARNING = "warning: the stored bfloat16 weights are widened to float32, which does not restore what rounding has lost; "


@pytest.fixture
def made(hf_model: HFModel, tmp_path: Path) -> Callable[..., Path]:
    """Function `made(**tensors)`: a distributed checkpoint in bfloat16 with these tensors beside its model."""

    def make(further: dict[str, Any], dtype: str = "bfloat16") -> Path:
        model, content = by_hand_dist.state(hf_model("llama2", dtype=dtype), tmp_path)
        entries = by_hand_dist.tensors(model, stacked=True)
        by_hand_dist.write(tmp_path / "made", {**entries, **further}, content)
        return tmp_path / "made"

    return make


#: Layouts of a distributed optimizer (core/optimizer/distrib_optimizer.py): by parameter, and flat buckets.
FULLY = {
    f"{prefix}optimizer.state.{state}.decoder.layers.{layer}.mlp.linear_fc2.weight": torch.ones(3)
    for prefix in ("", "chained_1.")
    for state in ("param", "exp_avg", "exp_avg_sq")
    for layer in range(40)
}
FLAT = {f"{BUCKET}.{state}": torch.ones(5) for state in ("param", "exp_avg", "exp_avg_sq")}


def test_a_line_for_each_state(made: Callable[..., Path], tmp_path: Path) -> None:
    folder = made({**FULLY, "rng_state/shard_0_1": [None]})
    ignored = open_megatron(folder).origin.ignored
    assert [line.partition(",")[0] for line in ignored] == [
        f"{first} {state}: 40 tensors"
        for first in ("chained_1", "optimizer")
        for state in ("exp_avg", "exp_avg_sq", "param")
    ]
    assert all(line.endswith(" bytes (training state)") for line in ignored)
    run = succeeded(verb("plan", folder, tmp_path / "hf", "--no-measure"))
    assert run.out.count("left out: ") == len(ignored)
    assert succeeded(verb("inspect", folder)).out.count("  left out  ") == len(ignored)


@pytest.mark.parametrize(
    ("state", "named"),
    [
        (FULLY, "chained_1 param and optimizer param, 80 tensors"),
        (FLAT, "optimizer param, 1 tensor"),
        ({"optimizer.state.fp32_param.output_layer.weight": torch.ones(2)}, "optimizer fp32_param, 1 tensor"),
    ],
    ids=["by parameter", "flat", "not distributed"],
)
def test_originals_are_said_where_float32_is_asked_for(
    state: dict[str, Any], named: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    folder = made(state)
    run = succeeded(verb("convert", folder, tmp_path / "hf", "--dtype", "fp32"))
    assert f"{WARNING}the optimizer's float32 originals ({named}) are not read" in run.err
    assert WARNING in succeeded(verb("plan", folder, tmp_path / "plan", "--dtype", "fp32", "--no-measure")).out
    assert WARNING not in succeeded(verb("convert", folder, tmp_path / "same")).err
    assert WARNING not in succeeded(verb("convert", folder, tmp_path / "half", "--dtype", "fp16")).err


def test_nothing_is_said_without_them(made: Callable[..., Path], tmp_path: Path) -> None:
    folder = made({"optimizer.state.exp_avg.output_layer.weight": torch.ones(2)})
    assert WARNING not in succeeded(verb("convert", folder, tmp_path / "hf", "--dtype", "fp32")).err


def test_nothing_is_lost_where_weights_are_float32(made: Callable[..., Path], tmp_path: Path) -> None:
    run = succeeded(verb("convert", made(FULLY, "float32"), tmp_path / "hf", "--dtype", "fp32"))
    assert "are widened" not in run.err


@pytest.mark.parametrize("distributed", [True, False])
def test_originals_beside_files_of_ranks(distributed: bool, hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_to_megatron(hf_model("llama2", dtype="bfloat16"), tmp_path / "made") / "iter_0000001"
    if distributed:
        torch.save({}, folder / "mp_rank_00" / "distrib_optim.pt")
        named = "in distrib_optim.pt"
    else:
        optimizer = {"optimizer": {}, "fp32_from_fp16_params": [[torch.ones(2)]]}
        edit(folder, lambda content: {**content, "optimizer": optimizer})
        named = "fp32_from_fp16_params of the optimizer"
    run = succeeded(verb("convert", folder, tmp_path / "hf", "--dtype", "fp32"))
    assert f"{WARNING}the optimizer's float32 originals ({named}) are not read" in run.err

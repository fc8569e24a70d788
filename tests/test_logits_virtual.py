"""Logits of checkpoints with virtual pipeline stages and layouts: right ones agree, exchanged and damaged stages are found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_converters.basics.errors import ConversionError
from megatron_converters.formats.megatron.reading import MegatronReadOptions
from megatron_converters.logits.checkpoint import Checkpoint
from megatron_converters.logits.megatron import MegatronModel, _concatenate, _logits, _setup
from megatron_converters.logits.pool import Pool
from megatron_converters.sharding.stages import PipelineSplit
from tests.conversions import hf_to_megatron
from tests.logits_processes import PRELOADED
from tests.oracle.args import megatron_args
from tests.oracle.hf import hf_logits, make_model, sample_tokens
from tests.oracle.pool import MegatronPool, write_checkpoint

TOKENS = sample_tokens()
VOCABULARY = 199
CLOSE = 1e-5
SEEN = 1e-3
TWO_EACH = PipelineSplit(virtual=2)
Compute = Callable[[Checkpoint], np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def compute() -> Iterator[Compute]:
    """What `MegatronModel.logits` computes, in four processes in which megatron-core is imported once for all tests."""
    with Pool(4, _setup, 120, PRELOADED) as pool:

        def run(told: Checkpoint) -> np.ndarray[Any, Any]:
            return _concatenate([part for part in pool.run(_logits, told, TOKENS.numpy()) if part], VOCABULARY)[0]

        yield run


def told(checkpoint: Path) -> Checkpoint:
    model = MegatronModel(checkpoint, MegatronReadOptions())
    assert model.processes == 4
    return model._checkpoint


def apart(one: np.ndarray[Any, Any], other: torch.Tensor) -> float:
    return float(np.abs(one - other.numpy()[..., :VOCABULARY]).max())


def edit(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply `change` to the first rank's file."""
    path = checkpoint / "iter_0000001" / "mp_rank_00_000" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("family", "layers", "options"),
    [
        ("llama3.1", 8, {"split": TWO_EACH, "tp": 2, "impl": "local"}),
        ("llama3.2-tied", 6, {"split": PipelineSplit(embedding=True, loss=True, virtual=2), "tp": 2}),
        ("qwen2", 5, {"split": PipelineSplit(layout="Et|t*2|,t|tL"), "tp": 2}),
        ("qwen2", 4, {"split": PipelineSplit(layout="Ettt|tL"), "tp": 2}),
        ("mixtral", 4, {"split": TWO_EACH, "ep": 2, "expert_layout": "grouped"}),
        ("qwen3-moe-dense-layers", 4, {"split": TWO_EACH, "tp": 2, "ep": 2, "etp": 1, "impl": "local"}),
    ],
)
def test_stages_and_layouts(
    compute: Compute, tmp_path: Path, family: str, layers: int, options: dict[str, Any]
) -> None:
    hf = make_model(family, tmp_path / "hf", num_hidden_layers=layers, hidden_size=32)
    checkpoint = hf_to_megatron(hf, tmp_path / "megatron", pp=2, **options)
    assert apart(compute(told(checkpoint)), hf_logits(hf, TOKENS)) < CLOSE


@pytest.mark.parametrize("more", [{}, {"num_experts": 4, "moe_ffn_hidden_size": 48, "moe_grouped_gemm": True}], ids=str)
def test_what_real_modules_write(
    compute: Compute, megatron_pool: MegatronPool, tmp_path: Path, more: dict[str, Any]
) -> None:
    """The second case stacks the experts of each rank."""
    sizes = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    args = megatron_args(num_layers=8, **sizes, **more)
    wanted = write_checkpoint(megatron_pool, tmp_path, args, seed=3, tokens=TOKENS)
    assert apart(compute(told(tmp_path)), wanted) < CLOSE


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """A model of eight layers and its checkpoint, two stages on each of two ranks, each of them cut in two."""
    hf = make_model("llama2", tmp_path / "hf", num_hidden_layers=8)
    return hf, hf_to_megatron(hf, tmp_path / "megatron", tp=2, pp=2, split=TWO_EACH)


def _exchange_stages(content: dict[str, Any]) -> None:
    """The stages of a rank have the same keys but for what stands before the first."""
    first, second = content["model0"], content["model1"]
    for key, value in second.items():
        first[key], second[key] = value, first[key]


def _exchange_layers_across_stages(content: dict[str, Any]) -> None:
    key = "decoder.layers.1.mlp.linear_fc2.weight"
    first, second = content["model0"], content["model1"]
    first[key], second[key] = second[key], first[key]


@pytest.mark.parametrize("change", [_exchange_stages, _exchange_layers_across_stages])
def test_weights_on_a_wrong_stage_are_seen(
    compute: Compute, made: tuple[Path, Path], change: Callable[[dict[str, Any]], object]
) -> None:
    hf, checkpoint = made
    edit(checkpoint, change)
    assert apart(compute(told(checkpoint)), hf_logits(hf, TOKENS)) > SEEN


def test_what_a_stage_lacks_is_named(compute: Compute, made: tuple[Path, Path]) -> None:
    _, checkpoint = made
    found = told(checkpoint)
    edit(checkpoint, lambda content: content["model1"].pop("decoder.layers.0.mlp.linear_fc2.weight"))
    with pytest.raises(ConversionError, match="megatron-core does not load") as error:
        compute(found)
    for words in ("mp_rank_00_000/model_optim_rng.pt: model1: ", 'Missing key(s) in state_dict: "decoder.layers.0.mlp'):
        assert words in str(error.value)
    assert "model0" not in str(error.value)

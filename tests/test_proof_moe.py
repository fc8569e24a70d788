"""The proof for mixtures of experts: megatron-core computes what transformers computes, and the way back is exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_converters.basics.errors import ConversionError
from megatron_converters.formats.huggingface.target import FUSED, HFOptions, HFTarget
from megatron_converters.formats.megatron.rank_files_source import MegatronSource
from tests.conversions import different, hf_to_megatron, megatron_to_hf, reshard, run
from tests.helpers import hf_tensors
from tests.oracle.args import megatron_args
from tests.oracle.hf import hf_logits, make_model, sample_tokens
from tests.oracle.pool import MegatronPool, write_checkpoint
from tests.pairs import chessboard, latin

TOKENS = sample_tokens()
VOCABULARY = 199
TOLERANCE = 1e-4
SEEN = 1e-3
FAMILIES = ("mixtral", "qwen2-moe", "qwen3-moe", "qwen3-moe-dense-layers")
#: Tensor-, pipeline-, expert- and expert-tensor-parallel sizes.
GRIDS = ((1, 1, 1, 1), (2, 1, 1, 2), (1, 1, 2, 1), (2, 1, 2, 2), (1, 2, 2, 1), (2, 1, 2, 1), (1, 1, 4, 1), (2, 2, 1, 2))
STORED = (
    ("local", "sequential"),
    ("transformer_engine", "sequential"),
    ("transformer_engine", "grouped"),
    ("local", "stacked"),
)

Models = dict[str, tuple[Path, torch.Tensor]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Each family's tiny model and the logits that transformers computes from it."""
    root = tmp_path_factory.mktemp("experts")
    folders = {family: make_model(family, root / family) for family in FAMILIES}
    return {family: (folder, hf_logits(folder, TOKENS)) for family, folder in folders.items()}


@pytest.mark.parametrize(("grid", "family", "stored"), latin(GRIDS, FAMILIES, STORED), ids=str)
def test_megatron_computes_what_transformers_computes(
    megatron_pool: MegatronPool,
    models: Models,
    tmp_path: Path,
    grid: tuple[int, ...],
    family: str,
    stored: tuple[str, str],
) -> None:
    folder, wanted = models[family]
    sizes = dict(zip(("tp", "pp", "ep", "etp"), grid, strict=True))
    impl, layout = stored
    checkpoint = hf_to_megatron(folder, tmp_path / "megatron", **sizes, impl=impl, expert_layout=layout)
    got = megatron_pool.logits(checkpoint, TOKENS)[..., :VOCABULARY]
    assert float((got - wanted).abs().max()) < TOLERANCE


LAYOUTS = ("sequential", "grouped", "stacked", "dynamic")


def legal(tp: int, ep: int, etp: int) -> bool:
    """Whether each rank has a directory of its own: the name has no expert-tensor number."""
    return etp <= tp


@pytest.mark.parametrize(("layout", "tp", "pp"), latin(LAYOUTS, (1, 2, 4), (1, 2, 4)))
def test_every_size_and_layout_comes_back_exactly(
    models: Models, tmp_path: Path, layout: str, tp: int, pp: int
) -> None:
    """Half of the sizes that cut experts, another half at each step of TP; pipeline stages, which move layers whole, in turn."""
    folder, _ = models["mixtral"]
    for ep, etp in chessboard((1, 2, 4), (1, 2, 4), LAYOUTS.index(layout) + tp // 2):
        target = tmp_path / f"{ep}-{etp}"
        options: dict[str, Any] = {"tp": tp, "pp": pp, "ep": ep, "etp": etp, "expert_layout": layout}
        if not legal(tp, ep, etp):
            with pytest.raises(ConversionError, match="use an etp that divides tp"):
                hf_to_megatron(folder, target / "megatron", **options)
            continue
        checkpoint = hf_to_megatron(folder, target / "megatron", **options)
        back = megatron_to_hf(checkpoint, target / "hf")
        assert different(hf_tensors(folder), hf_tensors(back)) == [], options


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_experts_are_what_transformers_saves(models: Models, tmp_path: Path, family: str) -> None:
    folder, wanted = models[family]
    fused = make_model(family, tmp_path / "fused", fused_experts=True)
    checkpoint = hf_to_megatron(folder, tmp_path / "megatron", tp=2, ep=2)
    options = HFOptions(expert_layout=FUSED, max_shard_size=100_000)
    run(MegatronSource(checkpoint), HFTarget(tmp_path / "back", options))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert different(hf_tensors(fused), hf_tensors(tmp_path / "back")) == []
    assert torch.equal(hf_logits(tmp_path / "back", TOKENS), wanted)


@pytest.mark.parametrize("family", ["qwen2-moe", "qwen3-moe-dense-layers"])
def test_reshard_equals_direct_conversion(models: Models, tmp_path: Path, family: str) -> None:
    folder, _ = models[family]
    first = hf_to_megatron(folder, tmp_path / "first", tp=2, pp=2, ep=2, expert_layout="sequential")
    target: dict[str, Any] = {"tp": 4, "pp": 1, "ep": 4, "etp": 2, "expert_layout": "grouped"}
    second = reshard(first, tmp_path / "second", **target)
    direct = hf_to_megatron(folder, tmp_path / "direct", **target)
    files = sorted(direct.glob("iter_0000001/*/*.pt"))
    assert len(files) == 8
    for file in files:
        ours = torch.load(second / file.relative_to(direct), weights_only=False)["model"]
        theirs = torch.load(file, weights_only=False)["model"]
        assert list(ours) == list(theirs)
        assert all(theirs[key] is None or torch.equal(ours[key], theirs[key]) for key in theirs)


#: Checkpoints that real megatron-core modules write: arguments, and whose names.
REAL: dict[str, tuple[dict[str, Any], str]] = {
    "sequential, fused norms": ({"moe_grouped_gemm": False}, "transformer_engine"),
    "sequential": ({"moe_grouped_gemm": False}, "local"),
    "grouped": ({"moe_grouped_gemm": True}, "transformer_engine"),
    "stacked": ({"moe_grouped_gemm": True}, "local"),
}


@pytest.mark.parametrize(("tp", "pp", "ep", "etp"), GRIDS)
@pytest.mark.parametrize("name", REAL)
def test_checkpoint_of_real_megatron_modules_to_hf(
    megatron_pool: MegatronPool, tmp_path: Path, name: str, tp: int, pp: int, ep: int, etp: int
) -> None:
    more, impl = REAL[name]
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    sizes |= {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp}
    experts = {"num_experts": 8, "moe_ffn_hidden_size": 48, "moe_router_topk": 2, "moe_layer_freq": 1}
    args = megatron_args(**sizes, **experts, **more, transformer_impl=impl)
    wanted = write_checkpoint(megatron_pool, tmp_path / "megatron", args, seed=3, tokens=TOKENS)
    back = megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert float((hf_logits(back, TOKENS) - wanted[..., :VOCABULARY]).abs().max()) < TOLERANCE


Content = dict[str, Any]
_FC1 = "decoder.layers.0.mlp.experts.local_experts.{}.linear_fc1.weight"


def _permute(models: list[Content]) -> None:
    models[0][_FC1.format(0)], models[0][_FC1.format(1)] = models[0][_FC1.format(1)], models[0][_FC1.format(0)]


def _swap_gate_and_up(models: list[Content]) -> None:
    for model in models:
        model[_FC1.format(2)] = torch.cat(model[_FC1.format(2)].chunk(2)[::-1])


def _swap_expert_tensor_ranks(models: list[Content]) -> None:
    models[0][_FC1.format(3)], models[1][_FC1.format(3)] = models[1][_FC1.format(3)], models[0][_FC1.format(3)]


def _gate_on_one_rank(models: list[Content]) -> None:
    """Habana's cut: all of gate on one rank, all of up on the other. It survives a round trip that cuts the same way."""
    halves = [model[_FC1.format(1)].chunk(2) for model in models[:2]]
    models[0][_FC1.format(1)] = torch.cat([halves[0][0], halves[1][0]])
    models[1][_FC1.format(1)] = torch.cat([halves[0][1], halves[1][1]])


def _lose_expert_rank(models: list[Content]) -> None:
    models[0].update({key: models[2][key] for key in models[0] if ".local_experts." in key})


MUTATIONS: dict[str, Callable[[list[Content]], None]] = {
    "two experts exchanged": _permute,
    "gate and up exchanged": _swap_gate_and_up,
    "expert-tensor ranks exchanged": _swap_expert_tensor_ranks,
    "gate on one rank, up on the other": _gate_on_one_rank,
    "an expert-parallel rank's experts twice": _lose_expert_rank,
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_is_seen(megatron_pool: MegatronPool, models: Models, tmp_path: Path, name: str) -> None:
    folder, wanted = models["mixtral"]
    checkpoint = hf_to_megatron(folder, tmp_path / "megatron", tp=2, ep=2, impl="local", expert_layout="sequential")
    names = [f"mp_rank_{tp:02d}_{ep:03d}" for ep in (0, 1) for tp in (0, 1)]
    files = [checkpoint / "iter_0000001" / name / "model_optim_rng.pt" for name in names]
    contents = [torch.load(file, weights_only=False) for file in files]
    MUTATIONS[name]([content["model"] for content in contents])
    for file, content in zip(files, contents, strict=True):
        torch.save(content, file)
    got = megatron_pool.logits(checkpoint, TOKENS)[..., :VOCABULARY]
    assert float((got - wanted).abs().max()) > SEEN

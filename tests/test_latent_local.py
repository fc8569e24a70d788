"""Multi-latent attention, multi-token prediction and gates from megatron-core's local layers compute what transformers computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_converters.logits import logits_of
from tests.conversions import hf_to_megatron, hf_to_torch_dist
from tests.oracle.hf import TOKENS, difference, hf_logits, make_model
from tests.oracle.pool import MegatronPool
from tests.oracle.prediction import with_prediction

TOLERANCE = 1e-5
FAMILIES = ("deepseek-v2-lite", "deepseek-v3", "deepseek-v3-yarn", "minicpm3")
Models = Callable[..., Path]


def across_ranks(family: str) -> dict[str, int]:
    """Tensor and expert parallelism, as far as the family has experts."""
    return dict(tp=2) if family == "minicpm3" else dict(tp=2, ep=2, etp=1)


def edit(root: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Apply `change` to the content of every rank's file."""
    for file in root.glob("iter_0000001/*/*.pt"):
        content = torch.load(file, weights_only=False)
        change(content)
        torch.save(content, file)
    return root


# -- with megatron-core's own classes, names and sharding


@pytest.mark.parametrize("family", FAMILIES)
def test_local_layers_load_strictly_and_agree(
    megatron_pool: MegatronPool, hf_model: Models, logits: Any, tmp_path: Path, family: str
) -> None:
    folder = hf_model(family)
    for name, sizes in (("whole", {}), ("tp", across_ranks(family)), ("pp", dict(pp=2))):
        files = hf_to_megatron(folder, tmp_path / name, impl="local", **sizes)
        assert difference(megatron_pool.logits(files, TOKENS), logits(family)) < TOLERANCE, name
    chunks = hf_to_torch_dist(folder, tmp_path / "chunks", impl="local", **across_ranks(family))
    assert difference(megatron_pool.distributed_logits(chunks, TOKENS), logits(family)) < TOLERANCE
    assert difference(megatron_pool.distributed_logits(chunks, TOKENS, tp=2, pp=2, ep=1), logits(family)) < TOLERANCE


def _swap_rows(content: dict[str, Any]) -> None:
    norm = content["model"]["decoder.layers.0.self_attention.kv_layernorm.weight"]
    norm[:2] = norm[:2].flip(0)


def _forget_the_scale(content: dict[str, Any]) -> None:
    content["args"].mscale_all_dim = 0.0  # YaRN's factor of the scores


@pytest.mark.parametrize("change", [_swap_rows, _forget_the_scale])
def test_a_wrong_norm_and_a_wrong_scale_show(
    megatron_pool: MegatronPool, hf_model: Models, logits: Any, tmp_path: Path, change: Any
) -> None:
    family = "deepseek-v3-yarn"
    root = edit(hf_to_megatron(hf_model(family), tmp_path, impl="local"), change)
    assert difference(megatron_pool.logits(root, TOKENS), logits(family)) > 5 * TOLERANCE


@pytest.mark.parametrize("tp", [1, 2])
def test_gates_of_attention_agree(megatron_pool: MegatronPool, tmp_path: Path, tp: int) -> None:
    """Qwen3-Next without linear attention, its zero-centred norms, which local layers lack, made usual ones by hand."""
    folder = make_model("qwen3-next", tmp_path / "hf", layer_types=["full_attention"] * 4)
    root = hf_to_megatron(folder, tmp_path / "megatron", impl="local", tp=tp)
    edit(root, _usual_norms)
    assert difference(megatron_pool.logits(root, TOKENS), hf_logits(folder, TOKENS)) < TOLERANCE
    edit(root, lambda content: setattr(content["args"], "rotary_percent", 1.0))
    assert difference(megatron_pool.logits(root, TOKENS), hf_logits(folder, TOKENS)) > 5 * TOLERANCE


def _usual_norms(content: dict[str, Any]) -> None:
    assert content["args"].attention_output_gate
    content["args"].apply_layernorm_1p = content["args"].layernorm_zero_centered_gamma = False
    content["model"] |= {key: value + 1 for key, value in content["model"].items() if key.endswith("norm.weight")}


# -- training


def _gradients(root: Path, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Job of a pool's process: gradients of the mean loss of predicting the tokens, further ones included."""
    from megatron_converters.live.on_cpu import on_cpu
    from tests.oracle import checkpoint, jobs, megatron

    grid = checkpoint.read_grid(root / "iter_0000001", ())
    path = checkpoint.rank_file(root / "iter_0000001", grid, jobs._parallel(grid))
    content = checkpoint.load_rank(path, ())
    (model,) = megatron.build(content["args"])
    assert megatron.load(model, content["model"], "") is None
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1)
    model.train()
    with on_cpu():
        model(tokens, positions, attention_mask=None, labels=tokens.roll(-1, 1)).mean().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def test_gradients_do_not_depend_on_tensor_parallelism(
    megatron_pool: MegatronPool, hf_model: Models, tmp_path: Path
) -> None:
    """Ranks share the rotary part of keys, whose gradients megatron-core sums only with sequence parallelism."""
    folder = hf_model("minicpm3")
    whole, cut = (
        megatron_pool.run(_gradients, hf_to_megatron(folder, tmp_path / str(tp), impl="local", tp=tp), TOKENS)
        for tp in (1, 2)
    )
    copies = [name for name, value in whole[0].items() if cut[0][name].shape == value.shape]
    assert "decoder.layers.0.self_attention.linear_kv_down_proj.weight" in copies
    for name in copies:
        for rank in cut:
            assert close(rank[name], whole[0][name]), name


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= TOLERANCE * other.abs().max())


def test_further_tokens_are_predicted_as_by_transformer_engine_s_spec(
    megatron_pool: MegatronPool, hf_model: Models, tmp_path: Path
) -> None:
    """transformers has no such layers; the gradients that they get also show what they computed."""
    folder = with_prediction("deepseek-v3", hf_model, tmp_path / "hf")
    options = dict(megatron_version="0.16", expert_layout="sequential")
    local, engine = (
        megatron_pool.run(_gradients, hf_to_megatron(folder, tmp_path / impl, impl=impl, **options), TOKENS)[0]
        for impl in ("local", "transformer_engine")
    )
    common = local.keys() & engine.keys()
    assert sum(name.startswith("mtp.") for name in common) > 20
    assert engine["mtp.layers.0.eh_proj.weight"].abs().max() > 0
    assert [name for name in common if not close(local[name], engine[name])] == []


def _deviations(root: Path) -> dict[str, float]:
    """Job of a pool's process: standard deviations of the down projections of a new model."""
    from tests.oracle import checkpoint, jobs, megatron

    grid = checkpoint.read_grid(root / "iter_0000001", ())
    path = checkpoint.rank_file(root / "iter_0000001", grid, jobs._parallel(grid))
    (model,) = megatron.build(checkpoint.load_rank(path, ())["args"])
    return {name: float(value.std()) for name, value in model.named_parameters() if "_down_proj" in name}


def test_new_down_projections_start_as_the_config_says(
    megatron_pool: MegatronPool, hf_model: Models, tmp_path: Path
) -> None:
    root = hf_to_megatron(hf_model("deepseek-v3"), tmp_path, impl="local")
    deviations = megatron_pool.run(_deviations, root)[0]
    assert len(deviations) == 8
    assert all(value == pytest.approx(0.02, rel=0.2) for value in deviations.values())  # torch's own would be 0.07


# -- in processes without Transformer Engine, nor a stand-in for it


def product_logits(root: Path) -> np.ndarray:
    return logits_of(root, TOKENS.numpy(), time_limit=120)


@pytest.mark.usefixtures("preloaded")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_transformer_engine_s_files_need_none(
    hf_model: Models, logits: Any, tmp_path: Path, family: str
) -> None:
    sizes = across_ranks(family) | dict(impl="transformer_engine")
    files = hf_to_megatron(hf_model(family), tmp_path / "files", **sizes)
    chunks = hf_to_torch_dist(hf_model(family), tmp_path / "chunks", **sizes)
    assert difference(product_logits(files), logits(family)) < TOLERANCE
    assert difference(product_logits(chunks), logits(family)) < TOLERANCE


@pytest.mark.usefixtures("preloaded")
def test_logits_of_down_projections_that_are_cut(hf_model: Models, logits: Any, tmp_path: Path) -> None:
    options = dict(tp=2, pp=2, expert_layout="sequential", megatron_version="0.13")
    root = hf_to_megatron(hf_model("deepseek-v3"), tmp_path, **options)
    assert difference(product_logits(root), logits("deepseek-v3")) < TOLERANCE


@pytest.mark.usefixtures("preloaded")
@pytest.mark.parametrize("version", ["0.16", "0.17"])
def test_logits_of_models_that_predict_further_tokens(
    hf_model: Models, logits: Any, tmp_path: Path, version: str
) -> None:
    """The layers are loaded strictly, under either of their names; they do not change the logits."""
    folder = with_prediction("deepseek-v3", hf_model, tmp_path / "hf")
    options = dict(tp=2, pp=2, ep=2, etp=1, megatron_version=version)
    for impl, convert in (("local", hf_to_megatron), ("transformer_engine", hf_to_torch_dist)):
        root = convert(folder, tmp_path / impl, impl=impl, **options)
        assert difference(product_logits(root), logits("deepseek-v3")) < TOLERANCE

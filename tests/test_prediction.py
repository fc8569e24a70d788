"""Layers of multi-token prediction that a model's family lacks in Hugging Face: named, and left out on request."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_converters.formats.megatron.opening import open_megatron
from megatron_converters.formats.megatron.reading import MegatronReadOptions
from tests.bare import edit
from tests.conversions import different, megatron_to_hf, refusal
from tests.helpers import hf_tensors, succeeded, verb
from tests.oracle import by_hand, by_hand_dist

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

HFModel = Callable[..., Path]
FAMILY, EMBEDDINGS = "qwen3", "embedding.word_embeddings.weight"
NOTE = "1 layer of multi-token prediction: left out, as --without-mtp says"
LEAVE_OUT = "pass --without-mtp to leave them out"


def predicting(model: dict[str, Any], layer: int, module: str) -> dict[str, Any]:
    """Model with a layer of multi-token prediction like one of its own (core/transformer/multi_token_prediction.py)."""
    own = f"decoder.layers.{layer}."
    inner = {key.replace(own, f"mtp.layers.0.{module}."): value for key, value in model.items() if key.startswith(own)}
    size = model["decoder.final_layernorm.weight"].shape[0]
    norms = {f"mtp.layers.0.{name}.weight": torch.ones(size) for name in ("enorm", "hnorm", "final_layernorm")}
    return {**model, **inner, **norms, "mtp.layers.0.eh_proj.weight": torch.ones(size, 2 * size)}


Change = Callable[[dict[str, Any], Namespace], object]


@pytest.fixture
def made(hf_model: HFModel, tmp_path: Path) -> Callable[..., Path]:
    """Function `made(change)`: a distributed checkpoint after a change of its state and args."""

    def make(change: Change = lambda state, args: None) -> Path:
        model, content = by_hand_dist.state(hf_model(FAMILY), tmp_path, mtp_num_layers=1)
        state = predicting(model, 3, "transformer_layer")
        change(state, content["args"])
        decoder = {key: value for key, value in state.items() if not key.startswith("mtp.")}
        further = {key: value for key, value in state.items() if key.startswith("mtp.") and value is not None}
        entries = {**by_hand_dist.tensors(decoder, stacked=True), **further}
        by_hand_dist.write(tmp_path / "made", entries, content)
        return tmp_path / "made"

    return make


def left_out(folder: Path, hf: Path, out: Path, **options: Any) -> list[str]:
    """Convert without the layers, which must give the model; returns the notes."""
    back = megatron_to_hf(folder, out, without_mtp=True, **options)
    assert different(hf_tensors(hf), hf_tensors(back)) == []
    return open_megatron(folder, MegatronReadOptions(without_mtp=True, **options)).origin.notes


def test_a_family_without_them(made: Callable[..., Path], hf_model: HFModel, tmp_path: Path) -> None:
    folder = made()
    assert refusal(folder) == (
        "the args have mtp_num_layers=1: no family has both this model's shape and multi-token prediction, but qwen3 fits without "
        f"those layers; {LEAVE_OUT}"
    )
    assert NOTE in left_out(folder, hf_model(FAMILY), tmp_path / "hf")
    run = succeeded(verb("convert", folder, tmp_path / "by-verb", "--without-mtp"))
    assert NOTE in run.out


@pytest.mark.parametrize("args", [True, False], ids=["args", "no args"])
def test_a_reference_without_them(made: Callable[..., Path], hf_model: HFModel, tmp_path: Path, args: bool) -> None:
    folder, reference = made(), hf_model(FAMILY)
    if not args:
        torch.save({"iteration": 1}, folder / "common.pt")
    assert refusal(folder, hf_config=reference) == (
        f"X holds 1 layer of multi-token prediction (mtp.*), but {reference} is a model without; {LEAVE_OUT}"
    )
    assert NOTE in left_out(folder, reference, tmp_path / "hf", hf_config=reference)


def test_args_that_do_not_know_of_them(made: Callable[..., Path], hf_model: HFModel, tmp_path: Path) -> None:
    folder = made(lambda _, args: delattr(args, "mtp_num_layers"))
    assert refusal(folder) == (
        f"X holds 1 layer of multi-token prediction (mtp.*), but the args describe a model without; {LEAVE_OUT}"
    )
    assert NOTE in left_out(folder, hf_model(FAMILY), tmp_path / "hf")


def test_args_of_layers_that_are_not_stored(made: Callable[..., Path], hf_model: HFModel, tmp_path: Path) -> None:
    def forget(state: dict[str, Any], _: Namespace) -> None:
        for key in [key for key in state if key.startswith("mtp.")]:
            del state[key]

    folder = made(forget)
    assert NOTE not in left_out(folder, hf_model(FAMILY), tmp_path / "hf")


def test_what_is_left_out_must_be_sound(made: Callable[..., Path]) -> None:
    folder = made(lambda state, _: state.update({"mtp.layers.0.enorm.weight": torch.ones(3), "mtp.x": torch.ones(2)}))
    message = refusal(folder, without_mtp=True)
    assert "mtp.layers.0.enorm.weight has shape [3]; the args require [64]" in message
    assert "mtp.x is not a tensor of this model" in message


@pytest.mark.parametrize("module", ["transformer_layer", "mtp_model_layer"])
def test_files_of_ranks(module: str, hf_model: HFModel, tmp_path: Path) -> None:
    """The last stage has the embeddings, too, which the layers of prediction need."""
    root = by_hand.convert(hf_model(FAMILY), tmp_path / "made", pp=2, mtp_num_layers=1)
    folder = root / "iter_0000001"
    first = torch.load(folder / "mp_rank_00_000" / "model_optim_rng.pt", weights_only=False)["model"]

    def change(content: dict[str, Any]) -> dict[str, Any]:
        model = predicting(content["model"], 1, module)
        return {**content, "model": {**model, EMBEDDINGS: first[EMBEDDINGS]}}

    edit(folder, change, "mp_rank_00_001")
    assert LEAVE_OUT in refusal(root)
    assert NOTE in left_out(root, hf_model(FAMILY), tmp_path / "hf")

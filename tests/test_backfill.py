"""`--backfill-from`: layers of multi-token prediction that training ran without come from the folder that it began with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import megatron_converters as mc
from tests.bare import edit
from tests.helpers import hf_tensors, refused, succeeded, verb
from tests.oracle.prediction import with_prediction

FAMILY, LAYER = "glm4-moe", "model.layers.4."
#: Copies of the model's own embeddings and head within such a layer.
COPIES = {
    LAYER + "embed_tokens.weight": "model.embed_tokens.weight",
    LAYER + "shared_head.head.weight": "lm_head.weight",
}


@pytest.fixture(scope="module")
def places(hf_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder that a training began with, which has the layer, and the checkpoint of one that ran without it."""
    root = tmp_path_factory.mktemp("backfill")
    original = with_prediction(FAMILY, hf_model, root / "original")
    trained = root / "trained"
    trained.mkdir()
    moved = {name: tensor + 0.5 for name, tensor in hf_tensors(original).items() if not name.startswith(LAYER)}
    save_file(moved, trained / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(original / "config.json", trained)
    checkpoint = root / "checkpoint"
    succeeded(verb("convert", trained, checkpoint, "--tp", 2, "--pp", 2, "--quiet"))
    return {"original": original, "trained": trained, "checkpoint": checkpoint}


def wanted(places: dict[str, Path]) -> dict[str, torch.Tensor]:
    """Tensors of the trained model with the layer of the original, whose copies are of what was trained."""
    trained, original = hf_tensors(places["trained"]), hf_tensors(places["original"])
    layer = {name: tensor for name, tensor in original.items() if name.startswith(LAYER)}
    return {**trained, **layer, **{name: trained[own] for name, own in COPIES.items()}}


def config(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return read


@pytest.mark.parametrize(
    ("source", "options"),
    [("checkpoint", ()), ("checkpoint", ("--hf-config", "original")), ("trained", ("--to", "hf"))],
    ids=["checkpoint", "with a reference", "Hugging Face"],
)
def test_the_layer_comes_back(source: str, options: tuple[str, ...], places: dict[str, Path], tmp_path: Path) -> None:
    words = [places.get(word, word) for word in options]
    run = succeeded(verb("convert", places[source], tmp_path / "out", *words, "--backfill-from", places["original"]))
    found = hf_tensors(tmp_path / "out")
    assert found.keys() == wanted(places).keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted(places).items())
    assert config(tmp_path / "out")["num_nextn_predict_layers"] == 1
    listed = json.loads((tmp_path / "out" / "conversion.json").read_text())["backfilled"]
    assert set(listed) == {name for name in found if name.startswith(LAYER)} - COPIES.keys()
    assert set(listed.values()) == {str(places["original"] / "model.safetensors")}
    assert f"{len(listed)} tensors of 1 layer of multi-token prediction: taken from {places['original']}" in run.out
    assert "mtp_num_layers" not in run.out + run.err  # the reference and args differ in it, which is settled
    assert succeeded(verb("verify", tmp_path / "out")).out.startswith("INTACT")
    assert succeeded(verb("verify", places["trained"], tmp_path / "out", "--without-mtp")).code == 0


def test_a_checkpoint_gets_it_too(places: dict[str, Path], tmp_path: Path) -> None:
    options = mc.ReadOptions(backfill_from=places["original"])
    mc.convert(places["checkpoint"], tmp_path / "again", tp=1, pp=2, read=options)
    mc.convert(tmp_path / "again", tmp_path / "hf")
    found = hf_tensors(tmp_path / "hf")
    assert found.keys() == wanted(places).keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted(places).items())


def test_a_plan_lists_each_tensor(places: dict[str, Path], tmp_path: Path) -> None:
    words = (places["checkpoint"], tmp_path / "out", "--backfill-from", places["original"], "--no-measure")
    lines = succeeded(verb("plan", *words)).out
    assert f"backfilled: {LAYER}eh_proj.weight of {places['original'] / 'model.safetensors'}" in lines
    plan = json.loads(succeeded(verb("plan", *words, "--json")).out)
    assert set(plan["backfilled"].values()) == {str(places["original"] / "model.safetensors")}


def test_a_run_that_goes_on_heeds_the_folder(places: dict[str, Path], tmp_path: Path) -> None:
    original = tmp_path / "original"
    shutil.copytree(places["original"], original)
    words = (places["checkpoint"], tmp_path / "out", "--backfill-from", original)
    succeeded(verb("convert", *words))
    assert "complete already" in succeeded(verb("convert", *words)).out
    (original / "model.safetensors").touch()
    refused(verb("convert", *words), "already holds a model")


def changed(folder: Path, target: Path, **fields: Any) -> Path:
    """Copy of a folder with other fields in config.json."""
    shutil.copytree(folder, target)
    (target / "config.json").write_text(json.dumps({**config(target), **fields}))
    return target


def test_what_is_refused(places: dict[str, Path], tmp_path: Path) -> None:
    original, out = places["original"], tmp_path / "out"
    other = changed(original, tmp_path / "other", routed_scaling_factor=3.5)
    half = changed(original, tmp_path / "half")
    save_file({name: tensor.half() for name, tensor in hf_tensors(half).items()}, half / "model.safetensors")
    for source, folder, code, *words in (
        ("checkpoint", other, 1, "moe_router_topk_scaling_factor: 2.5, not 3.5"),
        ("checkpoint", places["trained"], 1, "has no layers of multi-token prediction"),
        ("original", original, 2, "has its own 1 layer of multi-token prediction"),
        ("checkpoint", half, 2, "its weights are float16", "float32; say with --dtype"),
        ("checkpoint", tmp_path / "gone", 2, "gone"),
    ):
        run = verb("convert", places[source], out, "--to", "hf", "--backfill-from", folder)
        for text in words:
            refused(run, text, code=code)
    both = verb("convert", places["checkpoint"], out, "--backfill-from", original, "--without-mtp")
    refused(both, "--backfill-from takes layers of multi-token prediction from a folder, and --without-mtp", code=2)
    assert not out.exists()
    succeeded(verb("convert", places["checkpoint"], out, "--backfill-from", half, "--dtype", "fp32"))


@pytest.mark.parametrize("without", ["mtp", "args"])
def test_an_absence_that_args_do_not_explain_is_not_filled(
    without: str, places: dict[str, Path], tmp_path: Path
) -> None:
    """Args that say that the layer was trained, and a distributed checkpoint that has no args."""
    odd = tmp_path / "odd"
    if without == "mtp":
        shutil.copytree(places["checkpoint"], odd)
        edit(odd / "iter_0000001", _claim_it)
    else:
        succeeded(verb("convert", places["trained"], odd, "--ckpt-format", "torch_dist", "--quiet"))
        torch.save({"iteration": 1}, odd / "iter_0000001" / "common.pt")
    words = ("--hf-config", places["original"], "--backfill-from", places["original"])
    run = verb("convert", odd, tmp_path / "out", "--to", "hf", *words)
    refused(run, "holds none (mtp.*); pass --without-mtp to leave them out")


def _claim_it(content: dict[str, Any]) -> dict[str, Any]:
    content["args"].mtp_num_layers = 1
    return content

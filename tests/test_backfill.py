"""Layers of multi-token prediction that a training run has dropped, taken from the model that it began with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conversions import different, hf_to_megatron, hf_to_torch_dist
from tests.helpers import hf_tensors, refused, succeeded, verb
from tests.test_proof_kinds import with_prediction

Models = Callable[..., Path]
FAMILY = "glm4-moe-lite"


@pytest.fixture(scope="module")
def original(hf_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model with a layer of multi-token prediction."""
    return with_prediction(FAMILY, hf_model, tmp_path_factory.mktemp("original") / "hf")


@pytest.mark.parametrize("convert", [hf_to_megatron, hf_to_torch_dist])
def test_what_was_dropped_is_taken_from_the_original(
    convert: Callable[..., Path], original: Path, hf_model: Models, tmp_path: Path
) -> None:
    trained = convert(hf_model(FAMILY), tmp_path / "trained", tp=2)
    run = succeeded(verb("convert", trained, tmp_path / "back", "--backfill-from", original))
    own = ("embed_tokens.weight", "shared_head.head.weight")  # which repeat the model's
    taken = [name for name in hf_tensors(original) if name.startswith("model.layers.4.") and not name.endswith(own)]
    assert f"1 layer of multi-token prediction: {len(taken)} tensors taken from" in run.out
    assert different(hf_tensors(original), hf_tensors(tmp_path / "back")) == []
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    manifest = json.loads((tmp_path / "back" / "conversion.json").read_text())
    (file,) = manifest["files"].values()
    listed = {name for name, entry in file["tensors"].items() if str(original) in json.dumps(entry["from"])}
    assert listed == {*taken}
    again = succeeded(verb("convert", trained, tmp_path / "again", "--tp", 2, "--backfill-from", original))
    assert "--mtp-num-layers 1" in again.out


def test_it_is_refused_where_nothing_was_dropped_or_the_model_is_another(
    original: Path, hf_model: Models, tmp_path: Path
) -> None:
    plain, out = hf_model(FAMILY), tmp_path / "out"
    refused(verb("plan", original, out, "--backfill-from", original), "has layers of multi-token prediction of its own")
    refused(verb("plan", plain, out, "--backfill-from", plain), "it has no layers of multi-token prediction")
    other = hf_model("deepseek-v3")
    refused(verb("plan", other, out, "--backfill-from", original), "it is another model than", "family: glm4_moe_lite")
    succeeded(verb("plan", original, out, "--without-mtp", "--backfill-from", original))

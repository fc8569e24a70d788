"""Distributed checkpoints of single releases of Megatron-LM: zarr up to 0.15, and those without redundant `_extra_state`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_converters.formats.megatron.detecting import detect
from tests.conversions import different, megatron_to_hf
from tests.helpers import convert_back, hf_tensors, nothing_complete, refused, succeeded, tp_pp_converter, verb
from tests.oracle import by_hand_dist, checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

HFModel = Callable[..., Path]
_LAST_READER = (
    "is of the distributed format zarr, version 1; only torch_dist, version 1, can be read: load it with Megatron-LM 0.15, the "
    "last release that reads zarr, and save it with --ckpt-format torch_dist"
)


@pytest.fixture
def zarr(tmp_path: Path) -> Path:
    """Folder as the strategy `zarr` of core/dist_checkpointing leaves it: a folder for each tensor, and no `.metadata`."""
    root = tmp_path / "zarr"
    folder = root / "iter_0000001"
    tensor = folder / "embedding.word_embeddings.weight"
    tensor.mkdir(parents=True)
    (tensor / ".zarray").write_text(json.dumps({"shape": [8, 4], "chunks": [8, 4], "dtype": "<f4", "zarr_format": 2}))
    (tensor / "0.0").write_bytes(bytes(128))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))
    torch.save({"iteration": 1}, folder / "common.pt")
    checkpoint.write_tracker(root, 1)
    return root


def test_zarr_is_refused_with_the_release_that_reads_it(zarr: Path, tmp_path: Path) -> None:
    for run in (
        verb("inspect", zarr),
        verb("verify", zarr, zarr),
        verb("plan", zarr, tmp_path / "hf"),
        convert_back("--load-path", zarr, "--save-path", tmp_path / "hf"),
        tp_pp_converter("--in_dir", zarr, "--save_path", tmp_path / "tp"),
    ):
        refused(run, _LAST_READER, code=run.code)
    nothing_complete(tmp_path / "hf")


def test_without_redundant_extra_state(hf_model: HFModel, tmp_path: Path) -> None:
    """`--ckpt-drop-redundant-extra-state`: without FP8, or with recipes that the run configures, none is stored."""
    hf = hf_model("mixtral")
    root = tmp_path / "megatron"
    model, content = by_hand_dist.state(hf, root)
    content["args"].ckpt_format = "torch_dist"
    content["args"].ckpt_drop_redundant_extra_state = True
    entries = by_hand_dist.tensors(model, stacked=True)
    kept = {key: value for key, value in entries.items() if "_extra_state" not in key}
    assert len(kept) < len(entries)
    by_hand_dist.write(root / "iter_0000001", kept, content)
    checkpoint.write_tracker(root, 1)
    assert different(hf_tensors(hf), hf_tensors(megatron_to_hf(root, tmp_path / "hf"))) == []
    assert "Megatron-LM, torch_dist" in succeeded(verb("inspect", root)).out
    assert "0 of 87 tensors" in verb("verify", hf, root).out
    assert detect(root).num_layers == content["args"].num_layers

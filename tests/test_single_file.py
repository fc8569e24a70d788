"""One file of weights under Hugging Face's names: written as torch.save would, read back, refused, checked by its manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import megatron_converters as mc
from tests.bare import left_in, tree
from tests.helpers import hf_tensors, refused, same_tensors, succeeded, verb

HFModel = Callable[..., Path]
ONE_FILE = mc.HFOptions(single_file=True)


@pytest.fixture(scope="module")
def checkpoint(hf_model: HFModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(hf_model("llama2"), tmp_path_factory.mktemp("single") / "tree", args=True, tp=2, pp=2)


def write(source: Path, path: Path, **options: object) -> mc.Result:
    return mc.convert(source, path, to="hf", hf=ONE_FILE, **options)  # type: ignore[arg-type]


def test_torch_loads_all_weights(hf_model: HFModel, checkpoint: Path, tmp_path: Path) -> None:
    result = write(checkpoint, tmp_path / "new" / "hf_weights.pt")
    assert result.path == tmp_path / "new" / "hf_weights.pt"
    same_tensors(torch.load(result.path, weights_only=True), hf_tensors(hf_model("llama2")))
    assert left_in(tmp_path / "new") == ["hf_weights.pt", "hf_weights.pt.conversion.json"]


@pytest.mark.parametrize("family", ["llama3.2-tied", "mixtral"])
def test_tied_models_have_no_head_and_experts_lie_apart(family: str, hf_model: HFModel, tmp_path: Path) -> None:
    model = hf_model(family)
    result = write(model, tmp_path / "w.pt", dtype="bf16")
    expected = {name: tensor.bfloat16() for name, tensor in hf_tensors(model).items()}
    same_tensors(torch.load(result.path, weights_only=True), expected)


def test_stacked_experts(hf_model: HFModel, tmp_path: Path) -> None:
    options = mc.HFOptions(single_file=True, expert_layout="fused")
    result = mc.convert(hf_model("mixtral"), tmp_path / "w.pt", to="hf", hf=options)
    same_tensors(torch.load(result.path, weights_only=True), hf_tensors(hf_model("mixtral", fused_experts=True)))


def test_an_existing_file_stays(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(b"mine")
    with pytest.raises(mc.ConversionError, match="already exists; save elsewhere or pass --overwrite"):
        write(checkpoint, path)
    assert path.read_bytes() == b"mine"
    assert left_in(tmp_path) == ["w.pt"]
    write(checkpoint, path, overwrite=True)
    assert "lm_head.weight" in torch.load(path, weights_only=True)
    assert mc.verify(path)
    assert "is complete already" in write(checkpoint, path).notes[0]


def test_a_folder_is_no_file(checkpoint: Path, tmp_path: Path) -> None:
    for overwrite in (False, True):
        with pytest.raises(mc.UsageError, match="is a folder; name the file to write"):
            write(checkpoint, tmp_path, overwrite=overwrite)
    assert left_in(tmp_path) == []


def test_two_files_in_one_folder(checkpoint: Path, tmp_path: Path) -> None:
    paths = [write(checkpoint, tmp_path / name).path for name in ("a.pt", "b.pt")]
    assert all(map(mc.verify, paths))
    assert len(left_in(tmp_path)) == 4


def test_damage_is_named(checkpoint: Path, tmp_path: Path) -> None:
    path = write(checkpoint, tmp_path / "w.pt").path
    tensors = torch.load(path, weights_only=True)
    tensors["model.norm.weight"] += 1
    torch.save(tensors, path)
    findings = mc.verify(path).findings
    assert any("model.norm.weight (final_norm) has changed since it was written" in found for found in findings)
    assert not any("lm_head" in found for found in findings)
    assert verb("verify", path).code == 1
    (tmp_path / "w.pt.conversion.json").unlink()
    refused(verb("verify", path), "has no w.pt.conversion.json", code=2)


def test_a_file_is_read_with_a_configuration(hf_model: HFModel, checkpoint: Path, tmp_path: Path) -> None:
    """As torch.save writes it, beside a config.json or with a reference."""
    model = hf_model("llama2")
    torch.save(hf_tensors(model), tmp_path / "pytorch_model.bin")
    refused(
        verb("convert", tmp_path / "pytorch_model.bin", tmp_path / "meg"), "has no config.json", "--hf-config", code=2
    )
    succeeded(verb("convert", tmp_path / "pytorch_model.bin", tmp_path / "meg", "--hf-config", model))
    assert mc.verify(tmp_path / "meg", checkpoint, read=mc.ReadOptions(hf_config=model))
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    assert mc.verify(tmp_path / "pytorch_model.bin", model)
    assert mc.inspect(tmp_path / "pytorch_model.bin")["model"]["num_layers"] == 4


def test_options_of_checkpoints_are_refused_for_files(hf_model: HFModel, tmp_path: Path) -> None:
    torch.save(hf_tensors(hf_model("llama2")), tmp_path / "w.pt")
    (tmp_path / "config.json").write_text((hf_model("llama2") / "config.json").read_text())
    read = mc.ReadOptions(ckpt_dir_name="iter_0000001")
    with pytest.raises(mc.UsageError, match="--ckpt-dir-name is for reading a Megatron-LM checkpoint"):
        mc.convert(tmp_path / "w.pt", tmp_path / "meg", read=read)


def test_a_file_of_other_things(hf_model: HFModel, checkpoint: Path, tmp_path: Path) -> None:
    rank = shutil.copy(checkpoint / "mp_rank_00_000" / "model_optim_rng.pt", tmp_path / "other.pt")
    with pytest.raises(mc.ConversionError, match="holds entries that are not named tensors: args"):
        mc.convert(rank, tmp_path / "meg", read=mc.ReadOptions(hf_config=hf_model("llama2")))
    assert left_in(tmp_path) == ["other.pt"]


def test_the_manifest_names_the_source(checkpoint: Path, tmp_path: Path) -> None:
    manifest = json.loads(write(checkpoint, tmp_path / "w.pt").manifest.read_text())
    entry = manifest["files"]["w.pt"]["tensors"]["model.layers.3.self_attn.k_proj.weight"]
    assert entry["holds"] == ["layer 3 qkv"]
    assert list(entry["from"]) == [
        f"mp_rank_0{tp}_001: decoder.layers.1.self_attention.linear_qkv.weight" for tp in range(2)
    ]

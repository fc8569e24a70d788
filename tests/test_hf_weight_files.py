"""Weight files of Hugging Face folders: indexes that name too much or other files, nested folders, and Mistral's own files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_converters.basics.errors import ConversionError
from megatron_converters.formats.detect import META, format_of
from megatron_converters.formats.hub_upload import upload
from megatron_converters.formats.huggingface.source import HFSource
from tests.conversions import hf_to_megatron, megatron_to_hf
from tests.helpers import hf_tensors, refused, same_tensors, succeeded, verb
from tests.oracle.hf import hf_logits, sample_tokens
from tests.test_meta_source import as_meta

HFModel = Callable[..., Path]
INDEX = "model.safetensors.index.json"
HEAD, NORM = "lm_head.weight", "model.norm.weight"
FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"
SMALL: dict[str, Any] = dict(num_hidden_layers=2, vocab_size=101)


def sharded(source: Path, folder: Path, ghosts: Iterable[str] = (), without: Iterable[str] = ()) -> Path:
    """Copy of a model in two shards, whose index also names `ghosts`, and tensors `without` which the shards are."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    tensors = hf_tensors(source)
    names, weight_map = sorted(tensors), dict[str, str]()
    for number in range(2):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        held = {name: tensors[name] for name in names[number::2] if name not in without}
        save_file(held, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names[number::2], file)
    weight_map |= dict.fromkeys(ghosts, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def plan(folder: Path, tmp_path: Path, *options: Any) -> Any:
    return verb("plan", folder, tmp_path / "out", "--no-measure", *options)


# --- ghosts


@pytest.mark.parametrize(
    ("family", "ghosts"),
    [
        ("qwen2-tied", [HEAD]),
        ("llama2", [FREQUENCIES]),
        ("llama2", ["model.layers.7.mlp.up_proj.weight", "score.weight"]),
    ],
    ids=["tied head", "frequencies", "others"],
)
def test_ghosts_that_the_model_does_not_need(family: str, ghosts: list[str], hf_model: HFModel, tmp_path: Path) -> None:
    plain = hf_model(family, **SMALL)
    odd = sharded(plain, tmp_path / "odd", ghosts)
    run = succeeded(verb("convert", odd, tmp_path / "meg"))
    assert f"that no file has, and the model needs none of them: {', '.join(sorted(ghosts))}" in run.out
    same_tensors(hf_tensors(megatron_to_hf(tmp_path / "meg", tmp_path / "back")), hf_tensors(plain))


@pytest.mark.parametrize("gone", [NORM, "model.layers.1.mlp.up_proj.weight", HEAD])
def test_a_ghost_that_the_model_needs(gone: str, hf_model: HFModel, tmp_path: Path) -> None:
    odd = sharded(hf_model("llama2", **SMALL), tmp_path / "odd", ["score.weight"], without=[gone])
    run = refused(plan(odd, tmp_path), f"{gone} (", f"{gone} should be in model-0000")
    assert run.err.count("\n  - ") == 1
    refused(plan(odd, tmp_path, "--ignore-tensors", gone), f"{gone} (", "is missing")


def test_a_ghost_becomes_needed_by_an_option(hf_model: HFModel, tmp_path: Path) -> None:
    odd = sharded(hf_model("qwen2-tied", **SMALL), tmp_path / "odd", [HEAD])
    succeeded(plan(odd, tmp_path))
    refused(plan(odd, tmp_path, "--untie"), f"{HEAD} should be in model-00002-of-00002.safetensors")


def test_the_only_embeddings_may_be_a_tied_head(hf_model: HFModel, tmp_path: Path) -> None:
    plain = hf_model("qwen2-tied", **SMALL)
    odd = sharded(plain, tmp_path / "odd", without=["model.embed_tokens.weight"])
    refused(plan(odd, tmp_path), "model.embed_tokens.weight should be in model-00001-of-00002.safetensors")
    file = odd / "model-00002-of-00002.safetensors"
    save_file({**load_file(file), HEAD: hf_tensors(plain)["model.embed_tokens.weight"]}, file, {"format": "pt"})
    index = json.loads((odd / INDEX).read_text())
    index["weight_map"][HEAD] = file.name
    (odd / INDEX).write_text(json.dumps(index))
    same_tensors(
        hf_tensors(megatron_to_hf(hf_to_megatron(odd, tmp_path / "meg"), tmp_path / "back")), hf_tensors(plain)
    )


def test_layers_of_multi_token_prediction_that_only_the_index_has(hf_model: HFModel, tmp_path: Path) -> None:
    """Without any of them in the index they are left out, as transformers leaves them out; named, they are missed."""
    plain = hf_model("glm4-moe")
    odd = sharded(plain, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    assert "since the files have none of them" in succeeded(plan(odd, tmp_path)).out
    index = json.loads((odd / INDEX).read_text())
    index["weight_map"]["model.layers.4.enorm.weight"] = "model-00002-of-00002.safetensors"
    (odd / INDEX).write_text(json.dumps(index))
    refused(plan(odd, tmp_path), "model.layers.4.enorm.weight should be in model-00002-of-00002.safetensors")
    succeeded(plan(odd, tmp_path, "--without-mtp"))


# --- indexes of another save, and none


def test_an_index_of_another_save(hf_model: HFModel, tmp_path: Path) -> None:
    plain = hf_model("llama2", **SMALL)
    odd = sharded(plain, tmp_path / "odd")
    text = (odd / INDEX).read_text()
    (odd / INDEX).write_text(text.replace("-of-00002", "-of-00003"))
    words = (f"2 complete shards that {INDEX} does not name lie there", "model-00001-of-00002.safetensors", "remove it")
    refused(plan(odd, tmp_path), *words)
    (odd / INDEX).unlink()
    run = succeeded(verb("convert", odd, tmp_path / "out", "--to", "hf"))
    assert "has no index of its 2 shards; every tensor of theirs is read" in run.out
    same_tensors(hf_tensors(tmp_path / "out"), hf_tensors(plain))


def test_shards_without_an_index_are_read_only_if_all_are_there(hf_model: HFModel, tmp_path: Path) -> None:
    odd = sharded(hf_model("llama2", **SMALL), tmp_path / "odd")
    (odd / INDEX).unlink()
    last = odd / "model-00002-of-00002.safetensors"
    tensors = load_file(last)
    save_file({**tensors, HEAD: torch.zeros(101, 64)}, last)
    refused(plan(odd, tmp_path), f"{HEAD} is in model-00001-of-00002.safetensors and in {last.name}")
    save_file(tensors, last)
    for number in (1, 2):  # of two saves: which one is meant is not known
        shutil.copy(odd / f"model-0000{number}-of-00002.safetensors", odd / f"old-0000{number}-of-00002.safetensors")
    refused(plan(odd, tmp_path), "the index of these shards is missing")
    (odd / "old-00001-of-00002.safetensors").unlink()
    succeeded(plan(odd, tmp_path))
    last.unlink()
    refused(plan(odd, tmp_path), "the index of these shards is missing")


# --- folders within folders


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_a_folder_with_the_name_of_a_file(kind: str, shards: bool, hf_model: HFModel, tmp_path: Path) -> None:
    """`zero_to_fp32.py` of DeepSpeed 0.15.3 and later takes its second operand for a folder's name."""
    options: dict[str, Any] = {"weights": "bin"} if kind.endswith(".bin") else {}
    plain = hf_model("llama2", **SMALL, **options, **({"max_shard_size": "150KB"} if shards else {}))
    odd = tmp_path / "odd"
    (odd / kind).mkdir(parents=True)
    for path in plain.iterdir():
        shutil.copy(path, odd / kind if "model" in path.name else odd)
    run = succeeded(verb("convert", odd, tmp_path / "out", "--to", "hf"))
    assert f"{odd / kind} is a folder; its files, which belong one level up, are read" in run.out
    same_tensors(hf_tensors(tmp_path / "out"), hf_tensors(plain))
    assert any(name.startswith(f"{kind}/") for name in HFSource(odd).origin.identity or {})


def test_a_folder_with_the_name_of_a_file_and_nothing_in_it(hf_model: HFModel, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    (odd / "pytorch_model.bin").mkdir(parents=True)
    shutil.copy(hf_model("llama2", **SMALL) / "config.json", odd)
    refused(plan(odd, tmp_path), "has neither model.safetensors nor pytorch_model.bin nor an index of shards")
    (odd / "pytorch_model.bin").rmdir()
    (odd / "pytorch_model.bin").symlink_to(".")  # no end of folders
    refused(plan(odd, tmp_path), "has neither model.safetensors nor pytorch_model.bin nor an index of shards")


def test_the_hub_gets_no_folder_that_transformers_does_not_read(hf_model: HFModel, tmp_path: Path) -> None:
    odd = sharded(hf_model("qwen2-tied", **SMALL), tmp_path / "odd", [HEAD])
    with pytest.raises(ConversionError, match=f"{HEAD} should be in model-00002-of-00002.safetensors"):
        upload(odd, "acme/new")
    (odd / INDEX).unlink()
    with pytest.raises(ConversionError, match="has no index of its 2 shards"):
        upload(odd, "acme/new")


# --- Mistral's own format

PARAMS = dict(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=8, hidden_dim=112, norm_eps=1e-5, vocab_size=101)


def mistral_folder(plain: Path, folder: Path, shards: int) -> Path:
    """Model as mistral-inference has it: interleaved rotary pairs, safetensors, params.json."""
    folder.mkdir()
    tensors = dict(as_meta(name, tensor.contiguous()) for name, tensor in hf_tensors(plain).items())
    names = sorted(tensors)
    for number in range(shards):
        file = (
            "consolidated.safetensors" if shards == 1 else f"consolidated-{number + 1:05d}-of-{shards:05d}.safetensors"
        )
        save_file({name: tensors[name].contiguous() for name in names[number::shards]}, folder / file)
    (folder / "params.json").write_text(json.dumps(PARAMS | {"rope_theta": 1e4}))
    return folder


@pytest.mark.parametrize("shards", [1, 2])
def test_consolidated_safetensors(shards: int, hf_model: HFModel, tmp_path: Path) -> None:
    plain = hf_model("llama2", **SMALL)
    odd = mistral_folder(plain, tmp_path / "odd", shards)
    assert format_of(odd) == META
    succeeded(verb("convert", odd, tmp_path / "meg"))
    back = megatron_to_hf(tmp_path / "meg", tmp_path / "back")
    same_tensors(hf_tensors(back), hf_tensors(plain))
    tokens = sample_tokens(1, 16, vocab_size=101)
    assert torch.equal(hf_logits(back, tokens), hf_logits(plain, tokens))


def test_consolidated_safetensors_beside_other_files(hf_model: HFModel, tmp_path: Path) -> None:
    plain = hf_model("llama2", **SMALL)
    odd = mistral_folder(plain, tmp_path / "odd", 1)
    shutil.copy(plain / "config.json", odd)  # without the weights that it describes
    assert "params.json describes those that it has" in succeeded(plan(odd, tmp_path)).out
    refused(plan(odd, tmp_path, "--from", "hf"), "is of Mistral's own format: --from meta reads it")
    shutil.copy(plain / "model.safetensors", odd)  # as mistralai's repositories have both
    assert format_of(odd) == "hf"


def test_consolidated_safetensors_with_parts_missing(hf_model: HFModel, tmp_path: Path) -> None:
    odd = mistral_folder(hf_model("llama2", **SMALL), tmp_path / "odd", 2)
    shard = odd / "consolidated-00001-of-00002.safetensors"
    refused(plan(shard, tmp_path), "is of Mistral's own format", f"give its folder {odd}", code=2)
    (odd / "params.json").rename(tmp_path / "params.json")
    refused(plan(odd, tmp_path), "params.json is missing")
    (tmp_path / "params.json").rename(odd / "params.json")
    shard.unlink()
    refused(plan(odd, tmp_path), f"{shard.name} is missing", "copy them again")

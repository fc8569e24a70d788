"""Models of the Hub: what is downloaded, where from, and what is said when that cannot be; against a Hub on loopback."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_converters.storage.hub_access import is_hub_id
from tests import modelconvert
from tests.helpers import Run, hf_tensors, nothing_complete, same_tensors, succeeded
from tests.hub_server import Hub, commit, offline, serving, unreachable
from tests.oracle.hf import make_model
from tests.test_meta_source import write as write_meta

HFModel = Callable[..., Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders to publish: with all that a model may have on the Hub, which is more than is needed."""
    root = tmp_path_factory.mktemp("published")
    both = make_model("llama2", root / "both", max_shard_size="100KB")
    (both / "tokenizer_config.json").write_text("{}")
    (both / "modeling_own.py").write_text("raise SystemExit('this must not run')\n")
    for name in (
        "pytorch_model.bin",
        "README.md",
        "consolidated.safetensors",
        "params.json",
        "onnx/model.onnx",
        "original/params.json",
    ):
        (both / name).parent.mkdir(exist_ok=True)
        (both / name).write_bytes(b"not needed")
    old = make_model("mistral", root / "old", weights="bin")
    meta = write_meta(make_model("llama2", root / "source", vocab_size=200), root / "meta", ranks=2, embedding_dim=1)
    nothing = root / "nothing"
    nothing.mkdir()
    (nothing / "model.gguf").write_bytes(b"GGUF")
    return {"acme__both": both, "acme__old": old, "acme__meta": meta, "acme__nothing": nothing}


@pytest.fixture(scope="module")
def hub(models: dict[str, Path]) -> Iterator[Hub]:
    with serving(**models) as served:
        yield served


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MODELCONVERT_HOME", str(tmp_path / "workspace"))
    return tmp_path / "hf_home"


def convert(hub: Hub, home: Path, name: str, *options: str, env: dict[str, str] | None = None) -> Run:
    where = env or hub.environment(home)
    return modelconvert.process("convert", name, *options, cwd=home.parent, env=where)


def failed(run: Run, *words: str) -> None:
    assert run.code == 1 and "Traceback" not in run.err, run
    assert "Conversion failed: " in run.err and all(word in run.err for word in words), (words, run.err)


def test_only_the_files_that_are_needed(hub: Hub, models: dict[str, Path], home: Path) -> None:
    hub.downloaded.clear()
    done = succeeded(convert(hub, home, "acme/both", "hf"))
    needed = {path.name for path in models["acme__both"].glob("model*")}
    needed |= {"config.json", "generation_config.json", "tokenizer_config.json", "modeling_own.py"}
    assert {name.removeprefix("acme/both/") for name in hub.downloaded} == needed
    assert len(hub.downloaded) == len(needed)
    output = home.parent / "outputs/both_huggingface"
    assert "[Output directory used]: ./outputs/both_huggingface\n" in done.out
    same_tensors(hf_tensors(output), _shards(models["acme__both"]))
    snapshot = home / "hub/models--acme--both/snapshots" / commit("acme/both")
    assert f"acme/both is read from {snapshot}" in done.out

    hub.downloaded.clear()
    succeeded(convert(hub, home, f"acme/both@{commit('acme/both')}", "hf", "-o", "again"))
    assert hub.downloaded == []
    succeeded(convert(hub, home, "acme/both", "hf", "-o", "offline", env=offline(home)))
    away = succeeded(convert(hub, home, "acme/both", "hf", "-o", "unreachable", env=unreachable(home)))
    assert "the Hub cannot be asked for acme/both" in away.err
    same_tensors(hf_tensors(home.parent / "offline"), hf_tensors(output))


def _shards(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("model-*.safetensors") for name, tensor in load_file(path).items()}


def test_bin_files_where_there_are_no_safetensors(hub: Hub, models: dict[str, Path], home: Path) -> None:
    hub.downloaded.clear()
    succeeded(convert(hub, home, "acme/old", "hf2megatron", "--model-type", "llama"))
    assert "acme/old/pytorch_model.bin" in hub.downloaded
    assert (home.parent / "outputs/old_hf2megatron/model.pt").is_file()


def test_metas_own_files(hub: Hub, models: dict[str, Path], home: Path) -> None:
    hub.downloaded.clear()
    succeeded(convert(hub, home, "acme/meta", "hf", "--model-type", "llama", "-o", "out"))
    assert {"acme/meta/params.json", "acme/meta/consolidated.01.pth"} <= set(hub.downloaded)
    theirs = hf_tensors(models["acme__meta"].parent / "source")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in hf_tensors(home.parent / "out").items())


def test_a_folder_here_goes_before_the_hub(hub: Hub, models: dict[str, Path], home: Path) -> None:
    shutil.copytree(models["acme__old"], home.parent / "acme/both")
    hub.downloaded.clear()
    succeeded(convert(hub, home, "acme/both", "hf", "--model-type", "mistral"))
    assert hub.downloaded == []


REFUSED = {
    "acme/absent": ("acme/absent is neither a folder here nor a model on the Hub at http://127", "hf auth login"),
    "acme/both@v9": ("acme/both on the Hub at", "has no revision v9"),
    "acme/nothing": ("acme/nothing on the Hub has neither config.json with model.safetensors",),
    "./acme/both": ("./acme/both is no folder here, and no name of a model on the Hub",),
    "a/b/c": ("a/b/c is no folder here, and no name of a model on the Hub",),
    "acme/-..": ("acme/-.. is",),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_there(name: str, hub: Hub, home: Path) -> None:
    failed(convert(hub, home, name, "hf2megatron"), *REFUSED[name])
    nothing_complete(home.parent / "outputs")


def test_gated_models(hub: Hub, home: Path) -> None:
    hub.gated.add("acme/old")
    try:
        failed(convert(hub, home, "acme/old", "hf2megatron"), "acme/old is gated on the Hub at", "accept its terms")
    finally:
        hub.gated.clear()


def test_offline_without_a_copy(hub: Hub, home: Path) -> None:
    failed(
        convert(hub, home, "acme/both", "hf", env=offline(home)),
        f"acme/both is neither a folder here nor in the cache {home}/hub, and HF_HUB_OFFLINE",
    )
    failed(
        convert(hub, home, "acme/both", "hf", env=unreachable(home)),
        "cannot be downloaded from the Hub at http://127.0.0.1:9",
    )


def test_a_part_of_a_copy_is_not_taken_for_the_whole(hub: Hub, home: Path) -> None:
    succeeded(convert(hub, home, "acme/both", "hf"))
    (shard, *_) = (home / "hub/models--acme--both/snapshots" / commit("acme/both")).glob("model-00002-*")
    shard.unlink()
    failed(
        convert(hub, home, "acme/both", "hf", "-o", "b", env=offline(home)),
        "only a part of acme/both, without",
        shard.name,
    )
    hub.downloaded.clear()
    succeeded(convert(hub, home, "acme/both", "hf", "-o", "b"))


def test_what_may_be_a_name_on_the_hub() -> None:
    assert all(map(is_hub_id, ("owner/name", "gpt2", "a/b@main", "a/b@refs/pr/1", "OpenBMB/MiniCPM4-0.5B")))
    assert not any(map(is_hub_id, ("", "/a", "./a", "a/b/c", "a/", "a b", "ä/b", "a/b@", "-a/b")))

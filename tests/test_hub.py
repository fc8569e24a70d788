"""Models of the Hub in the library: upload in one commit, download of a part, and names; against a Hub on loopback."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_converters.basics.errors import ConversionError, MissingPath
from megatron_converters.formats.hub import download, resolve
from megatron_converters.formats.hub_upload import upload
from tests.helpers import hf_tensors, same_tensors
from tests.hub_repos import READER, WRITER
from tests.hub_server import Hub, commit, serving, use
from tests.oracle.hf import hf_logits, make_model, sample_tokens

_TINY = dict(num_hidden_layers=2, vocab_size=97, hidden_size=32, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama of two shards, with what a folder of ours may hold beside."""
    folder = make_model("llama2", tmp_path_factory.mktemp("made") / "shards", max_shard_size="70KB", **_TINY)
    assert len(list(folder.glob("model-*-of-00002.safetensors"))) == 2
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "conversion.json").write_text('{"of": "shards"}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    for hidden in (".cache/huggingface/upload", ".gitignore", "__pycache__/modeling_own.cpython-311.pyc"):
        (folder / hidden).parent.mkdir(parents=True, exist_ok=True)
        (folder / hidden).write_text("*.safetensors\n")
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another Llama, in one file."""
    return make_model("llama2", tmp_path_factory.mktemp("made") / "single", seed=1, **_TINY)


@pytest.fixture
def hub(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Hub that has one model of the user and one of somebody else."""
    with serving(acme__there=single, other__one=single) as served:
        use(served, tmp_path / "home", monkeypatch, token=WRITER)
        yield served


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    """Copy of the shards that a test may change."""
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def files(folder: Path) -> dict[str, str]:
    """Digest of each file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refused(action: Callable[[], object], *words: str) -> None:
    """Assert a refusal in one sentence."""
    with pytest.raises(ConversionError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_model_goes_up_in_one_commit_and_comes_down(hub: Hub, shards: Path) -> None:
    url = upload(shards, "acme/new", commit_message="As it was trained")
    repository = hub.repositories.by_name["acme/new"]
    assert url == f"{hub.endpoint}/acme/new/commit/{repository.branches['main']}"
    assert len(repository.commits) == 2 and hub.repositories.messages == ["As it was trained"]
    assert not repository.private
    # the model card is checked, and three requests make the commit; what is in LFS goes there once
    assert {"create", "validate-yaml", "preupload", "batch", "content", "verify", "commit"} == set(
        hub.repositories.asked
    )
    assert hub.repositories.asked.count("content") == 2 and hub.repositories.asked.count("commit") == 1

    theirs = files(repository.folder())
    theirs.pop(".gitattributes")  # which every model on the Hub has
    ours = files(shards)
    assert theirs == {name: digest for name, digest in ours.items() if not name.startswith((".", "__pycache__"))}

    got = download("acme/new").folder
    assert {name: digest for name, digest in ours.items() if name in files(got)} == files(got)
    same_tensors(hf_tensors(got), hf_tensors(shards))


def test_transformers_loads_what_was_uploaded(hub: Hub, shards: Path) -> None:
    upload(shards, "acme/new")
    tokens = sample_tokens(vocab_size=97)
    assert torch.equal(hf_logits("acme/new", tokens), hf_logits(shards, tokens))


@pytest.mark.parametrize("first", ["shards", "single"])
def test_a_second_upload_replaces_the_weights(hub: Hub, shards: Path, single: Path, first: str) -> None:
    before, after = (shards, single) if first == "shards" else (single, shards)
    upload(before, "acme/new")
    upload(after, "acme/new")
    folder = hub.models["acme/new"]
    tokens = sample_tokens(vocab_size=97)
    assert torch.equal(hf_logits(folder, tokens), hf_logits(after, tokens))
    same_tensors(hf_tensors(folder), hf_tensors(after))  # none is left of the first
    assert (folder / "conversion.json").exists() == (after is shards)
    assert (folder / "README.md").exists()  # what says nothing of weights stays


def test_what_is_there_is_not_sent_again(hub: Hub, shards: Path) -> None:
    first = upload(shards, "acme/new")
    hub.repositories.asked.clear()
    assert upload(shards, "acme/new") == first
    assert not {"content", "commit"} & set(hub.repositories.asked)


def test_private_models(hub: Hub, shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    upload(shards, "acme/secret", private=True)
    assert hub.repositories.by_name["acme/secret"].private
    refused(
        lambda: upload(shards, "acme/there", private=True), "acme/there on the Hub exists and is public", "settings"
    )
    assert len(hub.repositories.by_name["acme/there"].commits) == 1
    use(hub, tmp_path / "other", monkeypatch)
    refused(lambda: download("acme/secret"), "unless it is private", "hf auth login")
    assert (download("acme/secret", token=READER).folder / "model.safetensors.index.json").exists()


def test_a_branch(hub: Hub, shards: Path, single: Path) -> None:
    refused(
        lambda: upload(shards, "acme/there", revision="v2"), "has no branch v2", "hf repos branch create acme/there v2"
    )
    repository = hub.repositories.by_name["acme/there"]
    repository.branches["v2"] = repository.branches["main"]
    upload(shards, "acme/there", revision="v2")
    assert repository.folder() == single
    same_tensors(hf_tensors(download("acme/there@v2").folder), hf_tensors(shards))


def test_files_that_the_hub_would_ignore_are_sent(hub: Hub, shards: Path, single: Path, tmp_path: Path) -> None:
    with_rules = shutil.copytree(single, tmp_path / "with_rules")
    (with_rules / ".gitignore").write_text("*.safetensors conversion.json")
    hub.repositories.by_name["acme/there"].commits[commit("acme/there")] = with_rules
    upload(shards, "acme/there")
    same_tensors(hf_tensors(hub.models["acme/there"]), hf_tensors(shards))
    assert (hub.models["acme/there"] / "conversion.json").exists()


def test_folders_that_are_no_complete_model(hub: Hub, copy: Path) -> None:
    with pytest.raises(MissingPath, match="absent is no folder"):
        upload(copy / "absent", "acme/new")
    (copy / "adapter_config.json").write_text("{}")
    refused(lambda: upload(copy, "acme/new"), f"{copy} has adapter_config.json", "remove it")
    (copy / "adapter_config.json").unlink()
    (copy / ".model.incomplete").mkdir()
    refused(lambda: upload(copy, "acme/new"), "holds an unfinished conversion", "run the same convert command again")
    (copy / ".model.incomplete").rmdir()
    shard = copy / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-4])
    refused(lambda: upload(copy, "acme/new"), f"{shard} is truncated")
    shard.unlink()
    with pytest.raises(
        ConversionError, match=r"model-00002-of-00002.safetensors is named by model.safetensors.index.json"
    ):
        upload(copy, "acme/new")
    (copy / "model.safetensors.index.json").unlink()
    refused(lambda: upload(copy, "acme/new"), "index of these shards is missing")
    (copy / "config.json").unlink()
    refused(lambda: upload(copy, "acme/new"), f"{copy} has no config.json", "no complete Hugging Face model")
    assert hub.repositories.asked == []


def test_an_adapter_on_the_hub_is_not_given_a_base_model(hub: Hub, shards: Path, single: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(single, tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text("{}")
    hub.repositories.by_name["acme/there"].commits[commit("acme/there")] = adapter
    refused(lambda: upload(shards, "acme/there"), "acme/there on the Hub has adapter_config.json")


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "acme/new@v2", "acme/a b", "acme/-new", "acme/a--b", "acme/new.git", "ä/b"]
)
def test_names_that_the_hub_does_not_allow(hub: Hub, shards: Path, name: str) -> None:
    refused(lambda: upload(shards, name), "is no name that the Hub allows", "owner/name")
    assert hub.repositories.asked == []


def test_without_leave_to_write(hub: Hub, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("other/new", "other/one"):
        refused(
            lambda name=name: upload(shards, name), f"the token may not write to {name} on the Hub at {hub.endpoint}"
        )
    refused(lambda: upload(shards, "acme/there", token=READER), "the token may not write to acme/there", "HF_TOKEN")
    refused(lambda: upload(shards, "acme/new", token="hf_none"), "does not know the token", "hf auth login")
    use(hub, tmp_path / "home", monkeypatch)
    hub.repositories.asked.clear()
    refused(lambda: upload(shards, "acme/new"), "without a token", "hf auth login")
    assert hub.repositories.asked == []
    assert "acme/new" not in hub.models and len(hub.repositories.by_name["acme/there"].commits) == 1


def test_offline_and_out_of_reach(hub: Hub, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(lambda: upload(shards, "acme/new"), "HF_HUB_OFFLINE forbids to use the Hub", "unset it")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(lambda: upload(shards, "acme/new"), "on the Hub at http://127.0.0.1:9: ConnectError", "HF_ENDPOINT")
    assert hub.repositories.asked == []


@pytest.mark.parametrize("step", ["create", "preupload", "batch", "content", "verify", "commit"])
def test_an_error_in_the_middle_leaves_no_commit(
    hub: Hub, shards: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import _http

    monkeypatch.setattr(
        _http, "time", SimpleNamespace(sleep=lambda seconds: None)
    )  # between the attempts, half a minute
    hub.repositories.failing[step] = 500
    refused(lambda: upload(shards, "acme/new"), f"{shards} cannot be uploaded to acme/new", "500", "or nothing of it")
    made = hub.repositories.by_name.get("acme/new")
    assert step == "create" if made is None else list(files(made.folder())) == [".gitattributes"]
    hub.repositories.failing.clear()
    upload(shards, "acme/new")
    same_tensors(hf_tensors(hub.models["acme/new"]), hf_tensors(shards))


def test_a_file_that_changes_on_the_way_is_not_committed(hub: Hub, copy: Path) -> None:
    upload(copy, "acme/new")
    repository = hub.repositories.by_name["acme/new"]
    first = repository.branches["main"]
    weights = copy / "model-00001-of-00002.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    hub.repositories.before["batch"] = lambda: weights.write_bytes(data[:-1] + b"\0")  # its digest was made before
    refused(lambda: upload(copy, "acme/new"), "the content of", "is another one", "or nothing of it")
    assert repository.branches["main"] == first


def test_a_commit_of_someone_else_in_between(hub: Hub, shards: Path, single: Path) -> None:
    repository = hub.repositories.by_name["acme/there"]

    def theirs() -> None:
        repository.commits["e" * 40] = single
        repository.branches["main"] = "e" * 40

    hub.repositories.before["commit"] = theirs
    refused(lambda: upload(shards, "acme/there"), "was changed by someone else during the upload", "again")
    assert repository.folder() == single


def test_config_json_alone(hub: Hub, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    folder = resolve("acme/there", config_only=True).folder
    assert hub.downloaded == ["acme/there/config.json"] and list(files(folder)) == ["config.json"]
    assert json.loads((folder / "config.json").read_text()) == json.loads((single / "config.json").read_text())
    elsewhere = resolve("acme/there", config_only=True, cache_dir=str(tmp_path / "cache")).folder
    assert elsewhere.is_relative_to(tmp_path / "cache")
    refused(
        lambda: resolve("acme/absent", config_only=True).folder,
        "acme/absent is neither a folder here nor a model on the Hub",
    )
    refused(lambda: resolve("acme/there@v9", config_only=True).folder, "has no revision v9")
    (tmp_path / "without").mkdir()
    hub.repositories.by_name["acme/there"].branches["empty"] = "f" * 40
    hub.repositories.by_name["acme/there"].commits["f" * 40] = tmp_path / "without"
    refused(
        lambda: resolve("acme/there@empty", config_only=True).folder, "acme/there@empty on the Hub has no config.json"
    )

    hub.downloaded.clear()
    assert resolve("acme/there", config_only=True, local_files_only=True).folder == folder
    refused(lambda: resolve("acme/new", local_files_only=True), "nor in the cache", "local_files_only forbids")
    assert not hub.downloaded
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("acme/there", config_only=True).folder == folder
    refused(lambda: download("acme/there"), "the cache has only a part of acme/there, without model.safetensors")
    refused(
        lambda: resolve("acme/new", config_only=True).folder,
        "nor in the cache",
        "HF_HUB_OFFLINE or local_files_only forbids",
    )
    nowhere = str(tmp_path / "nowhere")
    refused(lambda: resolve("acme/there", config_only=True, cache_dir=nowhere).folder, f"nor in the cache {nowhere}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    found = resolve("acme/there", config_only=True)
    assert found.folder == folder and "the Hub cannot be asked for acme/there" in found.notes[0]


def test_what_a_name_means(hub: Hub, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    same_tensors(hf_tensors(resolve("acme/there").folder), hf_tensors(single))
    (tmp_path / "acme/there").mkdir(parents=True)
    hub.downloaded.clear()
    for name in ("acme/there", Path("acme/there"), str(tmp_path / "acme"), Path("."), "./acme"):
        assert resolve(name) == (Path(name), [])
    (tmp_path / "acme/file").touch()
    for name in ("/absent", "./absent", "../absent", "~/absent", "a/b/c", Path("/acme/absent"), "", "acme/file"):
        with pytest.raises(MissingPath, match="is no folder here, and no name of a model on the Hub"):
            resolve(name)
    assert hub.downloaded == []

"""Names of the Hub, and folders of huggingface_hub's cache, as sources of every command; against a Hub on loopback."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from safetensors import safe_open

import megatron_converters as mc
from megatron_converters import logits
from megatron_converters.assets.tokenizer import write_tokenizer
from megatron_converters.formats.megatron.reading import MegatronReadOptions
from megatron_converters.logits.compare import LogitsReport
from megatron_converters.storage.hub_cache import place_of
from tests import helpers
from tests.helpers import Run, convert, convert_back, tp_pp_converter, verb
from tests.helpers import succeeded as ok
from tests.hub_server import Hub, commit, serving, use
from tests.small_hf import VOCABULARY, small_llama

COMMIT = commit("acme/there")
TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}
#: What nobody needs who converts the model: other copies of the weights, and text.
NEEDLESS = (
    "README.md",
    "model.gguf",
    "original/consolidated.00.pth",
    "pytorch_model.bin",
    "consolidated.safetensors",
    "onnx/model.onnx",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama in two shards, with a tokenizer and with all that a model may have on the Hub beside."""
    folder = small_llama(tmp_path_factory.mktemp("made") / "there", shards=2)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text("{}")
    for name in NEEDLESS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not needed")
    return folder


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Hub that has the model twice, and an empty cache; commands run in an empty folder."""
    with serving(acme__there=model, acme__alone=model) as served:
        use(served, tmp_path / "home", monkeypatch)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield served


@pytest.fixture
def cached(hub: Hub, model: Path, tmp_path: Path) -> Path:
    """Snapshot of the model in the cache, as huggingface_hub would leave it, and a Hub that must not be asked."""
    top = tmp_path / "home/hub/models--acme--there"
    snapshot = top / "snapshots" / COMMIT
    (top / "blobs").mkdir(parents=True)
    (top / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (top / "refs/main").write_text(COMMIT)
    for number, path in enumerate(sorted(needed(model))):
        shutil.copyfile(path, top / f"blobs/{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    hub.repositories.by_name.clear()
    return snapshot


def needed(folder: Path) -> set[Path]:
    """Files that a conversion of the model needs."""
    return {path for path in folder.iterdir() if path.is_file() and path.name not in NEEDLESS}


def refused(run: Run, *words: str, code: int = 2) -> str:
    """Assert a refusal in one sentence; returns it."""
    message = helpers.refused(run, *words, code=code).err.strip()
    assert "\n" not in message, message
    return message


def test_without_a_copy_the_line_of_hf_download_is_given_and_is_right(hub: Hub, model: Path, tmp_path: Path) -> None:
    message = refused(verb("inspect", "acme/there"), f"neither a folder here nor in the cache {tmp_path}/home/hub;")
    assert hub.downloaded == []
    line = message.partition(" run: ")[2]
    assert line == "hf download acme/there --exclude '*.gguf' --exclude 'original/*'"
    program, *words = shlex.split(line)
    env = {**os.environ, **hub.environment(tmp_path / "home")}
    subprocess.run([Path(sys.executable).with_name(program), *words], env=env, check=True, capture_output=True)
    assert not any("original" in name or "gguf" in name for name in hub.downloaded)
    hub.repositories.by_name.clear()
    found = json.loads(ok(verb("inspect", "acme/there", "--json")).out)
    assert found["path"] == str(tmp_path / "home/hub/models--acme--there/snapshots" / COMMIT)
    assert found["hub"] == f"acme/there@{COMMIT}"

    # what the list of the Hub's files, which that command has kept, says to be missing is said exactly
    snapshot = Path(found["path"])
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    again = f"hf download acme/there model-00002-of-00002.safetensors --revision {COMMIT}"
    for source in ("acme/there", snapshot, snapshot.parent):
        words = ("only a part of", "without model-00002-of-00002.safetensors; ")
        assert refused(verb("inspect", source), *words, code=1).endswith(again)
    (snapshot / "tokenizer.json").unlink()
    shutil.copyfile(model / "model-00002-of-00002.safetensors", snapshot / "model-00002-of-00002.safetensors")
    assert f"warning: the cache lacks tokenizer.json of acme/there@{COMMIT}; run: hf download acme/there" in (
        ok(verb("inspect", "acme/there")).out
    )


@pytest.mark.parametrize(
    "name", ["acme/there", f"acme/there@{COMMIT}", "acme/there@main", "folder", "snapshots", "snapshot", "a link"]
)
def test_every_verb_reads_the_cache(name: str, cached: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(cached.parent.parent)
    folders = {"folder": cached.parent.parent, "snapshots": cached.parent, "snapshot": cached, "a link": "../link"}
    source = folders.get(name, name)
    out = tmp_path / "out"
    planned = json.loads(ok(verb("plan", source, out, "--tp", 2, "--json", "--no-measure")).out)
    done = ok(verb("convert", source, out, "--tp", 2))
    assert len(planned["files"]) == 2 and (
        name == "snapshot" or f"is commit {COMMIT} of acme/there on the Hub" in done.out
    )
    assert "EQUAL" in ok(verb("verify", source, out)).out and "EQUAL" in ok(verb("verify", model, source)).out
    assert ok(verb("diff", source, model)).out.endswith("EQUAL\n")
    assert str(cached) in ok(verb("inspect", source)).out
    assert "--num-layers 2" in ok(verb("args", source)).out

    # the output says what it was made of, and goes back with the tokenizer
    manifest = json.loads((out / "iter_0000001/conversion.json").read_text())
    assert (manifest["source"]["path"], manifest["source"]["hub"]) == (str(cached), f"acme/there@{COMMIT}")
    assert f"; written from acme/there@{COMMIT} of the Hub" in ok(verb("verify", out)).out
    assert json.loads(ok(verb("verify", out, "--json")).out)["hub"] == f"acme/there@{COMMIT}"
    ok(verb("convert", out, tmp_path / "back"))
    assert json.loads((tmp_path / "back/tokenizer.json").read_text()) == TOKENIZER
    assert tensors(tmp_path / "back") == tensors(model)


def tensors(folder: Path) -> dict[str, bytes]:
    """Bytes of all tensors in a folder's safetensors files, read by the library of that name."""
    files = [safe_open(path, "numpy") for path in sorted(folder.glob("model*.safetensors"))]
    return {name: file.get_tensor(name).tobytes() for file in files for name in file.keys()}  # noqa: SIM118 - no dict


def test_logits_of_names(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[object] = []

    def compare_logits(a: Path, b: Path, *, options: MegatronReadOptions, **rest: object) -> LogitsReport:
        run.extend((a, b, options.hf_config))
        return LogitsReport(0.0, (0, 0, 0), (1.0, 1.0), 1.0, 1.0, 1, 0.0)

    monkeypatch.setattr(logits, "compare_logits", compare_logits)
    said = ok(verb("verify", "acme/there", cached.parent.parent, "--logits", "--hf-config", "acme/there@main")).out
    assert run == [cached, cached, cached]
    assert f"acme/there@main is commit {COMMIT} of acme/there on the Hub" in said


def test_the_scripts_read_the_cache(cached: Path, model: Path, tmp_path: Path, hub: Hub) -> None:
    env = {**hub.environment(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    meg, back = tmp_path / "meg", tmp_path / "back"
    run = ok(convert("--loader", "hf", "--saver", "mcore", "--load-dir", "acme/there", "--save-dir", meg, env=env))
    assert f"acme/there is commit {COMMIT} of acme/there on the Hub" in run.out
    assert json.loads((meg / "iter_0000001/conversion.json").read_text())["source"]["hub"] == f"acme/there@{COMMIT}"
    assert ok(verb("verify", "acme/there", meg))
    ok(
        convert_back(
            "--load-path", meg, "--save-path", back, "--hf-config", "acme/there", "--tokenizer-model", "acme/there"
        )
    )
    assert tensors(back) == tensors(model)
    written = json.loads((back / "conversion.json").read_text())
    assert f"acme/there is commit {COMMIT} of acme/there on the Hub" in written["notes"]
    assert json.loads((back / "tokenizer.json").read_text()) == TOKENIZER
    ok(
        tp_pp_converter(
            "--in_dir", meg, "--save_path", tmp_path / "dir", "--format", "directory", "--hf_config", "acme/there"
        )
    )
    assert (tmp_path / "dir/tokenizer.json").exists()


def test_from_python(cached: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    result = mc.convert("acme/there", out, tp=2)
    assert f"acme/there is commit {COMMIT} of acme/there on the Hub" in result.notes
    assert mc.verify("acme/there", out) and mc.verify(out).report["hub"] == f"acme/there@{COMMIT}"
    assert not mc.diff("acme/there", model)
    assert mc.inspect("acme/there")["hub"] == f"acme/there@{COMMIT}"
    assert "--num-layers 2" in mc.training_flags("acme/there").flags
    assert len(mc.plan("acme/there", tmp_path / "other", pp=2).files) == 2
    back = mc.convert(out, tmp_path / "back", read=mc.ReadOptions(hf_config="acme/there"))
    assert tensors(back.path) == tensors(model)
    with pytest.raises(FileNotFoundError, match="run: hf download acme/alone"):
        mc.convert("acme/alone", tmp_path / "none")
    with serving(acme__alone=model) as served:
        use(served, tmp_path / "home", monkeypatch)
        assert mc.inspect("acme/alone", download=True)["hub"] == f"acme/alone@{commit('acme/alone')}"


def test_download_fetches_what_is_needed(hub: Hub, model: Path, tmp_path: Path) -> None:
    done = ok(verb("convert", "acme/there", tmp_path / "out", "--download", "--workers", 2, "--tp", 2))
    assert sorted(hub.downloaded) == sorted(f"acme/there/{path.name}" for path in needed(model))
    assert f"acme/there is commit {COMMIT} of acme/there on the Hub" in done.out
    hub.downloaded.clear()
    assert "EQUAL" in ok(verb("verify", "acme/there", tmp_path / "out", "--download")).out
    assert hub.downloaded == []

    # of a reference, no weights; of a tokenizer, nothing else
    reference = ("--hf-config", "acme/alone", "--tokenizer-model", "acme/alone")
    hub.repositories.by_name["acme/tokens"] = hub.repositories.by_name["acme/alone"]
    message = refused(verb("convert", tmp_path / "out", tmp_path / "back", *reference), "acme/alone is neither")
    assert message.endswith(" --exclude 'original/*' --exclude '*.safetensors'")
    ok(verb("convert", tmp_path / "out", tmp_path / "back", *reference, "--download"))
    assert not any("safetensors" in name or "bin" in name for name in hub.downloaded)
    assert "acme/alone/config.json" in hub.downloaded and "acme/alone/tokenizer.json" in hub.downloaded
    hub.downloaded.clear()
    back = ("--load-path", tmp_path / "out", "--save-path", tmp_path / "other")
    ok(convert_back(*back, "--tokenizer-model", "acme/tokens", "--download"))
    assert sorted(hub.downloaded) == ["acme/tokens/tokenizer.json", "acme/tokens/tokenizer_config.json"]


def test_a_part_of_a_copy_is_completed_by_download(hub: Hub, model: Path, tmp_path: Path) -> None:
    ok(verb("inspect", "acme/there", "--download"))
    top = tmp_path / "elsewhere/models--acme--there"
    shutil.copytree(tmp_path / "home/hub/models--acme--there", top, symlinks=True)
    shard = top / "snapshots" / COMMIT / "model-00001-of-00002.safetensors"
    shard.resolve().unlink()
    shard.unlink()
    assert refused(verb("inspect", top), "only a part", code=1).endswith(
        f"--revision {COMMIT} --cache-dir {top.parent}"
    )
    hub.downloaded.clear()
    ok(verb("inspect", top, "--download"))
    assert hub.downloaded == ["acme/there/model-00001-of-00002.safetensors"]
    shutil.rmtree(top / "blobs")
    refused(verb("inspect", top), "they are links into blobs/, which was not copied with them", code=1)


def test_what_the_cache_does_not_tell_is_not_guessed(cached: Path, tmp_path: Path) -> None:
    (cached / "model.safetensors.index.json").unlink()
    refused(verb("inspect", "acme/there"), "without model.safetensors.index.json; pass --download", code=1)
    for shard in cached.glob("model-*"):
        shard.unlink()
    message = refused(verb("inspect", "acme/there"), f"only a part of acme/there@{COMMIT}, without weights", code=1)
    assert message.endswith(
        f"run: hf download acme/there --revision {COMMIT} --exclude '*.gguf' --exclude 'original/*'"
    )
    refused(verb("inspect", "acme/there@v2"), "which has it at main alone", "run: hf download acme/there --revision v2")
    (cached.parent.parent / "refs/main").unlink()
    (cached.parent / ("0" * 40)).mkdir()
    refused(verb("inspect", cached.parent.parent), "has several snapshots and no main branch; give one of")
    shutil.rmtree(cached.parent)
    refused(verb("inspect", cached.parent.parent), "has no snapshot of acme/there: its download was not", code=1)


def test_snapshots_of_something_else(
    cached: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a checkpoint in a cache is read as in any other folder, and is on the Hub, too
    other = tmp_path / "home/hub/models--acme--checkpoint/snapshots" / ("2" * 40)
    ok(verb("convert", model, other, "--to", "megatron"))
    found = json.loads(ok(verb("inspect", other, "--json")).out)
    assert (found["format"], found["hub"]) == ("megatron", f"acme/checkpoint@{'2' * 40}")

    # files of a kind that is not read: known from the list of the Hub's files, or not known
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf/model.gguf").write_bytes(b"GGUF")
    shutil.copyfile(model / "config.json", tmp_path / "gguf/config.json")
    with serving(acme__gguf=tmp_path / "gguf") as served:
        use(served, tmp_path / "home", monkeypatch)
        snapshot_download("acme/gguf")
    refused(verb("inspect", "acme/gguf"), f"acme/gguf@{commit('acme/gguf')} has neither config.json with", code=1)
    shutil.rmtree(tmp_path / "home/hub/models--acme--gguf/trees")
    refused(verb("inspect", "acme/gguf"), "only a part of acme/gguf", "without weights", code=1)


def test_an_index_that_names_more_than_the_hub_has(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.ghost.weight"] = "model-00003-of-00003.safetensors"
    shutil.copytree(model, tmp_path / "stale")
    (tmp_path / "stale/model.safetensors.index.json").write_text(json.dumps(index))
    with serving(acme__stale=tmp_path / "stale") as served:
        use(served, tmp_path / "home", monkeypatch)
        refused(verb("inspect", "acme/stale", "--download"), "is not complete: it lacks model-00003", code=1)
        snapshot_download("acme/stale")
    for name in ("acme/stale", tmp_path / "stale"):  # no download would help
        run = verb("inspect", name)
        assert "hf download" not in run.err and "model-00003-of-00003.safetensors" in run.out + run.err


def test_old_models_have_no_owner(model: Path, tmp_path: Path, hub: Hub) -> None:
    top = tmp_path / "home/hub/models--llama"
    shutil.copytree(model, top / "snapshots" / COMMIT)  # as on a file system without links
    (top / "refs").mkdir()
    (top / "refs/main").write_text(COMMIT)
    assert json.loads(ok(verb("inspect", "llama", "--json")).out)["hub"] == f"llama@{COMMIT}"
    assert refused(verb("inspect", "llama2"), "llama2 is neither a folder here").endswith("'original/*'")


def test_an_adapter_in_the_cache_is_named_as_one(cached: Path) -> None:
    for path in cached.iterdir():
        path.unlink()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (cached / name).write_text("{}")
    refused(verb("inspect", "acme/there"), "adapter_config.json describes a PEFT adapter", code=1)


REFUSED_DOWNLOADS = {
    "acme/absent": ("acme/absent is neither a folder here nor a model on the Hub", "hf auth login"),
    "acme/there@v9": ("acme/there on the Hub at", "has no revision v9; name another"),
    "acme/gated": ("acme/gated is gated on the Hub at", "accept its terms"),
    "acme/private": ("acme/private is neither a folder here nor a model on the Hub", "unless it is private"),
    "acme/incomplete": ("acme/incomplete on the Hub is not complete: it lacks config.json",),
    "acme/a--b": ("acme/a--b is neither a folder here nor a name that the Hub allows",),
}


@pytest.mark.parametrize("name", REFUSED_DOWNLOADS)
def test_what_cannot_be_downloaded(name: str, hub: Hub, model: Path, tmp_path: Path) -> None:
    repositories = hub.repositories.by_name
    repositories["acme/gated"] = repositories["acme/alone"]
    repositories["acme/private"] = type(repositories["acme/alone"])({COMMIT: model}, {"main": COMMIT}, private=True)
    (tmp_path / "incomplete").mkdir()
    shutil.copyfile(model / "model.safetensors.index.json", tmp_path / "incomplete/model.safetensors.index.json")
    for shard in model.glob("model-*"):
        shutil.copyfile(shard, tmp_path / "incomplete" / shard.name)
    repositories["acme/incomplete"] = type(repositories["acme/alone"])(
        {"1" * 40: tmp_path / "incomplete"}, {"main": "1" * 40}
    )
    hub.gated.add("acme/gated")
    refused(verb("convert", name, tmp_path / "out", "--download"), *REFUSED_DOWNLOADS[name], code=1)
    assert not (tmp_path / "out").exists()


def test_answers_without_a_code(hub: Hub, tmp_path: Path) -> None:
    for status, words in {401: "does not know the token", 403: "the token may not read acme/there"}.items():
        hub.answers["acme/there"] = status
        refused(verb("inspect", "acme/there", "--download"), words, "hf auth login", code=1)


def test_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(verb("inspect", "acme/there"), "or unset HF_HUB_OFFLINE and run: hf download acme/there")
    refused(verb("inspect", "acme/there", "--download"), "HF_HUB_OFFLINE or local_files_only forbids", code=1)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    ok(verb("inspect", "acme/there", "--download"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    far = ok(verb("inspect", "acme/there", "--download"))
    assert "warning: the Hub cannot be asked for acme/there" in far.out
    refused(
        verb("inspect", "acme/alone", "--download"), "cannot be downloaded from the Hub at http://127.0.0.1:9", code=1
    )


def test_a_folder_here_goes_before_the_cache(cached: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, "acme/there")
    assert json.loads(ok(verb("inspect", "acme/there", "--json")).out)["hub"] is None
    Path("acme/alone").touch()
    assert "hf download" not in verb("inspect", "acme/alone").err


def test_names_that_are_no_names(cached: Path, tmp_path: Path) -> None:
    for address in (f"https://huggingface.co/acme/there/tree/{COMMIT}", "hf://acme/there"):
        refused(verb("inspect", address), "is an address; name the model as acme/there")
    for path in ("./acme/there", "acme/there/", "/acme/there", "a/b/c"):
        refused(verb("inspect", path), f"{path} does not exist; give a folder or file that does")
    (tmp_path / "here/models--mine").mkdir()
    assert "hf download" not in verb("inspect", "models--mine").err  # a folder of the user's own


def test_the_output_may_not_be_the_source(cached: Path, tmp_path: Path) -> None:
    for source in ("acme/there", cached.parent.parent, cached):
        refused(verb("convert", source, cached, "--to", "hf", "--overwrite"), "is the source itself")


def test_tokenizers(cached: Path, hub: Hub, tmp_path: Path) -> None:
    for number, source in enumerate(("acme/there", f"acme/there@{COMMIT}", cached.parent.parent, cached)):
        (tmp_path / str(number)).mkdir()
        (note,) = write_tokenizer(source, tmp_path / str(number), vocab_size=VOCABULARY, explicit=True)
        assert note.startswith(f"copied the tokenizer of {cached}")
    with pytest.raises(
        mc.ConversionError, match=r"--tokenizer-model acme/alone is neither .* run: hf download acme/alone"
    ):
        write_tokenizer("acme/alone", tmp_path, vocab_size=VOCABULARY, explicit=True)
    (note,) = write_tokenizer("acme/alone", tmp_path, vocab_size=VOCABULARY)
    assert note.startswith("warning: wrote no tokenizer: the tokenizer acme/alone is neither") and "hf download" in note


def test_places() -> None:
    found = place_of(f"/cache/models--gpt2/snapshots/{COMMIT}")
    assert found is not None and str(found) == f"gpt2@{COMMIT}" and found.top == Path("/cache/models--gpt2")
    for other in ("/cache/datasets--a--b/snapshots/c", "/cache/models--a--b/c", "/x/snapshots/c", "/", ""):
        assert place_of(other) is None
    assert re.fullmatch(r"[0-9a-f]{40}", COMMIT)

"""AutoBridge and the Hub: live models are published by one process or several, and come back with equal weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_converters.basics.errors import ConversionError
from megatron_converters.bridge import AutoBridge
from megatron_converters.logits.pool import Pool
from tests import bridge_jobs
from tests.conversions import different
from tests.helpers import hf_tensors
from tests.hub_repos import READER, WRITER
from tests.hub_server import Hub, serving, use
from tests.logits_processes import PreloadedContext

HFModel = Callable[..., Path]
STEPS = {"create", "validate-yaml", "preupload", "batch", "content", "verify", "commit"}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2, bridge_jobs.join, 120.0, PreloadedContext("tests.live_preload")) as found:
        yield found


@pytest.fixture
def llama(hf_model: HFModel) -> Path:
    return hf_model("llama2")


@pytest.fixture
def hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Hub that has one model of somebody else."""
    with serving(other__one=llama) as served:
        use(served, tmp_path / "home", monkeypatch, token=WRITER)
        yield served


def pushed(folder: Path, endpoint: str, home: Path, name: str, options: dict[str, Any], sizes: dict[str, int]) -> Any:
    """Job: publish a live model; returns what that gave, what is left of temporary files, and the weights that come back."""
    home.mkdir(exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=home))  # of this process alone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(temporary))
        use(SimpleNamespace(endpoint=endpoint), home, patch, token=options.pop("token", WRITER))  # type: ignore[arg-type]
        bridge, models = bridge_jobs.bridge_and_model(folder, sizes)
        try:
            url = bridge.push_to_hub(models, name, show_progress=False, **options)
        except ConversionError as error:
            return str(error), list(temporary.iterdir()), {}
        other, again = bridge_jobs.bridge_and_model(Path(name), sizes)
        return url, list(temporary.iterdir()), bridge_jobs.exported(other, again, mode="replicate")


@pytest.mark.parametrize("sizes", [{}, dict(tp=2)], ids=["data parallel", "tp 2"])
def test_a_live_model_goes_up_in_one_commit_and_comes_back(
    sizes: dict[str, int], pool: Pool, hub: Hub, llama: Path, tmp_path: Path
) -> None:
    source = hf_tensors(llama)
    done = pool.run(
        pushed, llama, hub.endpoint, tmp_path / "other", "acme/new", dict(commit_message="Trained", private=True), sizes
    )
    repository = hub.repositories.by_name["acme/new"]
    for url, left, weights in done:
        assert url == f"{hub.endpoint}/acme/new/commit/{repository.branches['main']}"
        assert left == []
        assert different(weights, source) == []
    assert repository.private and len(repository.commits) == 2 and hub.repositories.messages == ["Trained"]
    asked = hub.repositories.asked
    assert set(asked) <= STEPS and STEPS - set(asked) <= {"validate-yaml"}  # which checks a model card
    assert asked.count("commit") == asked.count("content") == 1  # one process uploads
    assert "acme/new/model.safetensors" in hub.downloaded
    assert different(hf_tensors(hub.models["acme/new"]), source) == []


@pytest.mark.parametrize(
    ("name", "token", "words"),
    [
        ("other/one", WRITER, "the token may not write to other/one"),
        ("acme/new", READER, "the token may not write to acme/new"),
        ("acme/a b", WRITER, "is no name that the Hub allows"),
    ],
)
def test_every_process_learns_that_the_hub_refuses(
    name: str, token: str, words: str, pool: Pool, hub: Hub, llama: Path, tmp_path: Path
) -> None:
    before = dict(hub.models)
    for message, left, _ in pool.run(
        pushed, llama, hub.endpoint, tmp_path / "other", name, dict(token=token), dict(tp=2)
    ):
        assert words in message
        assert left == []
    assert hub.models == before and "commit" not in hub.repositories.asked


def test_a_saved_folder_is_uploaded_as_it_is(hub: Hub, llama: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(llama)
    url = bridge.push_to_hub(llama, "acme/folder", commit_message="Saved before")
    repository = hub.repositories.by_name["acme/folder"]
    assert url == f"{hub.endpoint}/acme/folder/commit/{repository.branches['main']}"
    assert hub.repositories.messages == ["Saved before"]
    assert different(hf_tensors(repository.folder()), hf_tensors(llama)) == []
    with pytest.raises(ConversionError, match="has no branch v2"):
        bridge.push_to_hub(str(llama), "acme/folder", revision="v2")


def test_options_of_saving_do_not_go_unheeded_with_a_folder(hub: Hub, llama: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(llama)
    with pytest.raises(ConversionError, match="weight_dtype, max_shard_size"):
        bridge.push_to_hub(llama, "acme/folder", weight_dtype="bfloat16", max_shard_size=1000)
    assert hub.repositories.asked == []

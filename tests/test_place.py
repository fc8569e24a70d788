"""What is at the final place already: nothing of the user's is replaced or removed unless that is asked for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_converters.basics.errors import ConversionError, Stopped
from megatron_converters.conversion.progress import Silent
from megatron_converters.conversion.run import convert
from megatron_converters.conversion.staging import Staging
from megatron_converters.formats.huggingface.source import HFSource
from megatron_converters.formats.huggingface.target import HFOptions, HFTarget
from megatron_converters.formats.megatron.opening import open_megatron
from megatron_converters.formats.megatron.rank_files_target import MegatronTarget
from megatron_converters.formats.megatron.writing import MegatronOptions
from tests.helpers import TRACKER, refused, verb

HFModel = Callable[..., Path]
TOKENIZER = json.dumps({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}})


def test_files_of_the_users_stay(hf_model: HFModel, tmp_path: Path) -> None:
    source = shutil.copytree(hf_model("llama2"), tmp_path / "hf")
    (source / "tokenizer.json").write_text(TOKENIZER)
    out = tmp_path / "out"
    for number, (name, words) in enumerate(
        {
            "generation_config.json": "files of a model",
            "source_megatron_args.json": "files of a model",
            "conversion.json": "files of a model",
            "model-00001-of-00002.safetensors": "a model",
            "tokenizer.json": "another tokenizer",
            "special_tokens_map.json": "another tokenizer",
            "additional_chat_templates/mine.jinja": "another tokenizer",
        }.items()
    ):
        place = out / str(number)
        (place / name).parent.mkdir(parents=True)
        (place / name).write_text("mine")
        (place / "README.md").write_text("mine, too")
        with pytest.raises(ConversionError, match=f"already holds {words} .*{name.rpartition('/')[2]}"):
            convert(HFSource(source), HFTarget(place, HFOptions()), None, Silent())
        assert (place / name).read_text() == "mine"
        assert {path.name for path in place.iterdir()} == {name.partition("/")[0], "README.md"}
        convert(HFSource(source), HFTarget(place, HFOptions(overwrite=True)), None, Silent())
        assert not (place / name).exists() or (place / name).read_text() != "mine"
        assert (place / "README.md").read_text() == "mine, too"


def test_a_tokenizer_that_is_there_already_is_no_obstacle(hf_model: HFModel, tmp_path: Path) -> None:
    """The very one that would be written, or the only one there is."""
    source, out = shutil.copytree(hf_model("llama2"), tmp_path / "hf"), tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.json").write_text(TOKENIZER)
    convert(HFSource(source), HFTarget(out, HFOptions()), None, Silent())
    assert (out / "tokenizer.json").read_text() == TOKENIZER
    (source / "tokenizer.json").write_text(TOKENIZER)
    again = tmp_path / "again"
    shutil.copytree(source, again, ignore=shutil.ignore_patterns("*config.json", "model*"))
    convert(HFSource(source), HFTarget(again, HFOptions()), None, Silent())
    assert (again / "config.json").exists()


def test_a_link_in_the_place_of_a_checkpoint(hf_model: HFModel, tmp_path: Path) -> None:
    """Found before anything is copied, not when the result is shown."""
    (tmp_path / "iter_0000001").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConversionError, match="already exists"):
        convert(HFSource(hf_model("llama2")), MegatronTarget(tmp_path, MegatronOptions()), None, Silent())
    options = MegatronOptions(overwrite=True)
    convert(HFSource(hf_model("llama2")), MegatronTarget(tmp_path, options), None, Silent())
    assert (tmp_path / "iter_0000001" / "conversion.json").exists() and not (tmp_path / "iter_0000001").is_symlink()


#: A file that makes readers take a folder for one of a format, and another format, which may then not be written there.
BESIDE = [
    ("config.json", "megatron"),
    ("model-00001-of-00002.safetensors", "megatron"),
    ("consolidated.safetensors", "megatron"),
    ("consolidated.00.pth", "megatron"),
    ("consolidated.00.pth", "hf"),
    (TRACKER, "hf"),
    ("mp_rank_00/model_optim_rng.pt", "hf"),
    (".metadata", "hf"),
]


@pytest.mark.parametrize(("name", "to"), BESIDE)
def test_a_folder_never_holds_two_formats(hf_model: HFModel, name: str, to: str, tmp_path: Path) -> None:
    """It could not be read again without --from; --overwrite would replace none of the other model's files."""
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("{}")
    words = f"{tmp_path / 'out'} holds a model of another format ({name.partition('/')[0]})"
    command = (hf_model("llama2"), tmp_path / "out", "--to", to)
    for more in ((), ("--overwrite",)):
        refused(verb("convert", *command, *more), words, "save elsewhere")
    planned = verb("plan", *command, "--no-measure")
    assert planned.code == 1 and f"obstacle: {words}" in planned.out
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [tmp_path / "out" / name]


def test_what_another_has_saved_meanwhile_stays(hf_model: HFModel, tmp_path: Path) -> None:
    """Two conversions with other names for their checkpoints; the second would redirect the first one's tracker."""

    class Meddler(Silent):
        def __call__(self, count: int) -> None:
            (tmp_path / TRACKER).write_text("release")

    target = MegatronTarget(tmp_path, MegatronOptions(tp=2))
    with pytest.raises(Stopped, match=r"something else was saved there meanwhile: .* points at 'release'") as caught:
        convert(HFSource(hf_model("llama2")), target, None, Meddler())
    assert "2 of 2 files are finished and kept" in caught.value.hint
    assert (tmp_path / TRACKER).read_text() == "release"
    (tmp_path / TRACKER).unlink()
    convert(HFSource(hf_model("llama2")), MegatronTarget(tmp_path, MegatronOptions(tp=2)), None, Silent())
    assert (tmp_path / TRACKER).read_text() == "1"


def test_two_conversions_never_write_into_one_place(hf_model: HFModel, tmp_path: Path) -> None:
    """Also where their results have other names: both would write the tracker."""
    other = Staging(tmp_path, "release")
    other.open()
    with pytest.raises(ConversionError, match=f"another conversion is writing to {tmp_path}; wait for it"):
        convert(HFSource(hf_model("llama2")), MegatronTarget(tmp_path, MegatronOptions()), None, Silent())
    assert [path.name for path in tmp_path.iterdir()] == [".release.incomplete"]
    other.leave()
    convert(HFSource(hf_model("llama2")), MegatronTarget(tmp_path, MegatronOptions()), None, Silent())


def test_the_tracker_comes_by_way_of_the_hidden_folder(
    hf_model: HFModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without locks, two runs that write it at once must not write into each other's file."""
    seen: list[Path] = []
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(target).name == TRACKER:
            seen.append(Path(source))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    convert(HFSource(hf_model("llama2")), MegatronTarget(tmp_path, MegatronOptions()), None, Silent())
    assert seen and all(".iter_0000001.incomplete" in path.parts for path in seen)
    assert (tmp_path / TRACKER).read_text() == "1"


def test_a_link_that_was_replaced_can_be_thrown_away(tmp_path: Path) -> None:
    """As an interrupted run with --overwrite leaves it."""
    staging = Staging(tmp_path / "out", "model")
    staging.open()
    (tmp_path / "theirs").mkdir()
    (staging.path / "replaced").symlink_to(tmp_path / "theirs")
    staging.empty()
    assert (tmp_path / "theirs").is_dir()
    assert sorted(path.name for path in staging.path.iterdir()) == ["files", "state"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pipe_among_the_files_is_not_waited_for(hf_model: HFModel, name: str, tmp_path: Path) -> None:
    source = shutil.copytree(hf_model("llama2"), tmp_path / "hf")
    (source / name).unlink()
    os.mkfifo(source / name)
    with pytest.raises(ConversionError, match=f"{name} is not a file"):
        HFSource(source)


def test_a_tracker_with_digits_of_another_kind(hf_model: HFModel, tmp_path: Path) -> None:
    convert(HFSource(hf_model("llama2")), MegatronTarget(tmp_path, MegatronOptions()), None, Silent())
    (tmp_path / TRACKER).write_text("²", encoding="utf-8")
    with pytest.raises(ConversionError, match="it must hold an iteration number or 'release'"):
        open_megatron(tmp_path)

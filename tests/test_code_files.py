"""Python files of a model travel as bytes through every format, and what they would do is never done."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_converters.assets.code_files import code_files
from megatron_converters.basics.errors import ConversionError
from megatron_converters.comparison.manifest_check import check_output
from megatron_converters.conversion.progress import Silent
from megatron_converters.conversion.run import convert as run_conversion
from megatron_converters.families.config_json import missing_code
from megatron_converters.formats.huggingface.source import HFSource
from megatron_converters.formats.megatron.rank_files_target import MegatronTarget
from megatron_converters.formats.megatron.writing import MegatronOptions
from tests.helpers import convert, hf_tensors, refused, same_tensors, succeeded, verb

HFModel = Callable[..., Path]
#: Bytes that are no valid text, and code that ends whoever runs it.
CODE = {
    "modeling_own.py": b"import os\r\nos._exit(3)  # \xff\xfe\n",
    "configuration_own.py": b"raise SystemExit(4)\n",
}
AUTO_MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModel": "modeling_own.OwnModel",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}
FORMATS: dict[str, tuple[tuple[str, ...], str]] = {
    "torch": (("--tp", "2"), "iter_0000001"),
    "torch_dist": (("--tp", "2", "--ckpt-format", "torch_dist"), "iter_0000001"),
    "model_pt": (("--ckpt-format", "model_pt"), "."),
}


@pytest.fixture
def own(hf_model: HFModel, tmp_path: Path) -> Path:
    """A Llama with code of its own, whose config.json says no model_type, as that of MiniCPM4-0.5B."""
    folder = tmp_path / "own"
    shutil.copytree(hf_model("llama2"), folder)
    for name, content in CODE.items():
        (folder / name).write_bytes(content)
    change(folder, auto_map=AUTO_MAP, model_type=None)
    return folder


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def change(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; None removes one."""
    changed = {**config(folder), **changes}
    kept = {key: value for key, value in changed.items() if value is not None or key not in changes}
    (folder / "config.json").write_text(json.dumps(kept))


def code_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.py"))}


@pytest.mark.parametrize("name", FORMATS)
def test_code_and_config_come_back_as_they_were(own: Path, tmp_path: Path, name: str) -> None:
    options, inside = FORMATS[name]
    succeeded(verb("convert", own, tmp_path / "out", *options))
    place = tmp_path / "out" / inside
    assert code_in(place / "hf_files") == CODE
    if name == "model_pt":
        assert json.loads((place / "metadata.json").read_text())["hf_files"] == sorted(CODE)
    assert "modeling_own.py" in succeeded(verb("inspect", tmp_path / "out")).out
    done = succeeded(verb("convert", tmp_path / "out", tmp_path / "back"))
    assert code_in(tmp_path / "back") == CODE
    assert config(tmp_path / "back") == config(own)
    assert "auto_map" not in done.out and "model_type" not in config(own)
    same_tensors(hf_tensors(own), hf_tensors(tmp_path / "back"))
    for folder, file in ((tmp_path / "out", "hf_files/modeling_own.py"), (tmp_path / "back", "modeling_own.py")):
        assert "INTACT" in succeeded(verb("verify", folder)).out
        path = (place if folder.name == "out" else folder) / file
        path.write_bytes(path.read_bytes() + b"#")
        told = refused_check(folder)
        assert f"{file} has changed since it was written" in told


def refused_check(folder: Path) -> str:
    run = verb("verify", folder)
    assert run.code == 1, run
    return run.out


def test_between_checkpoints_and_through_the_queue(own: Path, tmp_path: Path) -> None:
    load, save = ("--load-dir", own), ("--save-dir", tmp_path / "a")
    succeeded(convert("--loader", "llama_mistral", "--saver", "mcore", *load, *save))
    succeeded(verb("convert", tmp_path / "a", tmp_path / "b", "--ckpt-format", "torch_dist", "--pp", "2"))
    succeeded(verb("convert", tmp_path / "b", tmp_path / "c", "--ckpt-format", "model_pt"))
    assert code_in(tmp_path / "c/hf_files") == CODE
    succeeded(convert("--loader", "core", "--saver", "hf", "--load-dir", tmp_path / "c", "--save-dir", tmp_path / "d"))
    assert code_in(tmp_path / "d") == CODE
    assert config(tmp_path / "d") == config(own)
    succeeded(verb("convert", own, tmp_path / "e", "--to", "hf"))
    assert code_in(tmp_path / "e") == CODE and config(tmp_path / "e") == config(own)
    assert not [name for name in sys.modules if name.endswith("_own")]


def test_without_the_code_auto_map_is_left_out(own: Path, tmp_path: Path) -> None:
    (own / "modeling_own.py").unlink()
    succeeded(verb("convert", own, tmp_path / "meg"))
    done = succeeded(verb("convert", tmp_path / "meg", tmp_path / "back"))
    assert (
        "auto_map is left out of config.json: modeling_own.py, which it names, did not come with the model" in done.out
    )
    back = config(tmp_path / "back")
    assert "auto_map" not in back and back["model_type"] == "llama"
    assert {**back, "auto_map": AUTO_MAP} == {**config(own), "model_type": "llama"}
    shutil.rmtree(tmp_path / "meg/iter_0000001/hf_files")
    done = succeeded(verb("convert", tmp_path / "meg", tmp_path / "again"))
    assert "configuration_own.py, modeling_own.py, which it names" in done.out
    assert code_in(tmp_path / "again") == {}


def test_a_reference_gives_its_own_code(own: Path, hf_model: HFModel, tmp_path: Path) -> None:
    succeeded(verb("convert", hf_model("llama2"), tmp_path / "meg"))
    succeeded(verb("convert", tmp_path / "meg", tmp_path / "back", "--hf-config", own))
    assert code_in(tmp_path / "back") == CODE
    assert config(tmp_path / "back") == config(own)


@pytest.mark.parametrize("links", [True, False])
def test_which_files_are_code(tmp_path: Path, links: bool) -> None:
    """Plain files alone. The cache of huggingface_hub consists of links; a checkpoint has none."""
    for name in (
        "modeling_a.py",
        "configuration_a-b.2.py",
        "modeling.py",
        "modeling_a.pyc",
        "tokenization_a.py",
        "setup.py",
    ):
        (tmp_path / name).write_text(name)
    (tmp_path / "modeling_folder.py").mkdir()
    (tmp_path / "modeling_new\nline.py").write_text("")
    (tmp_path / "modeling_\N{LATIN SMALL LETTER E WITH ACUTE}.py").write_text("")
    os.mkfifo(tmp_path / "modeling_pipe.py")
    (tmp_path / "modeling_link.py").symlink_to(tmp_path / "setup.py")
    (tmp_path / "modeling_broken.py").symlink_to(tmp_path / "nowhere")
    expected = {"configuration_a-b.2.py", "modeling_a.py", *(["modeling_link.py"] if links else [])}
    assert code_files(tmp_path, links=links) == {name: tmp_path / name for name in sorted(expected)}
    assert code_files(tmp_path / "nowhere", links=links) == {}
    assert code_files(tmp_path / "setup.py", links=links) == {}


def test_a_link_in_a_checkpoint_is_not_followed(own: Path, tmp_path: Path) -> None:
    succeeded(verb("convert", own, tmp_path / "meg"))
    folder = tmp_path / "meg/iter_0000001/hf_files"
    (tmp_path / "secret").write_text("secret")
    (folder / "modeling_own.py").unlink()
    (folder / "modeling_own.py").symlink_to(tmp_path / "secret")
    succeeded(verb("convert", tmp_path / "meg", tmp_path / "back"))
    assert code_in(tmp_path / "back").keys() == {"configuration_own.py"}
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    succeeded(verb("convert", tmp_path / "meg", tmp_path / "again"))
    assert code_in(tmp_path / "again") == {}


def test_code_that_is_there_is_replaced_only_if_asked_for(own: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "modeling_own.py").write_text("mine")
    command = ("convert", own, out, "--to", "hf")
    refused(verb(*command), "already holds files of a model (modeling_own.py)", "--overwrite")
    assert code_in(out) == {"modeling_own.py": b"mine"}
    succeeded(verb(*command, "--overwrite"))
    assert code_in(out) == CODE


def test_code_that_changes_meanwhile_is_noticed(own: Path, tmp_path: Path) -> None:
    source = HFSource(own)
    (own / "modeling_own.py").write_text("another")
    with pytest.raises(ConversionError, match=r"changed while it was read[\s\S]*modeling_own.py"):
        run_conversion(source, MegatronTarget(tmp_path / "meg", MegatronOptions()), None, Silent())
    assert not (tmp_path / "meg/iter_0000001").exists()


@pytest.mark.parametrize(
    ("auto_map", "missing"),
    [
        ({}, []),
        (None, []),
        ("text", []),
        (AUTO_MAP, ["configuration_own.py", "modeling_own.py"]),
        ({"AutoModel": "somebody/theirs--modeling_own.Model"}, []),
        ({"AutoTokenizer": ["tokenization_own.Slow", None], "AutoConfig": "odd.Config"}, ["odd.py"]),
        ({"AutoModel": ["x"], "AutoConfig": 3}, ["3.py", "['x'].py"]),
    ],
    ids=str,
)
def test_code_that_a_config_names(auto_map: Any, missing: list[str]) -> None:
    assert missing_code({"auto_map": auto_map}, ()) == missing
    assert missing_code({"auto_map": auto_map}, missing) == []


def test_the_manifest_lists_it(own: Path, tmp_path: Path) -> None:
    succeeded(verb("convert", own, tmp_path / "out", "--ckpt-format", "model_pt"))
    (tmp_path / "out/hf_files/modeling_own.py").unlink()
    faults = [str(fault) for fault in check_output(tmp_path / "out", Silent()).faults]
    assert faults == ["hf_files/modeling_own.py is missing"]

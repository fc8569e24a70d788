"""`--ignore-tensors`: what is no part of the model is refused, and left out by name alone, of every format and by every command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megatron_converters.bridge import AutoBridge
from megatron_converters.cli.options.reading import add_checkpoint_arguments, add_core_loader_arguments, open_hf_source
from megatron_converters.cli.options.values import patterns
from megatron_converters.conversion.left_out import LeftOut
from model_converter_tool.api import ModelConverterAPI
from tests.conversions import hf_to_megatron, hf_to_torch_dist
from tests.helpers import (
    convert_back,
    edit_rank,
    hf_tensors,
    nothing_complete,
    rank_content,
    refused,
    same_tensors,
    succeeded,
    tp_pp_converter,
    verb,
)
from tests.test_meta_source import write as write_meta

HFModel = Callable[..., Path]
VALUE_HEAD = {"v_head.summary.weight": torch.zeros(1, 64), "v_head.summary.bias": torch.zeros(1)}
IGNORE = ("--ignore-tensors", "v_head.*")
SMALL: dict[str, Any] = dict(num_hidden_layers=2)


@pytest.fixture(scope="module")
def plain(hf_model: HFModel) -> Path:
    return hf_model("llama2", **SMALL)


@pytest.fixture(scope="module")
def odd(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model with the value head that TRL saves beside it."""
    folder = tmp_path_factory.mktemp("value") / "head"
    shutil.copytree(plain, folder)
    save_file({**hf_tensors(plain), **VALUE_HEAD}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ("convert", "{odd}", "{out}"),
        ("plan", "{odd}", "{out}", "--no-measure"),
        ("verify", "{odd}", "{plain}"),
        ("diff", "{plain}", "{odd}"),
        ("inspect", "{odd}"),
        ("args", "{odd}"),
    ],
    ids=lambda command: command[0],
)
def test_every_verb_refuses_it_and_has_the_option(
    command: tuple[str, ...], plain: Path, odd: Path, tmp_path: Path
) -> None:
    options = [word.format(odd=odd, plain=plain, out=tmp_path / "out") for word in command]
    words = ("v_head.summary.bias is not a tensor of the llama family", "--ignore-tensors PATTERN")
    run = refused(verb(*options), *words, code=2 if command[0] in ("verify", "diff") else 1)
    assert "v_head.summary.weight" in run.err
    nothing_complete(tmp_path)
    run = succeeded(verb(*options, *IGNORE))
    if command[0] in ("convert", "plan", "verify", "diff", "inspect"):
        assert "v_head.summary.bias" in run.out
        assert "--ignore-tensors" in run.out


def test_what_is_left_out_is_in_the_manifest(plain: Path, odd: Path, tmp_path: Path) -> None:
    run = succeeded(verb("convert", odd, tmp_path / "out", "--to", "hf", *IGNORE))
    listed = "2 tensors left out, as --ignore-tensors says: v_head.summary.bias, v_head.summary.weight"
    assert listed in run.out
    same_tensors(hf_tensors(tmp_path / "out"), hf_tensors(plain))
    manifest = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert manifest["ignored"] == [f"{name} (--ignore-tensors)" for name in sorted(VALUE_HEAD)]
    assert listed in manifest["notes"]


def test_patterns_that_the_model_needs_or_nobody_has(plain: Path, odd: Path, tmp_path: Path) -> None:
    run = verb("convert", odd, tmp_path / "out", "--ignore-tensors", "v_head.*,model.norm.*")
    refused(run, "model.norm.weight (final_norm) is missing", "3 tensors left out, as --ignore-tensors says")
    nothing_complete(tmp_path)
    note = "--ignore-tensors q_head.*: no tensor here has such a name"
    assert note in succeeded(verb("plan", plain, tmp_path / "out", "--no-measure", "--ignore-tensors", "q_head.*")).out
    refused(
        verb("plan", odd, tmp_path / "out", "--ignore-tensors", "q_head.*"), "v_head.summary.weight is not a tensor"
    )


def test_several_patterns() -> None:
    assert patterns(["a.*,b", "c"]) == ("a.*", "b", "c")
    assert patterns(None) == ()
    assert LeftOut("a.*").kept({"a.x": 1, "b": 2}) == {"b": 2}  # one pattern, not one for each character
    left_out = LeftOut(("a.*", "?"))
    assert left_out.kept(dict.fromkeys(["a.x", "b", "A.x", "cc"])) == {"A.x": None, "cc": None}
    assert left_out.ignored == ["a.x (--ignore-tensors)", "b (--ignore-tensors)"]


def test_a_tied_head_that_is_left_out_is_not_compared(hf_model: HFModel, tmp_path: Path) -> None:
    source = hf_model("qwen2-tied", **SMALL)
    other = shutil.copytree(source, tmp_path / "other")
    head = {"lm_head.weight": torch.ones_like(hf_tensors(source)["model.embed_tokens.weight"])}
    save_file({**hf_tensors(source), **head}, other / "model.safetensors", {"format": "pt"})
    refused(verb("convert", other, tmp_path / "out", "--to", "hf"), "lm_head.weight", "--untie")
    succeeded(verb("convert", other, tmp_path / "out", "--to", "hf", "--ignore-tensors", "lm_head.weight"))
    same_tensors(hf_tensors(tmp_path / "out"), hf_tensors(source))


# --- other formats and scripts


def _rank_files(source: Path, folder: Path) -> Path:
    hf_to_megatron(source, folder, tp=2)
    for rank in ("mp_rank_00", "mp_rank_01"):
        model = rank_content(folder, rank)["model"]
        edit_rank(folder, rank, model={**model, **VALUE_HEAD})
    return folder


def _torch_dist(source: Path, folder: Path) -> Path:
    """Checkpoint with further tensors, saved again by torch itself."""
    hf_to_torch_dist(source, folder)
    directory = folder / "iter_0000001"
    dcp_to_torch_save(directory, folder / "whole.pt")
    state = torch.load(folder / "whole.pt", weights_only=False)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    (directory / ".metadata").unlink()
    torch_dcp.save({**tensors, **VALUE_HEAD}, checkpoint_id=directory, no_dist=True)
    return folder


def _meta(source: Path, folder: Path) -> Path:
    write_meta(source, folder, 1, 0, n_layers=2)
    path = folder / "consolidated.00.pth"
    torch.save({**torch.load(path), **VALUE_HEAD}, path)
    return folder


def _mindspore(source: Path, folder: Path) -> Path:
    succeeded(verb("convert", source, folder, "--to", "mindspore"))
    (path,) = folder.glob("*.safetensors")
    save_file({**hf_tensors(folder), **VALUE_HEAD}, path, {"format": "ms"})
    names = json.loads((folder / "param_name_map.json").read_text())
    names["weight_map"] |= dict.fromkeys(VALUE_HEAD, path.name)
    (folder / "param_name_map.json").write_text(json.dumps(names))
    return folder


@pytest.mark.parametrize("make", [_rank_files, _torch_dist, _meta, _mindspore])
def test_every_format_has_the_option(make: Callable[[Path, Path], Path], plain: Path, tmp_path: Path) -> None:
    source = make(plain, tmp_path / "source")
    refused(verb("convert", source, tmp_path / "out", "--to", "hf"), "v_head.summary.weight is not a tensor of")
    run = succeeded(verb("convert", source, tmp_path / "out", "--to", "hf", *IGNORE))
    assert "2 tensors left out, as --ignore-tensors says" in run.out
    same_tensors(hf_tensors(tmp_path / "out"), hf_tensors(plain))


def test_scripts_that_read_checkpoints_have_the_option(plain: Path, tmp_path: Path) -> None:
    source = _rank_files(plain, tmp_path / "source")
    back = ("--load-path", source, "--save-path", tmp_path / "script")
    refused(convert_back(*back), "v_head.summary.weight is not a tensor")
    succeeded(convert_back(*back, *IGNORE))
    direct = ("--in_dir", source, "--save_path", tmp_path / "out.pt")
    refused(tp_pp_converter(*direct), "v_head.summary.weight is not a tensor")
    succeeded(tp_pp_converter(*direct, "--ignore_tensors", "v_head.*"))
    for found in (hf_tensors(tmp_path / "script"), torch.load(tmp_path / "out.pt")):
        same_tensors(found, hf_tensors(plain))


def test_loaders_have_the_option(odd: Path) -> None:
    import argparse

    from megatron_converters.cli.plugins import add_hf_loader_arguments

    parser = argparse.ArgumentParser()
    add_hf_loader_arguments(parser, "loader")
    args = parser.parse_args(list(IGNORE))
    args.load_dir = odd
    assert len(open_hf_source(args).origin.ignored) == 2
    for declare in (add_checkpoint_arguments, add_core_loader_arguments):
        parser = argparse.ArgumentParser()
        declare(parser)
        assert parser.parse_args(list(IGNORE)).ignore_tensors == ["v_head.*"]


def test_a_bridge_has_the_option(odd: Path) -> None:
    with pytest.raises(ValueError, match=r"v_head\.summary\.weight is not a tensor"):
        AutoBridge.from_hf_pretrained(odd)
    bridge = AutoBridge.from_hf_pretrained(odd, ignore_tensors=["v_head.*"])
    assert len(bridge.hf_pretrained.source().origin.ignored) == 2


def test_modelconvert_has_the_option(odd: Path, tmp_path: Path) -> None:
    api = ModelConverterAPI(tmp_path / "workspace")
    call = dict(model_path=odd, output_format="hf2megatron", output_path=tmp_path / "out")
    assert "v_head.summary.weight is not a tensor" in str(api.convert_model(**call).error)
    for given in ("v_head.*,x", ["v_head.*"]):
        result = api.convert_model(**call, ignore_tensors=given, overwrite=True)
        assert result, result.error
        assert "2 tensors left out" in " ".join(result.extra_info["notes"])
    assert "ignore_tensors: 3 is neither" in str(api.convert_model(**call, ignore_tensors=3).error)

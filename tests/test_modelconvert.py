"""`modelconvert` and its Python API: what is written, what is refused, and what is remembered."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import megatron_converters.api as mc
from megatron_converters.basics.errors import Interrupted
from model_converter_tool import history
from model_converter_tool.api import ModelConverterAPI
from model_converter_tool.workspace import workspace
from tests.conversions import different
from tests.helpers import ROOT, Run, edit_rank, hf_tensors, nothing_complete, rank_content, same_tensors, succeeded
from tests.modelconvert import minicpm, process, run

HFModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder that commands are run in, with the workspace in it."""
    monkeypatch.setenv("MODELCONVERT_HOME", str(tmp_path / "workspace"))
    monkeypatch.delenv("MODELCONVERT_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def api() -> ModelConverterAPI:
    return ModelConverterAPI()


def failed(done: Run, *words: str, code: int = 1) -> Run:
    assert done.code == code and "Traceback" not in done.err, done
    missing = [word for word in words if word not in done.err]
    assert not missing, (missing, done.err)
    return done


def test_there_and_back(hf_model: HFModel, place: Path) -> None:
    source = shutil.copytree(hf_model("llama3.1"), place / "models/llama")
    Tokenizer(WordLevel({"<s>": 0, "a": 1}, "<s>")).save(str(source / "tokenizer.json"))
    done = succeeded(run("convert", "models/llama", "hf2megatron", "--model-type", "llama"))
    assert done.out.startswith("[Output directory used]: ./outputs/llama_hf2megatron\n")
    assert done.out.endswith("Conversion succeeded! Output: ./outputs/llama_hf2megatron\n")
    state = torch.load(place / "outputs/llama_hf2megatron/model.pt", weights_only=True)
    ours = hf_tensors(source)
    layer = "model.layers.1.self_attn."
    q, k, v = (ours[f"{layer}{part}_proj.weight"].view(4, -1, 64) for part in "qkv")
    qkv = torch.cat([q, k, v], 1).reshape(-1, 64)  # query groups, each with its queries, key and value
    assert torch.equal(state["decoder.layers.1.self_attention.linear_qkv.weight"], qkv)
    assert torch.equal(state["decoder.layers.1.input_layernorm.weight"], ours["model.layers.1.input_layernorm.weight"])
    assert torch.equal(state["embedding.word_embeddings.weight"][:199], ours["model.embed_tokens.weight"])
    assert json.loads((place / "outputs/llama_hf2megatron/metadata.json").read_text())["num_layers"] == 4

    succeeded(run("convert", "outputs/llama_hf2megatron", "hf", "--model-type", "llama"))
    back = place / "outputs/llama_hf2megatron_huggingface"
    same_tensors(ours, hf_tensors(back))
    assert (back / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    names = {"config.json", "model.safetensors", "generation_config.json"}
    assert names <= {path.name for path in back.iterdir()}
    again = succeeded(run("convert", "outputs/llama_hf2megatron", "hf", "--model-type", "llama"))
    assert "is complete already" in again.out
    failed(
        run("convert", "outputs/llama_hf2megatron", "hf", "--dtype", "bf16"),
        "Conversion failed: ",
        "already holds a model",
    )
    succeeded(run("convert", "outputs/llama_hf2megatron", "hf", "--dtype", "bf16", "--overwrite"))
    same_tensors({name: tensor.bfloat16() for name, tensor in ours.items()}, hf_tensors(back))


def test_with_sizes_the_ranks_are_written(hf_model: HFModel, place: Path) -> None:
    options = ("--tp", 2, "--pp", 2, "--model-type", "llama", "--tokenizer-model", "some/tokenizer", "-o", "out")
    succeeded(run("convert", hf_model("mistral"), "hf2megatron", *options))
    content = rank_content(place / "out", "mp_rank_01_001")
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in content["model"]
    assert content["args"].tokenizer_model == "some/tokenizer"
    succeeded(
        run("convert", hf_model("mistral"), "hf2megatron", "--tp", 1, "--transformer-impl", "local", "-o", "local")
    )
    assert "decoder.layers.0.pre_mlp_layernorm.weight" in rank_content(place / "local")["model"]
    succeeded(run("convert", "out", "megatron2hf", "--max-shard-size", "100KB"))
    same_tensors(hf_tensors(hf_model("mistral")), hf_tensors(place / "outputs/out_megatron2hf"))
    assert len(list((place / "outputs/out_megatron2hf").glob("model-*"))) > 2
    succeeded(run("convert", "out/iter_0000001", "hf2megatron"))
    assert (place / "outputs/iter_0000001_hf2megatron/model.pt").is_file()


def test_transformer_engines_names(hf_model: HFModel, place: Path) -> None:
    succeeded(
        run("convert", hf_model("llama2"), "hf2megatron", "--transformer-impl", "transformer_engine", "-o", "out")
    )
    state = torch.load(place / "out/model.pt", weights_only=True)
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in state


def test_what_megatron_cannot_say_is_a_warning(hf_model: HFModel, place: Path) -> None:
    done = succeeded(run("convert", hf_model("opt"), "hf2megatron"))
    assert "warning: Megatron-LM will not compute" in done.err


#: Arguments after the model, exit code, and words of the message.
REFUSED: dict[str, tuple[tuple[Any, ...], int, tuple[str, ...]]] = {
    "another model": (
        ("hf2megatron", "--model-type", "mistral"),
        1,
        ("Model type not supported: ", "holds a llama model", "stands for mistral; pass --model-type llama"),
    ),
    "no model type": (
        ("hf2megatron", "--model-type", "bert"),
        2,
        ("Model type not supported: 'bert'", "auto, minicpm, llama"),
    ),
    "gguf": (("gguf",), 2, ("the format gguf is not written here", "llama.cpp")),
    "no format": (("hf3",), 2, ("there is no format 'hf3'", "hf2megatron, megatron2hf, hf")),
    "the wrong way": (
        ("megatron2hf",),
        1,
        ("Format detection failed: ", "is of the format huggingface, and megatron2hf reads megatron"),
    ),
    "sizes of a folder": (("hf", "--tp", 2), 2, ("tp: not heeded where hf is written",)),
    "a family for a checkpoint": (("hf2megatron", "--as", "llama"), 2, ("as_family: not heeded",)),
    "quantisation": (("hf", "--quant", "gptq-4bit"), 2, ("quantization (--quant): quantised formats are not written",)),
    "random weights": (("hf", "--fake-weight"), 2, ("fake_weight (--fake-weight): weights are moved here",)),
    "two scalings": (
        ("hf2megatron", "--mup2llama", "--mup", "flags"),
        2,
        ("mup2llama means mup fold, and mup is flags",),
    ),
    "multipliers of a folder": (("hf", "--mup", "raw"), 2, ("mup: neither",)),
    "a reference of a folder": (("hf2megatron", "--hf-config", "x"), 2, ("--hf-config is for reading a Megatron-LM",)),
    "sizes that do not fit": (("hf2megatron", "--tp", 3), 1, ("cannot be cut over tp=3",)),
    "no size": (("hf", "--max-shard-size", "big"), 2, ("--max-shard-size: 'big' is no size such as 5GB",)),
    "no number": (("hf2megatron", "--tp", 0), 2, ("--tp: '0' is no whole number from 1 on",)),
    "no dtype": (("hf", "--dtype", "int8"), 2, ("--dtype: 'int8' is not one of bf16, fp16, fp32",)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what: str, hf_model: HFModel, place: Path) -> None:
    options, code, words = REFUSED[what]
    failed(run("convert", hf_model("llama2"), *options, "-o", "out"), *words, code=code)
    assert not (place / "out").exists()


def test_a_checkpoint_that_is_no_minicpm(hf_model: HFModel) -> None:
    succeeded(run("convert", hf_model("llama2"), "hf2megatron", "-o", "llama"))
    done = failed(
        run("convert", "llama", "hf", "--model-type", "minicpm"), "Model type not supported: llama holds a llama"
    )
    assert "stands for minicpm, minicpm3; pass --model-type llama" in done.err


def test_multipliers_that_the_checkpoint_does_not_say(place: Path) -> None:
    source = minicpm(place / "minicpm")
    succeeded(run("convert", source, "hf2megatron", "--tp", 2, "--mup", "raw", "-o", "out"))
    for rank in ("mp_rank_00", "mp_rank_01"):
        args = vars(rank_content(place / "out", rank)["args"])
        kept = {name: value for name, value in args.items() if name != "scale_emb"}
        edit_rank(place / "out", rank, args=Namespace(**kept))
    failed(run("convert", "out", "hf"), "Conversion failed: ", "say it with --mup: flags")
    done = succeeded(run("convert", "out", "hf", "--model-type", "minicpm", "-o", "raw"))
    assert "warning: the checkpoint does not say where its multipliers are; they are taken for raw" in done.err
    same_tensors(hf_tensors(source), hf_tensors(place / "raw"))
    assert "minicpm" in succeeded(run("inspect", "out")).out
    (place / "out/iter_0000001/conversion.json").unlink()
    succeeded(run("check", "out"))
    succeeded(run("convert", "out", "hf", "--mup", "fold", "-o", "folded"))
    assert different(hf_tensors(source), hf_tensors(place / "folded"))


def test_a_minicpm_as_a_llama(place: Path) -> None:
    source = minicpm(place / "minicpm")
    succeeded(run("convert", source, "hf", "--as", "llama", "-o", "llama"))
    succeeded(run("convert", source, "hf", "--mup2llama", "-o", "too"))
    assert json.loads((place / "llama/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    same_tensors(hf_tensors(place / "llama"), hf_tensors(place / "too"))
    succeeded(run("convert", source, "hf2megatron", "--mup2llama", "-o", "a"))
    succeeded(run("convert", source, "hf2megatron", "--mup", "fold", "-o", "b"))
    assert (place / "a/model.pt").read_bytes() == (place / "b/model.pt").read_bytes()


def test_folders_of_no_known_format(place: Path, hf_model: HFModel) -> None:
    (place / "empty").mkdir()
    failed(
        run("convert", "empty", "hf"),
        "Conversion failed: Format detection failed: empty is of no known format",
        "It has no files",
    )
    (place / "empty/model.onnx").touch()
    failed(run("convert", "empty", "hf"), "Format detection failed: ", "It has model.onnx")
    failed(run("convert", "empty/model.onnx", "hf"), "Format detection failed: empty/model.onnx is a file")
    failed(run("convert", "./absent", "hf"), "./absent is no folder here")
    both = shutil.copytree(hf_model("llama2"), place / "both")
    (both / "model.pt").touch()
    failed(run("convert", "both", "hf"), "could be hf or megatron; say which with --from")
    succeeded(run("convert", "both", "hf", "--from", "hf"))


def test_an_architecture_that_nobody_knows(place: Path, hf_model: HFModel) -> None:
    folder = shutil.copytree(hf_model("llama2"), place / "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"], "model_type": "bert"}))
    failed(run("convert", "bert", "hf2megatron"), "Model type not supported: bert: config.json names BertModel")


def test_damage_leaves_nothing(place: Path, hf_model: HFModel) -> None:
    folder = shutil.copytree(hf_model("llama2"), place / "cut")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    failed(run("convert", "cut", "hf2megatron"), "Conversion failed: ", "model.safetensors")
    succeeded(run("convert", hf_model("llama2"), "hf2megatron", "-o", "flat"))
    with open(place / "flat/model.pt", "r+b") as file:
        file.truncate(1000)
    failed(run("convert", "flat", "hf", "-o", "back"), "Conversion failed: ", "model.pt")
    nothing_complete(place / "outputs")
    assert not (place / "back").exists()


def test_the_device_is_accepted(hf_model: HFModel) -> None:
    done = succeeded(run("convert", hf_model("llama2"), "hf", "--device", "cuda", "-o", "out"))
    assert "conversions run on the CPU, also with the device cuda" in done.out


def test_memory_that_runs_out(hf_model: HFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(*args: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(mc, "convert", convert)
    failed(run("convert", hf_model("llama2"), "hf"), "Conversion failed: Memory error: ", str(hf_model("llama2")))


def test_debug_output(hf_model: HFModel, place: Path) -> None:
    environment = {"MODELCONVERT_DEBUG": "1", "MODELCONVERT_HOME": str(place)}
    done = process("convert", hf_model("llama2"), "hf", cwd=place, env=environment)
    assert done.code == 0 and "is of the format huggingface" in done.err and "planned 1 files" in done.err
    done = process("convert", hf_model("llama2"), "hf2megatron", "--model-type", "mistral", cwd=place, env=environment)
    assert (
        done.code == 1
        and "Traceback" in done.err
        and done.err.splitlines()[-1].startswith("Conversion failed: Model type")
    )


def test_looking(hf_model: HFModel, place: Path) -> None:
    succeeded(run("convert", hf_model("llama2"), "hf2megatron", "-o", "out"))
    assert "Megatron-LM, llama" in succeeded(run("inspect", "out")).out
    assert json.loads(succeeded(run("inspect", "out", "--json")).out)["model"]["num_layers"] == 4
    assert "OK: out: megatron, llama" in succeeded(run("check", "out", "-f", "megatron")).out
    assert "parameters: " in succeeded(run("check", "out", "-v")).out
    assert "no manifest" in succeeded(run("check", hf_model("llama2"))).out
    failed(run("check", "out", "-f", "hf"), "FAILED: Format detection failed: out is of the format megatron, not hf")
    data = bytearray((place / "out/model.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (place / "out/model.pt").write_bytes(data)
    failed(run("check", "out"), "FAILED: model.pt: ", "CRC-32")
    assert json.loads(run("check", "out", "--json").out)["success"] is False
    failed(run("inspect", "absent/"), "error: absent/ is no folder here")


def test_history(hf_model: HFModel, place: Path) -> None:
    assert "no conversions are recorded" in run("history").out
    run("convert", hf_model("llama2"), "hf", "-o", "out")
    run("convert", hf_model("llama2"), "hf2megatron", "--model-type", "mistral")
    done, refused = json.loads(succeeded(run("history", "--json")).out)
    assert (done["input"], done["output"], done["format"]) == (str(hf_model("llama2")), "out", "hf")
    assert done["success"] and done["error"] is None and done["seconds"] > 0 and done["time"].startswith("20")
    assert not refused["success"] and "Model type not supported" in refused["error"]
    assert "FAILED: Model type" in run("history").out
    assert json.loads(run("history", "--json", "--workspace", place / "elsewhere").out) == []
    succeeded(run("history", "--clear"))
    assert json.loads(run("history", "--json").out) == []


def test_an_interruption_is_recorded(hf_model: HFModel, api: ModelConverterAPI) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        api.convert_model(hf_model("llama2"), "hf", "out", progress=interrupt)
    (entry,) = api.get_history()
    assert not entry["success"] and entry["error"] == "interrupted before the end"


def test_a_history_that_cannot_be_written_fails_nothing(hf_model: HFModel, place: Path) -> None:
    (place / "file").touch()
    done = succeeded(run("convert", hf_model("llama2"), "hf", "--workspace", place / "file"))
    assert "warning: the history lacks this conversion" in done.err


def _append_many(folder: Path, writer: int) -> None:
    for number in range(200):
        assert history.append(folder, {"writer": writer, "number": number, "error": "x" * 500}) is None


def test_several_processes_append_to_the_history(place: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.starmap(_append_many, [(place, writer) for writer in range(4)])
    with open(place / history.FILE, "a") as file:
        file.write('{"writer": 9')  # as a full disk leaves it
    found = history.entries(place)
    assert sorted((entry["writer"], entry["number"]) for entry in found) == [
        (w, n) for w in range(4) for n in range(200)
    ]


def test_settings(hf_model: HFModel, place: Path) -> None:
    assert "output_dir = ./outputs" in succeeded(run("config", "show")).out
    for name, value in (
        ("output_dir", place / "elsewhere"),
        ("dtype", "bf16"),
        ("max_workers", 3),
        ("model_type", "mistral"),
    ):
        succeeded(run("config", "set", name, value))
        assert succeeded(run("config", "get", name)).out == f"{value}\n"
    failed(run("convert", hf_model("llama2"), "hf"), "the model type mistral stands for mistral")
    source = hf_model("mistral")
    succeeded(run("convert", source, "hf"))
    (out,) = (place / "elsewhere").iterdir()
    assert out.name == "mistral_huggingface"
    assert {tensor.dtype for tensor in hf_tensors(out).values()} == {torch.bfloat16}
    succeeded(run("convert", source, "hf", "--dtype", "fp32", "-o", "wide"))
    same_tensors(hf_tensors(source), hf_tensors(place / "wide"))
    assert "parallel: max_workers = 4" in succeeded(run("config", "list-presets")).out
    succeeded(run("config", "set", "preset", "default"))
    assert run("config", "get", "dtype").out == "source\n"
    for wrong, words in {
        ("get", "colour"): "there is no setting 'colour'; known are output_dir",
        ("set", "max_workers", "0"): "max_workers: '0' is no whole number from 1 on",
        ("set", "preset", "x"): "there is no preset 'x'",
        ("set", "dtype"): "config set takes 2 operands, not 1",
        ("reset",): "'reset' is not one of show, get, set",
    }.items():
        failed(run("config", *wrong), words, code=2)
    (place / "workspace/config.json").write_text('{"colour": 1}')
    failed(run("convert", source, "hf"), "config.json: there is no setting 'colour'", code=2)


def test_the_workspace(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert workspace() == place / "workspace" and workspace(place / "given") == place / "given"
    monkeypatch.delenv("MODELCONVERT_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert workspace() == Path("/data/modelconvert")
    monkeypatch.setenv("HOME", "/home/me")
    for relative in ("", "data"):  # which the XDG base directories say to ignore
        monkeypatch.setenv("XDG_DATA_HOME", relative)
        assert workspace() == Path("/home/me/.local/share/modelconvert")


def test_the_api_returns_what_happened(hf_model: HFModel, place: Path, api: ModelConverterAPI) -> None:
    source = hf_model("llama2")
    result = api.convert_model(
        model_path=source, model_name=str(source), output_format="hf2megatron", output_path="out", tp=2
    )
    assert result and result.success and result.error is None and result.output_path == "out"
    assert "--use-checkpoint-args" in result.extra_info["flags"] and Path(result.extra_info["manifest"]).is_file()
    assert result.validation is not None and result.validation["valid"]
    sizes = {
        str(path.relative_to(place / "out/iter_0000001")): path.stat().st_size
        for path in place.glob("out/*/mp_rank*/*")
    }
    assert result.validation["files"] == sizes
    back = api.convert_model("out", "hf", "back", model_type="llama", progress=lambda done, total: None)
    assert back.success and mc.verify(source, "back").equal
    refused = api.convert_model(model_path="out", model_name="back", output_format="hf")
    assert (
        not refused
        and refused.error == "model_path is out, and model_name, which means the same, is back; give one of them"
    )
    refused = api.convert_model("absent/", "hf")
    assert not refused.success and refused.error is not None and "absent/ is no folder here" in refused.error
    assert [entry["success"] for entry in api.get_history()] == [True, True, False]


def test_calls_that_are_wrong_raise(api: ModelConverterAPI) -> None:
    with pytest.raises(TypeError, match=r"convert_model\(\) got an unexpected keyword argument 'tpp'"):
        api.convert_model("x", "hf", tpp=2)
    with pytest.raises(TypeError, match="missing 1 required argument: 'model_path'"):
        api.convert_model(output_format="hf")
    with pytest.raises(TypeError, match="missing 1 required argument: 'output_format'"):
        api.validate_conversion("x")
    with pytest.raises(mc.UsageError, match="there is no action 'forget'"):
        api.manage_config("forget")
    with pytest.raises(mc.UsageError, match="set needs the name of a setting"):
        api.manage_config("set")


def test_the_arguments_of_the_original(hf_model: HFModel, api: ModelConverterAPI) -> None:
    unused = dict(
        fake_weight=False, quantization=None, use_large_calibration=False, mup2llama=False, fake_weight_shape_dict=None
    )
    assert api.convert_model(hf_model("llama2"), "hf", "out", device="cpu", **unused)
    refused = api.convert_model(hf_model("llama2"), "hf", "other", quantization="gptq-4bit")
    assert refused.error is not None and "quantised formats are not written" in refused.error


def test_validation(hf_model: HFModel, place: Path, api: ModelConverterAPI) -> None:
    plan = api.validate_conversion(hf_model("llama2"), "hf2megatron", "out", dtype="bf16")
    assert (
        plan["valid"]
        and plan["source_format"] == "huggingface"
        and plan["family"] == "llama"
        and not (place / "out").exists()
    )
    assert plan["bytes"] == sum(plan["files"].values()) == plan["bytes_left"]
    assert api.validate_conversion("./absent", "hf")["problems"] == [
        "./absent is no folder here, and no name of a model on the Hub (owner/name); correct it"
    ]
    assert not api.validate_conversion(hf_model("llama2"), "gguf")["valid"]
    api.convert_model(hf_model("llama2"), "hf", "taken")
    taken = api.validate_conversion(hf_model("qwen2"), "hf", "taken")
    assert not taken["valid"] and "already holds a model" in taken["problems"][0]


def test_what_is_known(hf_model: HFModel, api: ModelConverterAPI, place: Path) -> None:
    found = api.detect_model(hf_model("mistral"))
    assert (found["format"], found["family"], found["hub"]) == ("huggingface", "mistral", False)
    assert api.detect_model("owner/name")["hub"]
    assert (
        api.detect_model(place)["format"] == "unknown" and "Format detection failed" in api.detect_model(place)["error"]
    )
    supported = api.list_supported()
    assert {"hf", "hf2megatron", "megatron2hf"} <= supported["output_formats"].keys()
    assert {"auto", "minicpm", "llama", "mistral", "qwen3_moe"} <= set(supported["model_types"])
    assert "gguf" in supported["not_written"] and "not_written" not in api.list_supported(full=False)
    assert api.manage_config() == api.manage_config("show") and "default" in api.manage_config("list_presets")


KILLED = """
import os, sys
from model_converter_tool.api import ModelConverterAPI
def stop(done, total):
    if done > total * 0.9: os.kill(os.getpid(), 9)
ModelConverterAPI().convert_model(sys.argv[1], "hf2megatron", "out", tp=4, pp=4, progress=stop)
"""


def test_a_killed_conversion_goes_on(hf_model: HFModel, place: Path, api: ModelConverterAPI) -> None:
    command = [sys.executable, "-c", KILLED, str(hf_model("llama2"))]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, timeout=60).returncode == -9
    result = api.convert_model(hf_model("llama2"), "hf2megatron", "out", tp=4, pp=4)
    assert result.success and any("went on from an interrupted run" in note for note in result.extra_info["notes"])
    assert mc.verify(hf_model("llama2"), "out").equal


def test_files_are_short_and_the_library_does_not_know_the_tool() -> None:
    for path in (ROOT / "model_converter_tool").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
    assert not [
        path for path in (ROOT / "megatron_converters").rglob("*.py") if "model_converter_tool" in path.read_text()
    ]

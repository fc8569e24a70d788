"""Every way to fail: one sentence that names the place, the right exit code, and nothing behind that looks complete."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_converters.basics.errors import ConversionError
from megatron_converters.basics.json_files import read_json
from megatron_converters.families.config_json import spec_from_config
from megatron_converters.formats.huggingface.source import HFSource
from tests.helpers import (
    CONVERT,
    RANK_FILE,
    TRACKER,
    Run,
    args_of,
    convert,
    convert_back,
    edit_config,
    edit_rank,
    hf_tensors,
    nothing_complete,
    rank_content,
    refused,
    same_tensors,
    small_disk,
    succeeded,
    verb,
)

HFModel = Callable[..., Path]
MegatronModel = Callable[..., tuple[Path, Path]]


@pytest.fixture
def hf(hf_model: HFModel, tmp_path: Path) -> Path:
    """A Llama of one file, to be damaged."""
    return shutil.copytree(hf_model("llama2"), tmp_path / "hf")


@pytest.fixture
def sharded(hf_model: HFModel, tmp_path: Path) -> Path:
    """A Llama of several files, to be damaged."""
    return shutil.copytree(hf_model("llama2", max_shard_size="150KB"), tmp_path / "hf")


@pytest.fixture
def meg(megatron_model: MegatronModel, tmp_path: Path) -> Path:
    """A checkpoint of TP 2 and PP 2, to be damaged."""
    return shutil.copytree(megatron_model("llama2")[1], tmp_path / "meg")


def _nested(depth: int) -> list[Any]:
    return [_nested(depth - 1)] if depth else []


def forward(source: Path, *options: Any, **more: Any) -> Run:
    """Convert to a folder beside the source; whatever fails must leave nothing there."""
    target = source.parent / "out"
    run = convert("--load-dir", source, "--save-dir", target, *options, **more)
    if run.code:
        nothing_complete(target)
    return run


def back(source: Path, *options: Any) -> Run:
    """Convert back to a folder beside the source; whatever fails must leave nothing there."""
    target = source.parent / "out"
    run = convert_back("--load-path", source, "--save-path", target, *options)
    if run.code:
        nothing_complete(target)
    return run


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def edit_model(meg: Path, rank: str, change: Callable[[dict[str, Any]], object]) -> None:
    model = rank_content(meg, rank)["model"]
    change(model)
    edit_rank(meg, rank, model=model)


def edit_args(meg: Path, **changes: Any) -> None:
    for path in meg.rglob(RANK_FILE):
        args = rank_content(meg, path.parent.name)["args"]
        edit_rank(meg, path.parent.name, args=Namespace(**{**vars(args), **changes}))


def truncate(path: Path, keep: float = 0.5) -> None:
    os.truncate(path, int(path.stat().st_size * keep))


# --- tensors of a Hugging Face folder


def test_all_faults_of_the_tensors_are_listed_at_once(hf: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(112, 64)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        tensors["model.layers.2.self_attn.k_proj.weight"] = torch.zeros(64, 64)
        tensors["model.layers.3.input_layernorm.weight"] = torch.zeros(64, 1)

    edit_tensors(hf, damage)
    refused(
        forward(hf),
        "model.layers.1.mlp.up_proj.weight (layer 1 fc1) is missing",
        "model.norm.weight (final_norm) is missing",
        "model.layers.9.mlp.up_proj.weight is not a tensor",
        "model.layers.0.self_attn.q_proj.bias is not a tensor",
        "model.layers.2.self_attn.k_proj.weight (layer 2 qkv) has shape [64, 64]; config.json requires [32, 64]",
        "model.layers.3.input_layernorm.weight (layer 3 input_norm) has shape [64, 1]",
    )


def test_a_fault_of_every_tensor_is_still_a_readable_message(hf: Path) -> None:
    edit_config(hf, hidden_size=72)
    run = refused(forward(hf), "model.norm.weight (final_norm) has shape [64]; config.json requires [72]")
    assert len(run.err.splitlines()) < 60


def test_a_dtype_that_no_model_has(hf: Path) -> None:
    edit_tensors(hf, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.complex64)}))
    refused(forward(hf), "model.norm.weight", "C64")


def test_parts_of_different_dtypes(hf: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    edit_tensors(hf, lambda tensors: tensors.update({name: tensors[name].half()}))
    refused(forward(hf), "layer 0 qkv", "float16", "float32")


@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_a_truncated_file(weights: str, keep: float, hf_model: HFModel, tmp_path: Path) -> None:
    source = shutil.copytree(hf_model("llama2", weights=weights), tmp_path / "hf")
    (path,) = (*source.glob("*.safetensors"), *source.glob("*.bin"))
    truncate(path, keep)
    refused(forward(source), path.name)


@pytest.mark.parametrize(
    "start",
    [b"\xff" * 8, (50).to_bytes(8, "little") + b"{", (5).to_bytes(8, "little") + b"[1,2]", b"<html>not found</html>"],
    ids=["length", "json", "list", "html"],
)
def test_a_corrupt_header(start: bytes, hf: Path) -> None:
    path = hf / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(start + content[len(start) :])
    refused(forward(hf), path.name)


def test_a_git_lfs_pointer(hf: Path) -> None:
    (hf / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(forward(hf), "git lfs pull")


def test_a_shard_that_the_index_names_is_missing(sharded: Path) -> None:
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2
    for shard in shards[:2]:
        shard.unlink()
    refused(forward(sharded), shards[0].name, shards[1].name, "model.safetensors.index.json")


def test_index_and_a_shard_are_missing(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    sorted(sharded.glob("model-*.safetensors"))[1].unlink()
    refused(forward(sharded), "the index of these shards is missing", "model-00001-of-")


def test_index_and_shards_disagree(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = shards[0]
    index["weight_map"]["model.extra.weight"] = shards[1]
    path.write_text(json.dumps(index))
    refused(forward(sharded), "model.norm.weight", f"model.extra.weight should be in {shards[1]}")


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\ud800", "x" * 5000])
def test_an_index_with_a_file_name_that_is_none(name: str, sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=r"has no weight_map|is named by model\.safetensors\.index\.json"):
        HFSource(sharded)


@pytest.mark.parametrize("name", ["a\0b", "~nobody-here/x", "x" * 5000, 5])
def test_a_tokenizer_that_args_name_and_none_can_have(name: Any, meg: Path) -> None:
    edit_args(meg, tokenizer_model=name)
    assert "warning: wrote no tokenizer" in succeeded(back(meg)).err


@pytest.mark.parametrize("value", [1 << 2000, _nested(50)], ids=["long", "deep"])
def test_args_that_no_run_has(value: Any, meg: Path) -> None:
    edit_args(meg, norm_epsilon=value)
    refused(back(meg), "the args are damaged: the value of norm_epsilon is not plausible")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index(text: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    refused(forward(sharded), "model.safetensors.index.json")


def test_an_index_that_leads_out_of_the_folder(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = index["weight_map"]["model.norm.weight"]
    shutil.move(sharded / shard, sharded.parent / shard)
    index["weight_map"] = {key: f"../{name}" if name == shard else name for key, name in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    refused(forward(sharded), f"../{shard}")


def test_an_adapter_beside_the_model_or_alone(hf: Path) -> None:
    (hf / "adapter_config.json").write_text("{}")
    refused(forward(hf), "adapter_config.json", "merge it")
    (hf / "config.json").unlink()
    refused(forward(hf), "adapter_config.json", "merge it")


def test_a_folder_without_weights(hf: Path) -> None:
    (hf / "model.safetensors").unlink()
    refused(forward(hf), "model.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "llama"}'])
def test_a_broken_config(text: str, hf: Path) -> None:
    (hf / "config.json").write_text(text)
    refused(forward(hf), "config.json")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refused(forward(tmp_path / "nothing"), tmp_path / "nothing", code=2)
    refused(back(tmp_path / "nothing"), tmp_path / "nothing", code=2)


def test_an_unknown_architecture_names_the_supported_ones(hf: Path) -> None:
    edit_config(hf, architectures=["FooForCausalLM"], model_type="foo")
    refused(
        forward(hf), "FooForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, ("hidden_act", "gelu", "silu")),
        ({"logit_scale": 0.5}, ("logit_scale", "--ignore-config-fields logit_scale")),
        ({"quantization_config": {"quant_method": "gptq"}}, ("quantization_config",)),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, ("YaRN by 4 outside",)),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, ("llama3", "factor")),
        ({"num_attention_heads": 6}, ("6", "4")),
        ({"num_hidden_layers": 0}, ("num_layers",)),
        ({"vocab_size": None}, ("vocab_size",)),
        ({"hidden_size": "64"}, ("hidden_size",)),
        ({"num_attention_heads": 0}, ("num_attention_heads",)),
        ({"num_key_value_heads": 0}, ("num_query_groups",)),
        ({"rms_norm_eps": "small"}, ("norm_epsilon", "small")),
        ({"rope_parameters": "default"}, ("rotary", "'default'")),
        ({"torch_dtype": "int3"}, ("int3",)),
        ({"architectures": "LlamaForCausalLM"}, ("architectures",)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_cannot_be_right(changes: dict[str, Any], words: tuple[str, ...], hf: Path) -> None:
    edit_config(hf, **changes)
    refused(forward(hf), *words)


def test_an_unknown_config_field_that_the_user_vouches_for(hf: Path) -> None:
    edit_config(hf, logit_scale=0.5)
    succeeded(forward(hf, "--ignore-config-fields", "logit_scale"))


# --- tied embeddings


def tied(hf_model: HFModel, tmp_path: Path, head: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    source = shutil.copytree(hf_model("qwen2-tied"), tmp_path / "hf")
    name = "model.embed_tokens.weight"
    edit_tensors(source, lambda tensors: tensors.update({"lm_head.weight": head(tensors[name])}))
    return source


def test_a_tied_model_may_store_its_lm_head(hf_model: HFModel, tmp_path: Path) -> None:
    source = tied(hf_model, tmp_path, torch.clone)
    out = tmp_path / "out"
    succeeded(forward(source, "--target-pipeline-parallel-size", 2))
    last = rank_content(out, "mp_rank_00_001")["model"]["output_layer.weight"]
    assert torch.equal(last[:199], hf_tensors(source)["model.embed_tokens.weight"])
    assert args_of(out).untie_embeddings_and_output_weights is False


def change_last_row(weight: torch.Tensor) -> torch.Tensor:
    changed = weight.clone()
    changed[-1, -1] += 1
    return changed


@pytest.mark.parametrize("pp", [1, 2])
def test_a_tied_model_with_another_lm_head(pp: int, hf_model: HFModel, tmp_path: Path) -> None:
    source = tied(hf_model, tmp_path, change_last_row)
    size = ("--target-pipeline-parallel-size", pp)
    refused(forward(source, *size), "lm_head.weight", "model.embed_tokens.weight", "row 198", "--untie")
    succeeded(forward(source, *size, "--untie"))
    assert args_of(tmp_path / "out").untie_embeddings_and_output_weights is True
    succeeded(convert_back("--load-path", tmp_path / "out", "--save-path", tmp_path / "hf2"))
    same_tensors(hf_tensors(tmp_path / "hf2"), hf_tensors(source))
    assert json.loads((tmp_path / "hf2" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_tied_model_with_an_lm_head_of_another_shape(hf_model: HFModel, tmp_path: Path) -> None:
    source = tied(hf_model, tmp_path, lambda weight: weight[:-1].clone())
    refused(forward(source), "lm_head.weight", "198", "199")


def test_untying_a_model_without_lm_head(hf_model: HFModel, tmp_path: Path) -> None:
    source = shutil.copytree(hf_model("qwen2-tied"), tmp_path / "hf")
    refused(forward(source, "--untie"), "lm_head.weight", "missing")


def test_a_copy_of_tied_embeddings_that_differs(megatron_model: MegatronModel, tmp_path: Path) -> None:
    meg = shutil.copytree(megatron_model("qwen2-tied")[1], tmp_path / "meg")
    key = "output_layer.weight"
    edit_model(meg, "mp_rank_01_001", lambda model: model.update({key: model[key] + 1}))
    refused(back(meg), "mp_rank_01_001", "output_layer.weight", "word_embeddings")


def test_copies_of_a_norm_that_differ(meg: Path) -> None:
    key = "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    edit_model(meg, "mp_rank_01_000", lambda model: model[key].__setitem__(5, 9.0))
    refused(back(meg), "layer 1 input_norm", "mp_rank_01_000", "row 5")


# --- tensors and ranks of a Megatron checkpoint


def test_all_faults_of_a_checkpoint_are_listed_at_once(meg: Path) -> None:
    def damage(model: dict[str, Any]) -> None:
        del model["decoder.layers.0.mlp.linear_fc2.weight"]
        model["decoder.layers.7.mlp.linear_fc2.weight"] = torch.zeros(64, 56)
        model["decoder.layers.1.mlp.linear_fc1.weight"] = torch.zeros(10, 64)
        model["decoder.layers.1.input_layernorm.weight"] = torch.ones(64)

    edit_model(meg, "mp_rank_01_000", damage)
    edit_model(meg, "mp_rank_00_001", lambda model: model.pop("decoder.final_layernorm.weight"))
    refused(
        back(meg),
        "mp_rank_01_000: layer 0 fc2: decoder.layers.0.mlp.linear_fc2.weight is missing",
        "mp_rank_01_000: decoder.layers.7.mlp.linear_fc2.weight is not a tensor",
        "decoder.layers.1.mlp.linear_fc1.weight (layer 1 fc1) has shape [10, 64]; the args require [112, 64]",
        "decoder.layers.1.input_layernorm.weight",
        "mp_rank_00_001: final_norm",
    )


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_rank(keep: float, meg: Path) -> None:
    truncate(meg / "iter_0000001" / "mp_rank_01_001" / RANK_FILE, keep)
    refused(back(meg), "mp_rank_01_001")


def test_a_missing_rank_directory(meg: Path) -> None:
    shutil.rmtree(meg / "iter_0000001" / "mp_rank_01_000")
    shutil.rmtree(meg / "iter_0000001" / "mp_rank_01_001")
    refused(back(meg), "mp_rank_01_000", "mp_rank_01_001", "tp=2, pp=2")


def test_rank_zero_is_missing(meg: Path) -> None:
    shutil.rmtree(meg / "iter_0000001" / "mp_rank_00_000")
    refused(back(meg), "mp_rank_00_000")


def test_an_extra_rank_directory(meg: Path) -> None:
    ranks = meg / "iter_0000001"
    shutil.copytree(ranks / "mp_rank_01_000", ranks / "mp_rank_02_000")
    refused(back(meg), "mp_rank_02_000", "tp=2, pp=2")


def test_a_missing_file_of_a_rank(meg: Path) -> None:
    (meg / "iter_0000001" / "mp_rank_01_001" / RANK_FILE).unlink()
    refused(back(meg), f"mp_rank_01_001/{RANK_FILE}")


def test_args_are_missing(meg: Path) -> None:
    edit_rank(meg, "mp_rank_00_000", args=None)
    refused(back(meg), "args")


def test_the_model_is_missing(meg: Path) -> None:
    edit_rank(meg, "mp_rank_01_000", model=None)
    refused(back(meg), "mp_rank_01_000", "model")


def test_ranks_of_different_saves_are_not_mixed(meg: Path) -> None:
    """Between stages no tensor is there twice, so only what the files say of themselves tells."""
    for rank in ("mp_rank_00_001", "mp_rank_01_001"):
        edit_rank(meg, rank, iteration=200)
    refused(back(meg), "contradict mp_rank_00_000", "mp_rank_01_001: iteration is 200, not 1", "of different saves")


def test_ranks_of_different_models_are_not_mixed(meg: Path) -> None:
    args = rank_content(meg, "mp_rank_00_001")["args"]
    args.num_attention_heads, args.num_query_groups, args.kv_channels = 4, 2, 16  # the same shapes
    edit_rank(meg, "mp_rank_00_001", args=args)
    refused(back(meg), "mp_rank_00_001: num_attention_heads is 4, not 8", "of different saves")


@pytest.mark.parametrize("rank", ["mp_rank_00_000", "mp_rank_01_001"])
def test_an_entry_without_a_name(rank: str, meg: Path) -> None:
    edit_model(meg, rank, lambda model: model.update({5: torch.zeros(2)}))
    refused(back(meg), rank, "entries that are not named tensors: 5")


def test_a_bin_file_with_an_entry_without_a_name(hf_model: HFModel, tmp_path: Path) -> None:
    source = shutil.copytree(hf_model("llama2", weights="bin"), tmp_path / "hf")
    state = torch.load(source / "pytorch_model.bin")
    torch.save({**state, ("a", 1): torch.zeros(2)}, source / "pytorch_model.bin")
    refused(forward(source), "not named tensors: ('a', 1)")


def test_the_ranks_hold_different_dtypes(meg: Path) -> None:
    key = "decoder.layers.0.mlp.linear_fc2.weight"
    edit_model(meg, "mp_rank_01_000", lambda model: model.update({key: model[key].bfloat16()}))
    refused(back(meg), "layer 0 fc2", "bfloat16", "float32")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": 8}, ("experts",)),
        ({"normalization": "L2Norm"}, ("normalization", "L2Norm")),
        # The args are those of a model that is supported, but not this one.
        ({"normalization": "LayerNorm"}, ("layer 0 input_norm_bias", "final_norm_bias", "is missing")),
        ({"position_embedding_type": "learned_absolute"}, ("embedding.position_embeddings.weight is missing",)),
        ({"position_embedding_type": "relative"}, ("position_embedding_type='relative'",)),
        ({"swiglu": False}, ("layer 3 fc1", "has shape [112, 64]; the args require [56, 64]")),
        ({"multi_latent_attention": True}, ("layer 3 kv_down", "linear_kv_down_proj.weight is missing")),
        ({"mtp_num_layers": 1}, ("with 1 layer of multi-token prediction", "holds none", "--without-mtp")),
        ({"rotary_percent": 0.5}, ("rotary_percent",)),
        ({"virtual_pipeline_model_parallel_size": 2}, ("no 'model0' entry", "2 virtual pipeline stages")),
        ({"virtual_pipeline_model_parallel_size": 0}, ("virtual_pipeline_model_parallel_size is 0",)),
        ({"pipeline_model_parallel_layout": "Et|t|tL"}, ("has 3 stages", "pp=2 does not divide")),
        ({"pipeline_model_parallel_layout": "Et|tttttL"}, ("it has 6 layers, the model 4",)),
        ({"pipeline_model_parallel_layout": [["embedding"]]}, ("pipeline layout that is not text",)),
        ({"tensor_model_parallel_size": None}, ("tensor",)),
        ({"tensor_model_parallel_size": "2"}, ("tensor",)),
        ({"num_layers": None, "encoder_num_layers": None}, ("num_layers", "--hf-config")),
        ({"num_layers": 5}, ("5 layers", "pp")),
        ({"hidden_size": 128}, ("shape",)),
        ({"num_query_groups": 8}, ("qkv", "shape")),
        ({"norm_epsilon": 1e-5, "layernorm_epsilon": 1e-6}, ("norm_epsilon", "layernorm_epsilon")),
        ({"window_size": (6, 3)}, ("window_size",)),
        ({"window_size": 7}, ("window_size",)),
        ({"num_query_groups": 3}, ("8", "3")),
        ({"rotary_base": "large"}, ("rotary_base",)),
        ({"hf_config": {"model_type": "bert"}}, ("recorded in the args", "bert", "--hf-config")),
        ({"hf_config": {"model_type": "gpt2"}}, ("recorded in the args", "no n_layer", "--hf-config")),
        ({"decoder_first_pipeline_num_layers": "2"}, ("decoder_first_pipeline_num_layers is '2'",)),
        ({"num_experts": "8"}, ("num_experts is '8'",)),
        ({"hidden_size": "64"}, ("hidden_size",)),
    ],
    ids=str,
)
def test_args_that_cannot_be_right(changes: dict[str, Any], words: tuple[str, ...], meg: Path) -> None:
    edit_args(meg, **changes)
    refused(back(meg), *words)


def test_a_vocabulary_beyond_the_embeddings(meg: Path) -> None:
    refused(back(meg, "--true-vocab-size", 1000), "1000", "256", code=2)


@pytest.mark.parametrize(
    ("text", "words"),
    [("7", ("iter_0000007",)), ("release", ("release",)), ("latest", ("latest",)), ("", (TRACKER,)), ("²", ("'²'",))],
)
def test_a_tracker_that_points_elsewhere(text: str, words: tuple[str, ...], meg: Path) -> None:
    (meg / TRACKER).write_text(text)
    refused(back(meg), TRACKER, *words)


def test_a_named_iteration_that_is_not_there(meg: Path) -> None:
    refused(back(meg, "--ckpt-dir-name", "iter_0000009"), "iter_0000009", "iter_0000001")


def test_a_distributed_checkpoint_that_was_not_finished(meg: Path) -> None:
    (meg / "iter_0000001" / ".metadata").touch()
    refused(back(meg), ".metadata is empty")


def test_a_reference_of_another_model(meg: Path, hf_model: HFModel) -> None:
    refused(back(meg, "--hf-config", hf_model("llama-head_dim")), "another model", "kv_channels: 24, not 8")
    refused(back(meg, "--hf-config", hf_model("llama2", intermediate_size=128)), "shape")


def test_a_reference_with_other_heads_of_the_same_shapes(hf: Path, meg: Path) -> None:
    """Half the heads of twice the size: every tensor fits, and queries, keys and values would be taken for one another."""
    edit_config(hf, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    refused(
        back(meg, "--hf-config", hf), "another model", "num_attention_heads: 4, not 8", "num_query_groups: 2, not 4"
    )


# --- hostile files


class Touch:
    """Unpickled by an ordinary unpickler, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_hostile_bin_file(hf_model: HFModel, tmp_path: Path) -> None:
    source, marker = shutil.copytree(hf_model("llama2", weights="bin"), tmp_path / "hf"), tmp_path / "marker"
    path = source / "pytorch_model.bin"
    torch.save({**torch.load(path), "extra": Touch(marker)}, path)
    refused(forward(source), "system", "pytorch_model.bin")
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the trap does work
    assert marker.exists()


@pytest.mark.parametrize("where", ["args", "top", "model", "rank"])
def test_a_hostile_checkpoint(where: str, meg: Path) -> None:
    marker, rank = meg.parent / "marker", "mp_rank_01_001" if where == "rank" else "mp_rank_00_000"
    content = rank_content(meg, rank)
    if where == "args":
        content["args"].trap = Touch(marker)
    elif where == "model":
        content["model"]["decoder.layers.0._extra_state"] = Touch(marker)
    else:
        content["rng_state"] = [Touch(marker)]
    torch.save(content, meg / "iter_0000001" / rank / RANK_FILE)
    refused(back(meg), "system", rank)
    refused(forward(meg, "--loader", "core"), "system", rank)
    assert not marker.exists()


def test_a_bare_pickle(meg: Path) -> None:
    marker = meg.parent / "marker"
    (meg / "iter_0000001" / "mp_rank_00_000" / RANK_FILE).write_bytes(pickle.dumps(Touch(marker)))
    refused(back(meg), RANK_FILE)
    assert not marker.exists()


# --- sizes that cannot cut the model


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--target-tensor-parallel-size 3", ("tp=3", "1, 2, 4 or 8")),
        ("--target-tensor-parallel-size 16", ("tp=16", "1, 2, 4 or 8")),
        ("--target-pipeline-parallel-size 3", ("pp=3", "1, 2 or 4")),
        ("--target-pipeline-parallel-size 8", ("pp=8", "1, 2 or 4")),
        ("--target-tensor-parallel-size 0", ("--target-tensor-parallel-size", "'0'")),
        ("--target-tensor-parallel-size=-2", ("--target-tensor-parallel-size", "'-2'")),
        ("--target-pipeline-parallel-size 0", ("--target-pipeline-parallel-size", "'0'")),
        ("--target-pipeline-parallel-size 2 --decoder-first-pipeline-num-layers 5", ("first=5",)),
        ("--target-pipeline-parallel-size 3 --decoder-first-pipeline-num-layers 1", ("first=1",)),
        ("--make-vocab-size-divisible-by 0", ("--make-vocab-size-divisible-by",)),
        ("--make-vocab-size-divisible-by -8", ("--make-vocab-size-divisible-by",)),
        ("--max-queue-size x", ("--max-queue-size",)),
    ],
)
def test_sizes_that_cannot_be(options: str, words: tuple[str, ...], hf: Path) -> None:
    run = forward(hf, *options.split())
    refused(run, *words, code=run.code or 1)


# --- what Megatron-LM cannot express


INEXPRESSIBLE: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama3 constants": (
        "llama3.1",
        {"original_max_position_embeddings": 4096, "low_freq_factor": 2.0},
        ("4096", "8192", "2.0"),
    ),
    "tanh GELU without biases": ("starcoder2", {"use_bias": False}, ("tanh form of GELU", "needs biases")),
    "bias of attention alone": ("llama2", {"attention_bias": True}, ("bias", "--add-bias-linear")),
    "fraction of a rotary base": ("llama2", {"rope_theta": 10000.5}, ("10000.5",)),
}


def test_a_window_from_a_layer_on(hf_model: HFModel, tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2, "layer_types": None}
    source = hf_model_of("qwen2", tmp_path, window)
    run = succeeded(forward(source))
    assert "--window-size 6,0" in run.out and "--window-attn-skip-freq '[0,0,1,1]'" in run.out
    assert "needs Megatron-LM 0.15 or later" in run.out
    args = torch.load(tmp_path / "out" / "iter_0000001" / "mp_rank_00" / RANK_FILE, weights_only=False)["args"]
    assert (args.window_size, args.window_attn_skip_freq) == ((6, 0), [0, 0, 1, 1])
    succeeded(convert_back("--load-path", tmp_path / "out", "--save-path", tmp_path / "hf back"))
    same_tensors(hf_tensors(tmp_path / "hf back"), hf_tensors(source))
    assert spec_from_config(read_json(tmp_path / "hf back" / "config.json")) == spec_from_config(
        read_json(source / "config.json")
    )


@pytest.mark.parametrize("case", INEXPRESSIBLE)
def test_what_megatron_cannot_express(case: str, hf_model: HFModel, tmp_path: Path) -> None:
    family, changes, words = INEXPRESSIBLE[case]
    config = {} if case == "llama3 constants" else changes
    if case == "fraction of a rotary base":
        config = {"rope_parameters": {"rope_type": "default", **changes}}
    source = hf_model_of(family, tmp_path, config)
    if case == "llama3 constants":
        rope = json.loads((source / "config.json").read_text())["rope_parameters"]
        edit_config(source, rope_parameters={**rope, **changes})
    refused(forward(source), *words, "--allow-inexpressible")
    run = succeeded(forward(source, "--allow-inexpressible"))
    assert "warning: Megatron-LM will not compute" in run.err
    assert all(word in run.err for word in words)
    for number, reference in enumerate(((), ("--hf-config", source))):  # the configuration is recorded, too
        target = tmp_path / f"hf{number}"
        succeeded(convert_back("--load-path", tmp_path / "out", "--save-path", target, *reference))
        same_tensors(hf_tensors(target), hf_tensors(source))
        assert spec_from_config(read_json(target / "config.json")) == spec_from_config(
            read_json(source / "config.json")
        )


def hf_model_of(family: str, tmp_path: Path, config: dict[str, Any]) -> Path:
    from tests.oracle.hf import make_model

    return make_model(family, tmp_path / "hf", **config)


# --- targets


def test_an_existing_checkpoint_is_not_touched(hf: Path, meg: Path) -> None:
    before = {path: path.read_bytes() for path in meg.rglob("*") if path.is_file()}
    refused(convert("--load-dir", hf, "--save-dir", meg), "iter_0000001", "--overwrite")
    (meg / TRACKER).write_text("7")
    refused(convert("--load-dir", hf, "--save-dir", meg, "--release"), TRACKER, "7", "--overwrite")
    (meg / TRACKER).write_text("1")
    assert {path: path.read_bytes() for path in meg.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "model.safetensors.index.json",
    ],
)
def test_an_existing_model_is_not_touched(name: str, meg: Path) -> None:
    target = meg.parent / "hf2"
    target.mkdir()
    (target / name).write_text("mine")
    refused(convert_back("--load-path", meg, "--save-path", target), name, "--overwrite")
    assert [path.name for path in target.iterdir()] == [name]
    assert (target / name).read_text() == "mine"


def test_overwriting_a_model_leaves_nothing_of_it(meg: Path, sharded: Path) -> None:
    target = shutil.copytree(sharded, meg.parent / "hf2")
    (target / "README.md").write_text("mine")
    (target / "generation_config.json").write_text('{"eos_token_id": 77}')
    options = ("--load-path", meg, "--save-path", target, "--target-params-dtype", "bf16", "--overwrite")
    succeeded(convert_back(*options))
    names = sorted(path.name for path in target.iterdir())
    mine = [
        "config.json",
        "conversion.json",
        "generation_config.json",
        "model.safetensors",
        "source_megatron_args.json",
    ]
    assert names == ["README.md", *mine]
    generation = (target / "generation_config.json").read_text()
    assert json.loads(generation) == json.loads((sharded / "generation_config.json").read_text())


def test_a_failed_overwrite_leaves_the_old_model(meg: Path, hf: Path) -> None:
    target = shutil.copytree(hf, meg.parent / "hf2")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    key = "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    edit_model(meg, "mp_rank_01_000", lambda model: model[key].__setitem__(5, 9.0))
    refused(convert_back("--load-path", meg, "--save-path", target, "--overwrite"), "mp_rank_01_000")
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_what_a_killed_run_left_is_no_obstacle(hf: Path, meg: Path) -> None:
    out = hf.parent / "out"
    (out / ".iter_0000001.incomplete" / "mp_rank_07").mkdir(parents=True)
    (out / ".iter_0000001.incomplete" / "mp_rank_07" / RANK_FILE).write_text("half")
    succeeded(forward(hf))
    assert [path.name for path in (out / "iter_0000001").glob("mp_*")] == ["mp_rank_00"]
    assert not list(out.glob(".*"))
    hf2 = hf.parent / "hf2"
    (hf2 / ".hf.incomplete").mkdir(parents=True)
    (hf2 / ".hf.incomplete" / "model-00001-of-00007.safetensors").write_text("half")
    succeeded(convert_back("--load-path", meg, "--save-path", hf2))
    assert not list(hf2.glob(".*"))
    assert [path.name for path in hf2.glob("*.safetensors")] == ["model.safetensors"]


def test_a_folder_without_a_name(hf: Path, meg: Path, tmp_path: Path) -> None:
    """`convert $HF $OUT` with OUT unset, in quotes: an empty name would be the working folder."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    name, word = "", "is a variable of the command line unset?"
    refused(convert("--load-dir", hf, "--save-dir", name, cwd=cwd), word, code=2)
    refused(convert("--load-dir", name, "--save-dir", cwd / "out", cwd=cwd), word, code=2)
    refused(convert_back("--load-path", meg, "--save-path", name, cwd=cwd), word, code=2)
    refused(verb("convert", hf, name), word, code=2)
    refused(verb("plan", name, cwd / "out"), word, code=2)
    refused(verb("inspect", name), word, code=2)
    refused(verb("verify", hf, name), word, code=2)
    assert not list(cwd.iterdir())


def test_a_folder_whose_name_is_too_long(hf: Path) -> None:
    refused(convert("--load-dir", "x" * 5000, "--save-dir", hf / "out"), "File name too long")
    refused(convert("--load-dir", hf, "--save-dir", "x" * 5000), "File name too long")


def test_a_target_that_is_a_file(hf: Path, meg: Path) -> None:
    target = hf.parent / "file"
    target.write_text("mine")
    refused(convert("--load-dir", hf, "--save-dir", target), target)
    refused(convert_back("--load-path", meg, "--save-path", target / "below"), target)
    assert target.read_text() == "mine"


# --- the disk


def test_a_disk_that_is_too_small_is_found_before_writing(hf_model: HFModel, meg: Path, tmp_path: Path) -> None:
    if shutil.which("mount") is None or (disk := small_disk(tmp_path, 0.5)) is None:
        pytest.skip("no file system can be mounted here")
    try:
        for run in (
            convert("--load-dir", hf_model("llama2"), "--save-dir", disk / "new" / "meg"),
            convert_back("--load-path", meg, "--save-path", disk / "new" / "hf"),
        ):
            refused(run, disk / "new", "free; free some space")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_free_space_is_compared_with_what_is_needed(meg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_converters.cli import mlm_to_hf

    real = os.statvfs(meg)
    nearly = os.statvfs_result((real.f_bsize, 1, real.f_blocks, 600_000, 600_000, *tuple(real)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: nearly)
    target = meg.parent / "out"
    with pytest.raises(SystemExit) as caught:
        mlm_to_hf.main(["--load-path", str(meg), "--save-path", str(target), "--quiet"])
    assert caught.value.code == 1
    nothing_complete(target)


def limited(limit: int) -> Callable[[], None]:
    """In a child: files may not grow beyond `limit` bytes, and writing more is an error instead of the end."""

    def apply() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return apply


def test_files_that_may_not_grow(hf: Path, meg: Path, tmp_path: Path) -> None:
    for name, options in (
        (CONVERT, ("--load-dir", hf, "--save-dir", tmp_path / "out")),
        (CONVERT.with_name("convert_mlm_to_hf_checkpoint.py"), ("--load-path", meg, "--save-path", tmp_path / "out")),
    ):
        process = subprocess.run(
            [sys.executable, name, *options], preexec_fn=limited(100_000), capture_output=True, text=True, check=False
        )
        refused(Run(process.returncode, process.stdout, process.stderr), "File too large", tmp_path / "out")
        nothing_complete(tmp_path / "out")


FULL_DISK = """
import errno, os, sys
count = {count}
real = os.{function}
def failing(*args, **more):
    global count
    count -= 1
    if count < 0 and {condition}:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return real(*args, **more)
os.{function} = failing
"""
STAGES = {
    "first bytes": ("pwrite", 0, "True"),
    "midway": ("pwrite", 5, "True"),
    "flush": ("fsync", 0, "True"),
    "record": ("replace", 0, "True"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("direction", ["forward", "back"])
def test_the_disk_fills_up(direction: str, stage: str, hf: Path, meg: Path, tmp_path: Path) -> None:
    function, count, condition = STAGES[stage]
    (tmp_path / "site").mkdir()
    code = FULL_DISK.format(function=function, count=count, condition=condition)
    (tmp_path / "site" / "sitecustomize.py").write_text(code)
    env = {"PYTHONPATH": str(tmp_path / "site"), "PYTHONDONTWRITEBYTECODE": "1"}
    target = tmp_path / "out"
    if direction == "forward":
        run = convert("--load-dir", hf, "--save-dir", target, env=env)
    else:
        run = convert_back("--load-path", meg, "--save-path", target, env=env)
    refused(run, os.strerror(errno.ENOSPC))
    nothing_complete(target)


def test_the_tracker_cannot_be_written(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    code = FULL_DISK.format(function="replace", count=0, condition=f"{TRACKER!r} in str(args[1])")
    (tmp_path / "site" / "sitecustomize.py").write_text(code)
    target = tmp_path / "out"
    run = convert("--load-dir", hf, "--save-dir", target, env={"PYTHONPATH": str(tmp_path / "site")})
    refused(run, os.strerror(errno.ENOSPC))
    # Complete, but not what Megatron-LM would load; the same command makes it so.
    assert sorted(path.name for path in target.iterdir()) == [".iter_0000001.incomplete", "iter_0000001"]
    before = (target / "iter_0000001" / "mp_rank_00" / RANK_FILE).stat()
    succeeded(convert("--load-dir", hf, "--save-dir", target))
    assert sorted(path.name for path in target.iterdir()) == ["iter_0000001", TRACKER]
    assert (target / "iter_0000001" / "mp_rank_00" / RANK_FILE).stat() == before


# --- a file where a folder is meant


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("config.json", "."),
        ("model.safetensors.index.json", "."),
        ("model-00002-of-00004.safetensors", "."),
        ("latest_checkpointed_iteration.txt", "."),
        ("iter_0000001/common.pt", "iter_0000001"),
        ("iter_0000001/__0_0.distcp", "iter_0000001"),
        ("iter_0000001/mp_rank_00/model_optim_rng.pt", "iter_0000001"),
    ],
)
def test_a_file_that_is_part_of_a_model(name: str, folder: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    words = (
        f"{path} is one of the files of a model; give the folder that has them all, {(tmp_path / folder).resolve()}\n"
    )
    for command in (("inspect", path), ("verify", path), ("convert", path, tmp_path / "out", "--from", "hf")):
        refused(verb(*command), words, code=2)
    run = convert_back("--load-path", path, "--save-path", tmp_path / "out")
    refused(run, words, code=2)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_model(hf_model: HFModel, tmp_path: Path) -> None:
    path = tmp_path / "notes.md"
    path.write_text("# notes")
    refused(verb("inspect", path), f"{path} is no file of weights that can be read (.safetensors, ", code=2)
    refused(verb("inspect", tmp_path / "absent"), "absent does not exist", code=2)
    for option in (path, tmp_path / "absent"):
        run = verb("convert", hf_model("llama2") / "model.safetensors", tmp_path / "out", "--hf-config", option)
        words = {
            path: f"{path} is a file, but a folder is needed here",
            tmp_path / "absent": "absent does not exist; give a folder",
        }
        refused(run, words[option], code=2)

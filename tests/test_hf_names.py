"""Hugging Face folders whose names or tensors differ from transformers' own by what programs put before, beside or into them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_converters.formats.huggingface.source import HFSource
from tests.conversions import hf_to_megatron, hf_to_torch_dist, megatron_to_hf
from tests.helpers import edit_config, edit_rank, hf_tensors, rank_content, refused, same_tensors, succeeded, verb
from tests.oracle.hf import hf_logits, sample_tokens

HFModel = Callable[..., Path]
Tensors = Mapping[str, torch.Tensor]
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SMALL: dict[str, Any] = dict(num_hidden_layers=2, vocab_size=101)
TOKENS = sample_tokens(1, 16, vocab_size=101)


def stored(source: Path, folder: Path, tensors: Tensors) -> Path:
    """Folder with the configuration of `source` and these tensors."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def renamed(source: Path, folder: Path, name_of: Callable[[str], str]) -> Path:
    return stored(source, folder, {name_of(name): tensor for name, tensor in hf_tensors(source).items()})


def notes_of(folder: Path, **options: Any) -> str:
    return "\n".join(HFSource(folder, **options).origin.notes)


def round_trip(source: Path, tmp_path: Path) -> Path:
    return megatron_to_hf(hf_to_megatron(source, tmp_path / "meg", tp=2), tmp_path / "back")


# --- prefixes

WRAPPED: dict[str, tuple[Callable[[str], str], str]] = {
    "no prefix": (lambda name: name.removeprefix("model."), "names lack the prefix 'model.'"),
    "compiled": (lambda name: f"_orig_mod.{name}", "without '_orig_mod', which torch.compile adds"),
    "data parallel": (lambda name: f"module.{name}", "names begin with 'module.'"),
    "twice": (lambda name: f"module._orig_mod.{name}", "names begin with 'module.'"),
    "part of a larger model": (lambda name: f"language_model.{name}", "names begin with 'language_model.'"),
    "PEFT, merged": (lambda name: f"base_model.model.{name}", "names begin with 'base_model.model.'"),
    "beside a vision tower": (
        lambda name: name.replace("model.", "model.language_model.", 1),
        "names begin with 'model.language_model.' in place of 'model.'",
    ),
    "FSDP and checkpointing": (
        lambda name: f"_fsdp_wrapped_module.{name.replace('.mlp.', '._checkpoint_wrapped_module.mlp.')}",
        "without '_checkpoint_wrapped_module', which activation checkpointing adds",
    ),
}


@pytest.mark.parametrize(("kind", "family"), list(zip(WRAPPED, cycle(["qwen2", "qwen2-tied"]), strict=False)))
def test_a_uniform_prefix_is_said_and_read(kind: str, family: str, hf_model: HFModel, tmp_path: Path) -> None:
    plain, (name_of, note) = hf_model(family, **SMALL), WRAPPED[kind]
    odd = renamed(plain, tmp_path / "odd", name_of)
    assert note in notes_of(odd)
    run = succeeded(verb("convert", odd, tmp_path / "out", "--to", "hf"))
    assert note in run.out
    same_tensors(hf_tensors(tmp_path / "out"), hf_tensors(plain))
    names = {name for entry in _sources(tmp_path / "out") for name in entry}
    assert names == {f"model.safetensors: {name}" for name in hf_tensors(odd)}  # as they are in the file


def _sources(folder: Path) -> list[dict[str, str]]:
    files = json.loads((folder / "conversion.json").read_text())["files"]
    return [tensor["from"] for file in files.values() for tensor in file["tensors"].values()]


@pytest.mark.parametrize("family", ["qwen3", "qwen3-tied", "mixtral"])
def test_transformers_reads_the_base_model_s_names_alike(family: str, hf_model: HFModel, tmp_path: Path) -> None:
    """Its own rule: a file of the base model alone is loaded into the model with a head."""
    odd = renamed(hf_model(family, **SMALL), tmp_path / "odd", lambda name: name.removeprefix("model."))
    assert torch.equal(hf_logits(odd, TOKENS), hf_logits(round_trip(odd, tmp_path), TOKENS))


def test_fused_experts_are_found_behind_a_prefix(hf_model: HFModel, tmp_path: Path) -> None:
    plain = hf_model("qwen3-moe", fused_experts=True, **SMALL)
    odd = renamed(plain, tmp_path / "odd", lambda name: f"module.{name}")
    assert HFSource(odd).fused
    assert "fused" in succeeded(verb("inspect", odd)).out
    succeeded(verb("convert", odd, tmp_path / "out", "--to", "hf", "--expert-layout", "fused"))
    same_tensors(hf_tensors(tmp_path / "out"), hf_tensors(plain))


def test_two_whole_models_are_not_guessed_between(hf_model: HFModel, tmp_path: Path) -> None:
    plain = hf_model("llama2", **SMALL)
    both = {f"{who}.{name}": tensor for who in ("actor", "critic") for name, tensor in hf_tensors(plain).items()}
    odd = stored(plain, tmp_path / "odd", both)
    refused(verb("plan", odd, tmp_path / "out"), "'actor.model.' and 'critic.model.'", "--ignore-tensors")
    succeeded(verb("convert", odd, tmp_path / "out", "--to", "hf", "--ignore-tensors", "critic.*"))
    same_tensors(hf_tensors(tmp_path / "out"), hf_tensors(plain))


def test_a_second_model_beside_the_right_names_is_refused(hf_model: HFModel, tmp_path: Path) -> None:
    plain = hf_model("llama2", **SMALL)
    averaged = {f"ema.{name}": tensor for name, tensor in hf_tensors(plain).items()}
    odd = stored(plain, tmp_path / "odd", {**hf_tensors(plain), **averaged})
    refused(verb("plan", odd, tmp_path / "out"), f"ema.{HEAD} is not a tensor of the llama family")


def test_names_that_a_wrapper_doubles_are_refused(hf_model: HFModel, tmp_path: Path) -> None:
    plain = hf_model("llama2", **SMALL)
    tensors = hf_tensors(plain)
    odd = stored(plain, tmp_path / "odd", {**tensors, f"_orig_mod.{HEAD}": tensors[HEAD] * 2})
    refused(verb("plan", odd, tmp_path / "out"), f"_orig_mod.{HEAD} is not a tensor")


def test_a_damaged_model_behind_a_prefix_is_named_as_in_the_file(hf_model: HFModel, tmp_path: Path) -> None:
    plain = hf_model("llama2", **SMALL)
    tensors = {f"module.{name}": tensor for name, tensor in hf_tensors(plain).items()}
    gone = tensors.pop("module.model.layers.1.mlp.up_proj.weight")
    odd = stored(plain, tmp_path / "odd", {**tensors, "module.extra": gone})
    run = refused(verb("plan", odd, tmp_path / "out"), "layers.1.mlp.up_proj.weight (layer 1 fc1) is missing")
    assert "module.extra is not a tensor of the llama family" in run.err
    assert run.err.count("\n  - ") == 2


@pytest.mark.parametrize("end", ["lora_A.default.weight", "base_layer.weight", "lora_magnitude_vector.default.weight"])
def test_an_adapter_that_is_not_merged(end: str, hf_model: HFModel, tmp_path: Path) -> None:
    plain = hf_model("llama2", **SMALL)
    name = f"base_model.model.model.layers.0.self_attn.q_proj.{end}"
    odd = stored(plain, tmp_path / "odd", {**hf_tensors(plain), name: torch.zeros(2, 64)})
    run = refused(verb("plan", odd, tmp_path / "out"), "1 tensor of an adapter (LoRA)", name, "merge_and_unload")
    assert "\n  - " not in run.err


# --- tying


def test_tying_goes_both_ways(hf_model: HFModel, tmp_path: Path) -> None:
    """`safetensors.torch.save_model` keeps one of two names that share memory, and it may be the head's."""
    plain = hf_model("qwen2-tied", **SMALL)
    odd = renamed(plain, tmp_path / "odd", lambda name: HEAD if name == EMBEDDINGS else name)
    assert "stored as lm_head.weight alone" in notes_of(odd)
    back = round_trip(odd, tmp_path)
    same_tensors(hf_tensors(back), hf_tensors(plain))
    expected = hf_logits(plain, TOKENS)
    assert torch.equal(hf_logits(odd, TOKENS), expected)
    assert torch.equal(hf_logits(back, TOKENS), expected)
    refused(verb("plan", odd, tmp_path / "out", "--untie"), f"{EMBEDDINGS} (word_embeddings) is missing")
    refused(verb("plan", plain, tmp_path / "out", "--untie"), f"{HEAD} (output_layer) is missing", "leave --untie out")
    edit_config(odd, tie_word_embeddings=False)
    refused(verb("plan", odd, tmp_path / "out"), f"{EMBEDDINGS} (word_embeddings) is missing")


def test_a_model_without_head_that_is_not_tied(hf_model: HFModel, tmp_path: Path) -> None:
    odd = stored(hf_model("qwen2-tied", **SMALL), tmp_path / "odd", hf_tensors(hf_model("qwen2-tied", **SMALL)))
    edit_config(odd, tie_word_embeddings=False)
    refused(verb("plan", odd, tmp_path / "out"), "tie_word_embeddings is false in config.json", "set it to true")
    config = json.loads((odd / "config.json").read_text())
    del config["tie_word_embeddings"]
    (odd / "config.json").write_text(json.dumps(config))
    refused(verb("plan", odd, tmp_path / "out"), "config.json has no tie_word_embeddings", "set it to true")


# --- output biases that are 0


def zero_bias(source: Path, folder: Path, value: float = 0.0) -> Path:
    biases = {name: tensor * value for name, tensor in hf_tensors(source).items() if name.endswith("o_proj.bias")}
    return stored(source, folder, {**hf_tensors(source), **biases})  # some zeros are negative


def test_a_zero_output_bias_is_left_out_and_comes_back(hf_model: HFModel, tmp_path: Path) -> None:
    odd = zero_bias(hf_model("llama2", attention_bias=True, **SMALL), tmp_path / "odd")
    expected = hf_logits(odd, TOKENS)
    for number, forward in enumerate((hf_to_megatron, hf_to_torch_dist)):
        meg = forward(odd, tmp_path / f"meg{number}", tp=2)
        back = megatron_to_hf(meg, tmp_path / f"back{number}")
        tensors = hf_tensors(back)
        assert sorted(tensors) == sorted(hf_tensors(odd))
        assert torch.equal(hf_logits(back, TOKENS), expected)
        assert json.loads((back / "config.json").read_text()) == json.loads((odd / "config.json").read_text())
        for pair in ((odd, meg), (odd, back)):
            assert "EQUAL" in succeeded(verb("verify", *pair)).out
    content = rank_content(tmp_path / "meg0", "mp_rank_01")
    assert not [key for key in content["model"] if key.endswith("linear_proj.bias")]
    assert (content["args"].add_qkv_bias, content["args"].add_bias_linear) == (True, False)
    del content["args"].hf_config  # as after training: the configuration is then a reference's
    for rank in ("mp_rank_00", "mp_rank_01"):
        edit_rank(tmp_path / "meg0", rank, args=content["args"])
    trained = megatron_to_hf(tmp_path / "meg0", tmp_path / "trained", hf_config=odd)
    assert torch.equal(hf_logits(trained, TOKENS), expected)


def test_a_zero_output_bias_is_said_and_listed(hf_model: HFModel, tmp_path: Path) -> None:
    odd = zero_bias(hf_model("llama2", attention_bias=True, **SMALL), tmp_path / "odd")
    run = succeeded(verb("convert", odd, tmp_path / "cast", "--to", "hf", "--dtype", "bf16"))
    assert "the output biases of attention are 0 everywhere" in run.out
    manifest = json.loads((tmp_path / "cast" / "conversion.json").read_text())
    name = "model.layers.0.self_attn.o_proj.bias"
    assert f"{name} (0 everywhere)" in manifest["ignored"]
    assert hf_tensors(tmp_path / "cast")[name].dtype == torch.bfloat16
    assert "INTACT" in succeeded(verb("verify", tmp_path / "cast")).out


def test_an_output_bias_that_is_not_0_is_refused(hf_model: HFModel, tmp_path: Path) -> None:
    odd = zero_bias(hf_model("llama2", attention_bias=True, **SMALL), tmp_path / "odd", 1e-30)
    refused(verb("plan", odd, tmp_path / "out"), "a bias on only one of the attention output and the MLP")
    kept = zero_bias(hf_model("llama-bias", **SMALL), tmp_path / "all")  # which Megatron-LM has a place for
    assert HFSource(kept).spec.values["proj_bias"]
    same_tensors(hf_tensors(round_trip(kept, tmp_path)), hf_tensors(kept))


# --- dtypes


def test_the_model_s_dtype_is_that_of_most_bytes(hf_model: HFModel, tmp_path: Path) -> None:
    """PEFT keeps trained embeddings and head in float32."""
    plain = hf_model("llama2", dtype="bfloat16", **SMALL)
    wide = {
        name: tensor.float() if name in (EMBEDDINGS, HEAD) else tensor for name, tensor in hf_tensors(plain).items()
    }
    odd = stored(plain, tmp_path / "odd", wide)
    note = "taken for bfloat16, which most bytes are; stored otherwise: word_embeddings float32, output_layer float32"
    assert note in notes_of(odd)
    assert "--bf16" in succeeded(verb("args", odd)).out
    run = succeeded(verb("convert", odd, tmp_path / "meg"))
    assert note in run.out
    assert "differ from the model's dtype, bfloat16" in run.err
    args = rank_content(tmp_path / "meg")["args"]
    assert (args.params_dtype, args.bf16) == (torch.bfloat16, True)
    back = megatron_to_hf(tmp_path / "meg", tmp_path / "back")
    same_tensors(hf_tensors(back), wide)
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"


def test_another_dtype_in_config_json_is_said(hf_model: HFModel, tmp_path: Path) -> None:
    plain = hf_model("llama2", dtype="bfloat16", **SMALL)
    odd = stored(plain, tmp_path / "odd", hf_tensors(plain))
    assert "dtype" not in notes_of(odd)
    edit_config(odd, dtype="float16")
    assert "config.json says float16, but the weights are bfloat16" in notes_of(odd)
    assert HFSource(odd).spec.dtype.name == "bfloat16"

"""Quantised weights of every scheme: bit for bit what its definition says, at every cut, in every verb; and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_converters.basics.dtypes import BY_NAME
from megatron_converters.basics.errors import ConversionError
from megatron_converters.conversion.composing import Piece, Planner, Reader, StoredName
from megatron_converters.conversion.gathering import gather_chunks
from megatron_converters.formats.huggingface.quantised import decoded
from megatron_converters.formats.queue.handles import TensorHandle
from megatron_converters.storage import decoding
from megatron_converters.storage.safetensors import read
from tests.conversions import hf_to_megatron, megatron_to_hf
from tests.helpers import edit_config, hf_tensors, rank_content, refused, same_tensors, succeeded, verb
from tests.plain_llama import LAYERS, Tensors
from tests.quantised import DIM, GROUPS, HEADS, MLP, SCHEMES, compressed, in_bytes, micro_scaled, write

#: Width of the MLP where it is not the usual one: at TP 2, columns are cut within a byte.
WIDTHS = {"int4, rows": 154}
#: Schemes, one for each class, from which a Hugging Face folder is written again.
BACK = ("blocks, compressed", "int4, rows", "mxfp4")


def cut_by_hand(meaning: Tensors, layer: int, tp: int, rank: int) -> Tensors:
    """Matrices of a layer as a rank of `tp` holds them, by Megatron-LM's names."""

    def of(name: str) -> torch.Tensor:
        return meaning[f"model.layers.{layer}.{name}_proj.weight"]

    groups = range(rank * GROUPS // tp, (rank + 1) * GROUPS // tp)
    heads = {"q": HEADS // GROUPS * DIM, "k": DIM, "v": DIM}
    qkv = [of(f"self_attn.{name}")[group * rows :][:rows] for group in groups for name, rows in heads.items()]
    fc1 = [of(f"mlp.{name}").chunk(tp)[rank] for name in ("gate", "up")]
    return {
        "self_attention.linear_qkv": torch.cat(qkv),
        "self_attention.linear_proj": of("self_attn.o").chunk(tp, 1)[rank],
        "mlp.linear_fc1": torch.cat(fc1),
        "mlp.linear_fc2": of("mlp.down").chunk(tp, 1)[rank],
    }


def held(content: dict[str, Any], layer: int, names: Any) -> Tensors:
    return {name: content["model"][f"decoder.layers.{layer}.{name}.weight"] for name in names}


@pytest.mark.parametrize("name", SCHEMES)
def test_every_rank_has_what_the_codes_mean(name: str, tmp_path: Path) -> None:
    meaning = write(tmp_path / "hf", SCHEMES[name], WIDTHS.get(name, MLP))
    whole = rank_content(hf_to_megatron(tmp_path / "hf", tmp_path / "whole"))
    cut = hf_to_megatron(tmp_path / "hf", tmp_path / "cut", tp=2, pp=2)
    for layer in range(LAYERS):
        wanted = cut_by_hand(meaning, layer, 1, 0)
        same_tensors(held(whole, layer, wanted), wanted)
        for rank in range(2):
            wanted = cut_by_hand(meaning, layer, 2, rank)
            found = rank_content(cut, f"mp_rank_{rank:02d}_{layer:03d}")
            same_tensors(held(found, 0, wanted), wanted)
    if name in BACK:
        back = megatron_to_hf(cut, tmp_path / "back")
        same_tensors(hf_tensors(back), meaning)
        assert "quantization" not in (back / "config.json").read_text()


# Stacks of experts

EXPERTS, HIDDEN_MOE, EXPERT_MLP = 4, 64, 96
STACK_FAMILY = """
name: stacked-example
model_type: stacked_example
architecture: StackedExampleForCausalLM
base: qwen3_moe
tensors:
  expert_fc1:
    {names: ["model.layers.{layer}.mlp.experts.gate_up_proj"], layout: alternating, transposed: true, stacked: true, fused: null}
  expert_fc2: {names: ["model.layers.{layer}.mlp.experts.down_proj"], transposed: true, stacked: true, fused: null}
"""
MOE_CONFIG = {
    "model_type": "stacked_example",
    "architectures": ["StackedExampleForCausalLM"],
    "hidden_size": HIDDEN_MOE,
    "intermediate_size": 2 * HIDDEN_MOE,
    "moe_intermediate_size": EXPERT_MLP,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 16,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def write_stacks(folder: Path, store: Any, config: dict[str, Any]) -> tuple[Path, Tensors]:
    """Write a mixture whose stacked experts `store` quantises; returns its family file, and what stacks of rows mean."""
    generator = torch.Generator().manual_seed(0)
    h, shapes = HIDDEN_MOE, {"model.norm": (HIDDEN_MOE,)}
    shapes |= dict.fromkeys(("model.embed_tokens", "lm_head"), (16, h))
    for layer in range(2):
        parts = {"self_attn.q_proj": (64, h), "self_attn.k_proj": (32, h), "self_attn.v_proj": (32, h)}
        parts |= {"self_attn.o_proj": (h, 64), "mlp.gate": (EXPERTS, h)}
        parts |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), (16,))
        parts |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (h,))
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    meaning = {}
    for layer in range(2):
        for name, shape in (("gate_up_proj", (2 * EXPERT_MLP, h)), ("down_proj", (h, EXPERT_MLP))):
            stem = f"model.layers.{layer}.mlp.experts.{name}"
            made, meaning[stem] = store(generator, *shape)
            tensors |= {stem + end: tensor for end, tensor in made.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**MOE_CONFIG, "quantization_config": config}))
    family = folder.parent / "family.yaml"
    family.write_text(STACK_FAMILY)
    return family, meaning


def mxfp4_stack(generator: torch.Generator, rows: int, cols: int) -> tuple[Tensors, torch.Tensor]:
    """As GPT-OSS has it: rows are those of the weight, though its plain weights are stored transposed."""
    made = [micro_scaled(generator, rows, cols) for _ in range(EXPERTS)]
    blocks = torch.stack([pairs.reshape(rows, cols // 32, 16) for pairs, _, _ in made])
    return (
        {"_blocks": blocks, "_scales": torch.stack([exponents for _, exponents, _ in made])},
        torch.stack([exact.bfloat16() for _, _, exact in made]),
    )


def fp8_stack(generator: torch.Generator, rows: int, cols: int) -> tuple[Tensors, torch.Tensor]:
    """Codes and the scales of blocks, both of them transposed as plain weights are."""
    made = [in_bytes(40, 48, scale="scale", dtype=torch.float32)(generator, rows, cols) for _ in range(EXPERTS)]
    codes = torch.stack([each.tensors[".weight"].view(torch.uint8).T for each in made]).contiguous()
    scales = torch.stack([each.tensors["scale"].T for each in made]).contiguous()
    return {"": codes.view(torch.float8_e4m3fn), "_scale_inv": scales}, torch.stack([each.meaning for each in made])


STACKS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "mxfp4": (
        mxfp4_stack,
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
        "MXFP4, as bfloat16 unless",
    ),
    "fp8": (
        fp8_stack,
        {"quant_method": "fp8", "weight_block_size": [48, 40]},
        "float8_e4m3fn in blocks of 48×40, rounded to bfloat16",
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_stacks_of_experts(name: str, tmp_path: Path) -> None:
    store, config, words = STACKS[name]
    family, meaning = write_stacks(tmp_path / "hf", store, config)
    sizes = ("--tp", "2", "--pp", "2", "--ep", "2", "--etp", "2", "--family-file", family)
    run = succeeded(verb("convert", tmp_path / "hf", tmp_path / "out", *sizes))
    assert f"4 tensors: decoded from {words}" in run.out
    for rank in range(2):
        for part in range(2):
            found = rank_content(tmp_path / "out", f"mp_rank_{rank:02d}_001_{part:03d}")["model"]
            for local in range(2):
                gate_up, down = (
                    meaning[f"model.layers.1.mlp.experts.{name}"][2 * part + local]
                    for name in ("gate_up_proj", "down_proj")
                )
                fc1 = torch.cat([gate_up[0::2].chunk(2)[rank], gate_up[1::2].chunk(2)[rank]])
                wanted = {"linear_fc1": fc1, "linear_fc2": down.chunk(2, 1)[rank]}
                same_tensors(
                    {key: found[f"decoder.layers.0.mlp.experts.{key}.weight{local}"] for key in wanted}, wanted
                )


# Reading


def as_bits(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


def readers(folder: Path, name: str, rows: int, cols: int) -> tuple[Any, torch.Tensor]:
    """A weight of a scheme as safetensors itself has written it, and what it means."""
    scheme = SCHEMES[name]
    made = scheme.store(torch.Generator().manual_seed(1), rows, cols)
    save_file({f"a{end}": tensor.contiguous() for end, tensor in made.tensors.items()}, folder / "model.safetensors")
    (found,) = decoded(
        folder, {"quantization_config": scheme.config}, read(folder / "model.safetensors").tensors
    ).tensors.values()
    return found, made.meaning


@pytest.mark.parametrize(
    "name", ["int4, groups", "int4, float32 scales", "int4, rows", "mxfp4", "mxfp8", "rows, compressed"]
)
def test_any_rows_and_columns(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "STEP", 1000)
    found, meaning = readers(tmp_path, name, 90, 160)
    chosen = np.random.default_rng(0)
    for turned in (False, True):
        data, wanted = (found.transposed(), as_bits(meaning).T) if turned else (found, as_bits(meaning))
        assert (data.shape, isinstance(data, Reader)) == (wanted.shape, True)
        for _ in range(10):
            rows = chosen.integers(0, wanted.shape[0], 20)
            first, last = sorted(chosen.choice(wanted.shape[1], 2, replace=False).tolist())
            assert np.array_equal(data.read(rows, slice(first, last)), wanted[rows, first:last])
            assert np.array_equal(
                data.read(slice(first // 2, last // 2), slice(first, last)), wanted[first // 2 : last // 2, first:last]
            )


@pytest.mark.parametrize("name", ["int4, groups", "mxfp4", "rows, compressed"])
def test_it_crosses_the_queue(name: str, tmp_path: Path) -> None:
    found, meaning = readers(tmp_path, name, 90, 160)
    for data, wanted in ((found, meaning), (found.transposed(), meaning.T)):
        handle = TensorHandle(
            data.shape, data.dtype, [Piece(data, np.arange(data.shape[0]), 0, StoredName("here", "a"))]
        )
        assert torch.equal(pickle.loads(pickle.dumps(handle)), wanted)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("blocks", "float32"), ("int4, groups", "float16"), ("mxfp4", "float32"), ("rows, compressed", "float64")],
)
def test_another_dtype_is_rounded_once(name: str, dtype: str, tmp_path: Path) -> None:
    """From the product in float32, and not from what it is in bfloat16."""
    found, _ = readers(tmp_path, name, 90, 160)
    scheme, target = SCHEMES[name], BY_NAME[dtype]
    made = scheme.store(torch.Generator().manual_seed(1), 90, 160).product
    gathers = Planner().compose(np.arange(90), 0, 160, [Piece(found, np.arange(90), 0, StoredName("here", "a"))])
    chunks = [chunk.copy() for _, chunk in gather_chunks(gathers, (90, 160), target, "t")]
    assert np.array_equal(np.concatenate(chunks), made.to(target.torch).numpy().view(target.carrier))
    assert not torch.equal(made, made.bfloat16().float()) or name == "mxfp4"


def test_an_exponent_of_no_number_is_refused(tmp_path: Path) -> None:
    tensors = {
        "a.weight_packed": torch.zeros(4, 16, dtype=torch.uint8),
        "a.weight_scale": torch.full((4, 1), 127, dtype=torch.uint8),
    }
    tensors["a.weight_scale"][2] = 255
    save_file(tensors, tmp_path / "model.safetensors")
    (found,) = decoded(
        tmp_path, {"quantization_config": SCHEMES["mxfp4"].config}, read(tmp_path / "model.safetensors").tensors
    ).tensors.values()
    found.read(slice(0, 2), slice(0, 32))
    with pytest.raises(
        ConversionError, match=r"model\.safetensors: a\.weight_packed has scales in a\.weight_scale that are infinite"
    ):
        found.read(slice(0, 3), slice(0, 32))


def test_what_exceeds_float16_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "hf", SCHEMES["mxfp4"])
    run = verb("convert", tmp_path / "hf", tmp_path / "out", "--dtype", "fp16")
    refused(run, "times its scales holds values beyond the range of float16; convert to bfloat16")


# Verbs


@pytest.mark.parametrize("name", ["int4, groups", "one scale, vLLM"])
def test_verbs_know_it(name: str, tmp_path: Path) -> None:
    scheme = SCHEMES[name]
    hf, out = tmp_path / "hf", tmp_path / "out"
    meaning = write(hf, scheme)
    stored = load_file(hf / "model.safetensors")
    activations = {
        f"model.layers.{layer}.self_attn.{end}": torch.ones(1)
        for layer in range(LAYERS)
        for end in ("q_proj.input_scale", "k_scale")
    }
    names = list(stored)  # codes in one file, and all that belongs to them in another
    second = {name for name in names if name.endswith(("_scale", "_shape"))} | activations.keys()
    (hf / "model.safetensors").unlink()
    everything = {**stored, **activations}
    files = {name: f"model-0000{1 + (name in second)}-of-00002.safetensors" for name in everything}
    for file in set(files.values()):
        save_file({name: everything[name] for name in everything if files[name] == file}, hf / file, {"format": "pt"})
    (hf / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    words = f"decoded from {scheme.words}, rounded to bfloat16"
    left_out = "4 scales of activations, such as model.layers.0.self_attn.k_scale"
    planned = json.loads(succeeded(verb("plan", hf, out, "--tp", "2", "--json", "--no-measure")).out)
    assert planned["computed"] == {words: 2 * 2 * 4}
    assert (planned["source_tensors"], planned["casts"]) == (len(stored), {})
    assert planned["ignored"] == [left_out]
    run = succeeded(verb("convert", hf, out, "--tp", "2"))
    assert f"14 tensors: {words} unless --dtype says otherwise" in run.out
    assert f"{left_out}: left out" in run.out
    manifest = json.loads(next(out.rglob("conversion.json")).read_text())
    entries = [entry for file in manifest["files"].values() for entry in file["tensors"].values()]
    assert {entry.get("computed") for entry in entries} == {None, words}
    read_from = {where for entry in entries for where in entry["from"]}
    assert read_from == {f"{files[name]}: {name}" for name in stored}
    seen = json.loads(succeeded(verb("inspect", hf, "--json")).out)
    assert seen["weights"]["bytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert seen["parameters"]["total"] == sum(tensor.numel() for tensor in meaning.values())
    assert (seen["model"]["dtype"], "decoded from" in succeeded(verb("inspect", hf)).out) == ("bfloat16", True)
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in meaning.items()}, plain / "model.safetensors")
    shutil.copy(hf / "config.json", plain)
    edit_config(plain, quantization_config=None)
    for action in ("verify", "diff"):
        succeeded(verb(action, hf, out))
        succeeded(verb(action, plain, hf))
    wrong = next(name for name in meaning if "layers.1.mlp.down" in name)
    meaning[wrong][3, 5] += 1
    save_file({name: tensor.contiguous() for name, tensor in meaning.items()}, plain / "model.safetensors")
    run = verb("verify", plain, hf)
    assert run.code == 1 and "layer 1 fc2" in run.out and "layer 0" not in run.out, run


def test_a_wider_dtype_is_written_and_verified(tmp_path: Path) -> None:
    hf, out = tmp_path / "hf", tmp_path / "out"
    write(hf, SCHEMES["blocks"])
    planned = json.loads(succeeded(verb("plan", hf, out, "--dtype", "fp32", "--json", "--no-measure")).out)
    assert planned["computed"] == {"decoded from float8_e4m3fn in blocks of 64×48, rounded to float32": 8}
    succeeded(verb("convert", hf, out, "--dtype", "fp32", "--quiet"))
    succeeded(verb("verify", hf, out, "--as-cast"))
    manifest = json.loads(next(out.rglob("conversion.json")).read_text())
    for entry in (entry for file in manifest["files"].values() for entry in file["tensors"].values()):
        assert entry["dtype"] == "float32" and ("computed" in entry) != ("cast from" in entry), entry


# Refusals


def edit_tensors(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


_UP, _DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
FAULTS: dict[str, tuple[str, Callable[[Tensors], Any], list[str]]] = {
    "no scale": (
        "int4, groups",
        lambda tensors: [tensors.pop(f"{_UP}.weight_scale"), tensors.pop(f"{_DOWN}.weight_scale")],
        [f"{name}.weight_packed is int32, but there is no {name}.weight_scale" for name in (_UP, _DOWN)],
    ),
    "no shape": (
        "int4, groups",
        lambda tensors: tensors.pop(f"{_UP}.weight_shape"),
        [f"{_UP}.weight_packed is int32, but there is no {_UP}.weight_shape"],
    ),
    "no codes": (
        "int4, groups",
        lambda tensors: tensors.pop(f"{_UP}.weight_packed"),
        [f"{_UP}.weight_scale has no {_UP}.weight_packed", f"{_UP}.weight_shape has no {_UP}.weight_packed"],
    ),
    "another group": (
        "int4, groups",
        lambda tensors: tensors.update({f"{_UP}.weight_scale": torch.ones(MLP, 2)}),
        [
            f"{_UP}.weight_scale has shape [160, 2]; {_UP}.weight_packed of shape [160, 12], in groups of 32, has scales of",
            "shape [160, 3]",
        ],
    ),
    "another shape": (
        "int4, rows",
        lambda tensors: tensors.update({f"{_UP}.weight_shape": torch.tensor([MLP, 999])}),
        [f"{_UP}.weight_shape says [160, 999], but {_UP}.weight_packed has 160 rows of 12 × 8 elements"],
    ),
    "another shape, seen later": (
        "int4, groups",
        lambda tensors: tensors.update({f"{_UP}.weight_shape": torch.tensor([MLP, 95])}),
        [f"{_UP}.weight_packed holds [160, 96] elements, but {_UP}.weight_shape says [160, 95]"],
    ),
    "asymmetric": (
        "int4, groups",
        lambda tensors: tensors.update({f"{_UP}.weight_zero_point": torch.zeros(20, 3, dtype=torch.int32)}),
        [f"{_UP}.weight_zero_point", "the weights are asymmetric, which cannot be read"],
    ),
    "reordered": (
        "int4, groups",
        lambda tensors: tensors.update({f"{_UP}.weight_g_idx": torch.zeros(96, dtype=torch.int32)}),
        [f"{_UP}.weight_g_idx", "columns are in the order of activations, which cannot be read"],
    ),
    "both": (
        "int4, groups",
        lambda tensors: tensors.update({f"{_UP}.weight": torch.zeros(MLP, 96).bfloat16()}),
        [f"{_UP}.weight is there beside {_UP}.weight_packed"],
    ),
    "plain": (
        "rows, compressed",
        lambda tensors: tensors.update({f"{_UP}.weight": torch.zeros(MLP, 96).bfloat16()}),
        [f"{_UP}.weight_scale belongs to {_UP}.weight, which is bfloat16 instead of float8_e4m3fn"],
    ),
    "one scale for several": (
        "one scale, vLLM",
        lambda tensors: tensors.update({f"{_UP}.weight_scale": torch.ones(MLP, 1)}),
        [
            f"{_UP}.weight_scale has shape [160, 1]; {_UP}.weight of shape [160, 96], with one scale, has scales of shape [1, 1]"
        ],
    ),
    "two scales": (
        "one scale, vLLM",
        lambda tensors: tensors.update({f"{_UP}.weight_scale_inv": torch.ones(1)}),
        [f"{_UP}.weight has scales under two names, {_UP}.weight_scale_inv and {_UP}.weight_scale"],
    ),
    "exponents": (
        "mxfp8",
        lambda tensors: tensors.update({f"{_UP}.weight_scale": torch.ones(MLP, 3)}),
        [f"{_UP}.weight_scale is float32 instead of one of float8_e8m0fnu, uint8"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_do_not_belong_together(fault: str, tmp_path: Path) -> None:
    name, change, words = FAULTS[fault]
    write(tmp_path / "hf", SCHEMES[name])
    edit_tensors(tmp_path / "hf", change)
    refused(verb("convert", tmp_path / "hf", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.txt"))


_PACK = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "asymmetric": (compressed("pack-quantized", **{**_PACK, "symmetric": False}), "symmetric=False in group_0"),
    "reordered": (compressed("pack-quantized", **{**_PACK, "actorder": "group"}), "actorder=group in group_0"),
    "8 bits": (
        compressed("pack-quantized", **{**_PACK, "num_bits": 8}),
        "format=pack-quantized, num_bits=8, type=int, strategy=group",
    ),
    "tensor": (compressed("pack-quantized", **{**_PACK, "strategy": "tensor"}), "strategy=tensor"),
    "odd groups": (compressed("pack-quantized", **{**_PACK, "group_size": 33}), "group_size=33"),
    "nvfp4": (
        compressed("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16),
        "format=nvfp4-pack-quantized",
    ),
    "sparse": (
        {**compressed("pack-quantized", **_PACK), "sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparsity_config={",
    ),
    "rotated": (
        {**compressed("pack-quantized", **_PACK), "transform_config": {"config_groups": {"R1": {}}}},
        "transform_config={",
    ),
    "two kinds": (
        {
            **compressed("pack-quantized", **_PACK),
            "config_groups": {
                "a": {"weights": {**_PACK}},
                "b": {"weights": {**_PACK, "group_size": 64}},
            },
        },
        "2 ways to store weights in its groups instead of one",
    ),
    "no groups": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "config_groups=None"),
    "a preset": (
        {"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}},
        "config_groups={'W4A16'",
    ),
    "fp4 experts": (
        {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"},
        "expert_dtype=fp4",
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 128},
        "quantised by AWQ (4 bits, 128 to a group), which cannot be read",
    ),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "quantised by bitsandbytes, which cannot be read",
    ),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        "quantised by NVIDIA ModelOpt, which cannot be read",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    config, words = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    run = refused(verb("convert", tmp_path, tmp_path / "out"), words, "convert the unquantised model")
    assert len(run.err.strip().splitlines()) == 1, run.err


@pytest.mark.parametrize("name", ["int4, groups", "rows, compressed", "mxfp4"])
def test_weights_that_config_json_does_not_describe_are_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path / "hf", SCHEMES[name])
    edit_config(tmp_path / "hf", quantization_config=None)
    refused(
        verb("convert", tmp_path / "hf", tmp_path / "out"), "say that the weights are quantised (", "config.json has no"
    )


def test_the_first_key_of_compressed_tensors_is_read(tmp_path: Path) -> None:
    meaning = write(tmp_path / "hf", SCHEMES["rows, compressed"])
    config = {key: value for key, value in SCHEMES["rows, compressed"].config.items() if key != "quant_method"}
    edit_config(tmp_path / "hf", quantization_config=None, compression_config=config)
    succeeded(verb("convert", tmp_path / "hf", tmp_path / "out", "--to", "hf", "--quiet"))
    same_tensors(hf_tensors(tmp_path / "out"), meaning)
    assert "compression_config" not in (tmp_path / "out" / "config.json").read_text()


def test_a_text_part_may_be_quantised_alone(tmp_path: Path) -> None:
    """Its configuration says so then, within that of the wrapper."""
    hf, out = tmp_path / "hf", tmp_path / "out"
    meaning = write(hf, SCHEMES["int4, groups"])
    stored = load_file(hf / "model.safetensors")
    save_file({f"language_model.{name}": tensor for name, tensor in stored.items()}, hf / "model.safetensors")
    text = json.loads((hf / "config.json").read_text())
    wrapper = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}
    (hf / "config.json").write_text(json.dumps({**wrapper, "text_config": text}))
    succeeded(verb("convert", hf, out, "--text-only", "--to", "hf", "--quiet"))
    same_tensors(hf_tensors(out), meaning)
    assert "quantization_config" not in (out / "config.json").read_text()
    edit_config(hf, quantization_config=SCHEMES["mxfp4"].config)
    refused(verb("inspect", hf), "describes two quantisations, itself and in text_config")

"""Quantised weights of every scheme: bit for bit what its definition says, at every cut, in every verb; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.conversions import hf_to_megatron, megatron_to_hf
from tests.helpers import hf_tensors, rank_content, same_tensors, succeeded, verb
from tests.plain_llama import LAYERS, Tensors
from tests.quantised import DIM, GROUPS, HEADS, MLP, SCHEMES, in_bytes, micro_scaled, write

#: Width of the MLP where it is not the usual one: at TP 2, columns are cut within a byte.
WIDTHS = {"int4, rows": 154}


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
    """Mixture whose experts are stacked and quantised by `store`, its family file, and the meaning: [experts, rows, columns]."""
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
        torch.stack([meaning for _, _, meaning in made]),
    )


def fp8_stack(generator: torch.Generator, rows: int, cols: int) -> tuple[Tensors, torch.Tensor]:
    """Codes and the scales of blocks, both of them transposed as plain weights are."""
    made = [in_bytes(40, 48, scale="scale", dtype=torch.float32)(generator, rows, cols) for _ in range(EXPERTS)]
    codes = torch.stack([each.tensors[".weight"].view(torch.uint8).T for each in made]).contiguous()
    scales = torch.stack([each.tensors["scale"].T for each in made]).contiguous()
    return {"": codes.view(torch.float8_e4m3fn), "_scale_inv": scales}, torch.stack([each.meaning for each in made])


STACKS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "mxfp4": (mxfp4_stack, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}, "MXFP4"),
    "fp8": (
        fp8_stack,
        {"quant_method": "fp8", "weight_block_size": [48, 40]},
        "float8_e4m3fn in blocks of 48×40",
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_stacks_of_experts(name: str, tmp_path: Path) -> None:
    store, config, _ = STACKS[name]
    family, meaning = write_stacks(tmp_path / "hf", store, config)
    sizes = ("--tp", "2", "--pp", "2", "--ep", "2", "--etp", "2", "--family-file", family, "--quiet")
    succeeded(verb("convert", tmp_path / "hf", tmp_path / "out", *sizes))
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

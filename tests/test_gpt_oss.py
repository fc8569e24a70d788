"""GPT-OSS: where its tensors lie on ranks, by hand; its published form in MXFP4; its flags; and what is refused of it."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_converters.api import training_flags
from megatron_converters.basics.errors import ConversionError
from megatron_converters.families.config_json import infer_family, spec_from_config
from megatron_converters.formats.megatron.arguments import inexpressible
from megatron_converters.formats.mindspore.limits import without_place
from tests.conversions import hf_to_megatron, hf_to_torch_dist, megatron_to_hf
from tests.helpers import (
    args_of,
    config_of,
    edit_config,
    edit_rank,
    hf_tensors,
    rank_content,
    refused,
    same_tensors,
    succeeded,
    verb,
)

LAYERS, EXPERTS, HEADS, GROUPS, DIM, HIDDEN = 4, 8, 8, 4, 16, 64
#: Elements that a scale of MXFP4 is for, and numbers that its codes stand for, the first eight.
GROUP, NUMBERS = 32, (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
Tensors = dict[str, torch.Tensor]


def mxfp4(generator: torch.Generator, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bytes [experts, rows, groups, 16] and exponents [experts, rows, groups], and what they mean: [experts, rows, columns]."""
    codes = torch.randint(0, 16, (EXPERTS, rows, cols), generator=generator)
    exponents = torch.randint(118, 128, (EXPERTS, rows, cols // GROUP), generator=generator)
    numbers = torch.tensor([*NUMBERS, *(-number for number in NUMBERS)])[codes]
    meaning = (numbers * 2.0 ** (exponents - 127).repeat_interleave(GROUP, -1)).bfloat16()
    pairs = codes.reshape(EXPERTS, rows, -1, GROUP // 2, 2)
    blocks = pairs[..., 0] + 16 * pairs[..., 1]
    return blocks.to(torch.uint8), exponents.to(torch.uint8), meaning


def quantised(plain: Path, folder: Path) -> Tensors:
    """Write the model of `plain` with random experts in MXFP4, as it is published; returns the tensors that these mean."""
    generator, tensors = torch.Generator().manual_seed(0), hf_tensors(plain)
    stored = dict(tensors)
    for name in tensors:
        if name.endswith(("gate_up_proj", "down_proj")):
            rows = 2 * HIDDEN if "gate_up" in name else HIDDEN
            blocks, scales, meaning = mxfp4(generator, rows, HIDDEN)
            del stored[name]
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            tensors[name] = meaning.transpose(1, 2).contiguous()
    shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    without = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    edit_config(folder, quantization_config={"modules_to_not_convert": without, "quant_method": "mxfp4"})
    return tensors


def on_rank(tensors: Tensors, layer: int, tp: int, rank: int, experts: range) -> Iterator[tuple[str, torch.Tensor]]:
    """What a rank holds of a layer's attention and experts, by names in Transformer Engine's layers, cut by hand."""
    of = {name.removeprefix(f"model.layers.{layer}."): tensor for name, tensor in tensors.items()}
    groups = range(rank * GROUPS // tp, (rank + 1) * GROUPS // tp)
    heads = {"q": HEADS // GROUPS * DIM, "k": DIM, "v": DIM}
    for kind in ("weight", "bias"):
        parts = {part: of[f"self_attn.{part}_proj.{kind}"] for part in heads}
        packed = [parts[part][group * rows :][:rows] for group in groups for part, rows in heads.items()]
        yield f"self_attention.linear_qkv.{kind}", torch.cat(packed)
        yield f"mlp.router.{kind}", of[f"mlp.router.{kind}"]
    yield "self_attention.linear_proj.weight", of["self_attn.o_proj.weight"].chunk(tp, 1)[rank]
    yield "self_attention.linear_proj.bias", of["self_attn.o_proj.bias"]
    yield "self_attention.core_attention.softmax_offset", of["self_attn.sinks"].chunk(tp)[rank]
    for local, expert in enumerate(experts):
        gate_up, bias = of["mlp.experts.gate_up_proj"][expert].T, of["mlp.experts.gate_up_proj_bias"][expert]
        yield f"mlp.experts.linear_fc1.weight{local}", torch.cat([gate_up[0::2], gate_up[1::2]])
        yield f"mlp.experts.linear_fc1.bias{local}", torch.cat([bias[0::2], bias[1::2]])
        yield f"mlp.experts.linear_fc2.weight{local}", of["mlp.experts.down_proj"][expert].T
        yield f"mlp.experts.linear_fc2.bias{local}", of["mlp.experts.down_proj_bias"][expert]


def held(content: dict[str, Any], layer: int) -> Tensors:
    """Tensors of a layer in a rank's file, but for its norms."""
    start = f"decoder.layers.{layer}."
    found = {key.removeprefix(start): value for key, value in content["model"].items() if key.startswith(start)}
    return {
        key: value for key, value in found.items() if not key.endswith(("_extra_state", "norm_weight", "norm.weight"))
    }


@pytest.fixture(scope="module")
def published(hf_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    """A model as it is published, with experts in MXFP4, and what its tensors mean."""
    folder = tmp_path_factory.mktemp("published") / "hf"
    return folder, quantised(hf_model("gpt-oss", dtype="bfloat16"), folder)


def test_ranks_hold_what_mxfp4_means(published: tuple[Path, Tensors], tmp_path: Path) -> None:
    """Experts have square matrices here, so that no shape tells which way they lie."""
    folder, meaning = published
    cut = hf_to_megatron(folder, tmp_path / "cut", tp=2, pp=2, ep=2)
    whole = rank_content(hf_to_megatron(folder, tmp_path / "whole"))
    for layer in range(LAYERS):
        same_tensors(held(whole, layer), dict(on_rank(meaning, layer, 1, 0, range(EXPERTS))))
        for rank in range(2):  # the two ranks of a stage are those of tensors and those of experts
            content = rank_content(cut, f"mp_rank_{rank:02d}_{layer // 2:03d}_{rank:03d}")
            experts = range(rank * EXPERTS // 2, (rank + 1) * EXPERTS // 2)
            same_tensors(held(content, layer % 2), dict(on_rank(meaning, layer, 2, rank, experts)))


@pytest.mark.parametrize("target", [hf_to_megatron, hf_to_torch_dist])
def test_mxfp4_comes_back_as_plain_stacks(target: Any, published: tuple[Path, Tensors], tmp_path: Path) -> None:
    folder, meaning = published
    back = megatron_to_hf(target(folder, tmp_path / "out", tp=2, pp=2, ep=2), tmp_path / "back")
    same_tensors(hf_tensors(back), meaning)
    given = {key: value for key, value in config_of(folder).items() if key != "quantization_config"}
    assert config_of(back) == given


def test_mxfp4_means_what_transformers_makes_of_it(published: tuple[Path, Tensors]) -> None:
    from safetensors.torch import load_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder, meaning = published
    stored, name = load_file(folder / "model.safetensors"), "model.layers.2.mlp.experts.gate_up_proj"
    theirs = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
    assert torch.equal(theirs, meaning[name])


# Flags, and what has no place


ALWAYS = """--quick-geglu --glu-linear-offset --activation-func-clamp-value --window-size --window-attn-skip-freq --softmax-type
    --add-qkv-bias""".split()
#: Flags of YaRN, which 0.19 is the first to know.
YARN = """--position-embedding-type --rotary-scaling-factor --yarn-original-max-position-embeddings --yarn-beta-fast
    --yarn-beta-slow --no-yarn-correction-range-round-to-int""".split()


def test_flags(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    """Linears have biases, which no flag switches on; grouped experts with biases need a fusion switched off."""
    found = {name: dict(map(_flag, training_flags(hf_model(name)).flags)) for name in ("gpt-oss", "gpt-oss-yarn")}
    plain, yarn = found["gpt-oss"], found["gpt-oss-yarn"]
    assert {*ALWAYS} <= plain.keys()
    assert {"--disable-bias-linear", "--swiglu"}.isdisjoint(plain)
    assert plain["--window-size"] == "6,0"
    assert plain["--window-attn-skip-freq"] == "'[1,0,1,0]'"
    assert {*YARN} <= yarn.keys()
    assert yarn.keys() - plain.keys() == {*YARN[1:], "--mscale", "--mscale-all-dim"}
    sequential = succeeded(verb("convert", hf_model("gpt-oss"), tmp_path / "out", "--saver-transformer-impl", "local"))
    grouped = succeeded(verb("convert", hf_model("gpt-oss"), tmp_path / "out", "--overwrite"))
    assert "--no-bias-dropout-fusion" in grouped.out
    assert "--no-bias-dropout-fusion" not in sequential.out
    # Before the bias is added, the limit of the fused kernel means something else.
    assert "--no-bias-gelu-fusion" in sequential.out
    assert "--no-bias-gelu-fusion" not in grouped.out
    assert "needs Megatron-LM 0.15 or later" in grouped.out
    assert "--softmax-type learnable needs Transformer Engine 2.8 or later" in grouped.out


def _flag(shown: str) -> tuple[str, str]:
    name, _, value = shown.partition(" ")
    return name, value


def test_what_the_fused_kernel_has_trained_is_doubted(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    """Also where no configuration is recorded, from which the family is known."""
    out = hf_to_megatron(hf_model("gpt-oss"), tmp_path / "out", impl="local")
    words = "Megatron-LM's kernel applies the limit before it adds the biases"
    assert words not in succeeded(verb("inspect", out)).out
    kept = {name: value for name, value in vars(args_of(out)).items() if not name.startswith("hf_")}
    edit_rank(out, "mp_rank_00", args=Namespace(**{**kept, "bias_gelu_fusion": True}))
    found = succeeded(verb("inspect", out)).out
    assert words in found and "the gpt_oss family fits the args" in found
    assert words not in succeeded(verb("inspect", out, "--trained-by", "args")).out


def test_what_releases_and_formats_lack(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    convert = partial(verb, "convert", hf_model("gpt-oss-yarn"), tmp_path / "out")
    refused(convert("--tp", "2", "--etp", "2"), "experts with biases cannot be cut over etp=2", "use etp 1")
    for layout in ("stacked", "dynamic"):
        words = f"--expert-layout {layout}: experts that are stored so have no biases, and those of this model have"
        refused(convert("--expert-layout", layout), words, "use sequential or grouped", code=2)
    refused(convert("--megatron-version", "0.18"), "--yarn-beta-fast 6.0", "an effect from 0.19 on")
    refused(convert("--megatron-version", "0.14"), "--softmax-type learnable", "an effect from 0.15 on")
    refused(
        convert("--to", "mindspore"), "tensors without a name: sinks, router_bias, expert_fc1_bias, expert_fc2_bias"
    )
    assert not (tmp_path / "out").exists()


CONFIG = {
    **{"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "vocab_size": 32, "hidden_size": 64},
    **{"intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "num_local_experts": 4},
}
YARN_TABLE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"swiglu_alpha": 1.5},
            "swiglu_alpha=1.5; only 1.702 can be converted: Megatron-LM's quick GELU has this factor built in",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu' can be converted"),
        ({"swiglu_limit": "7"}, "activation_func_clamp_value is '7'"),
        ({"experts_per_token": 2}, "experts_per_token=2, which repeats num_experts_per_tok, and that is 4"),
        ({"initial_context_length": 512}, "initial_context_length=512, which repeats .*, and that is 4096"),
        (
            {"initial_context_length": 4096, "rope_scaling": YARN_TABLE},
            "initial_context_length=4096, .*, and that is 512",
        ),
        ({"quantization_config": {"quant_method": "mxfp4", "swizzle": True}}, "swizzle=True"),
        ({"sliding_window": None, "layer_types": ["sliding_attention"] * 3}, "its sliding_window is null"),
    ],
)
def test_configurations_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        spec_from_config({**CONFIG, **fields})


@pytest.mark.parametrize("fields", [{}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}])
def test_a_checkpoint_that_names_no_family_is_recognised(fields: dict[str, Any]) -> None:
    spec = spec_from_config({**CONFIG, **fields, "initial_context_length": 4096})
    assert inexpressible(spec) == []
    assert infer_family({name: value for name, value in spec.values.items() if name != "family"}) == spec
    assert list(without_place(spec))


def test_biases_of_experts_alone(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    """Megatron-LM has biases in all linears or in none: those that attention lacks are 0, and left out on the way back."""
    folder = hf_model("gpt-oss", attention_bias=False)
    out = hf_to_megatron(folder, tmp_path / "out", tp=2)
    zeros = held(rank_content(out), 0)
    for name in ("linear_qkv", "linear_proj"):
        assert not zeros[f"self_attention.{name}.bias"].any()
    assert zeros["mlp.experts.linear_fc2.bias0"].any()
    same_tensors(hf_tensors(megatron_to_hf(out, tmp_path / "back")), hf_tensors(folder))


OWN = {
    "num_experts": 32,
    "swiglu_limit": 7.0,
    "initial_context_length": 4096,
    "rope_ntk_alpha": 1.0,
    "rope_ntk_beta": 32.0,
}


def test_the_form_of_its_authors_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OWN))
    save_file({"embedding.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    for command in (("inspect", tmp_path), ("convert", tmp_path, tmp_path / "out")):
        refused(
            verb(*command),
            "describes GPT-OSS as OpenAI's own program has it (the folder original/",
            "convert the folder above",
        )

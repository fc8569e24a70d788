"""Phi: attention and MLP in parallel and a bias of the head, computed by megatron-core with layers of this project."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_converters as mc
from megatron_converters.basics.errors import ConversionError
from megatron_converters.conversion.stored_model import StoredModel, folded
from megatron_converters.families.config_json import config_from_spec, spec_from_config
from megatron_converters.model.layers import GELU_TANH, LAYER_NORM
from megatron_converters.model.spec import PerLayer
from megatron_converters.model.values import Affine
from tests.conversions import different, hf_to_megatron, hf_to_torch_dist, megatron_to_hf, reshard
from tests.helpers import (
    RANK_FILE,
    args_of,
    convert,
    hf_tensors,
    nothing_complete,
    rank_content,
    refused,
    succeeded,
    verb,
)
from tests.oracle.checkpoint import iteration_directory
from tests.oracle.errors import OracleError
from tests.oracle.hf import TOKENS, difference, hf_logits, make_model
from tests.oracle.jobs import gradients
from tests.oracle.layer_jobs import refusal
from tests.oracle.live_jobs import bridged, dropped_out
from tests.oracle.pool import MegatronPool
from tests.tiny import tiny_spec

VOCABULARY = 199
TOLERANCE = 1e-5
ALLOWED = dict(allow_inexpressible=True)
#: config.json of microsoft/phi-2, as published.
PHI_2: dict[str, Any] = {
    "_name_or_path": "microsoft/phi-2",
    "architectures": ["PhiForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "hidden_act": "gelu_new",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 10240,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "phi",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.4,
    "qk_layernorm": False,
    "resid_pdrop": 0.1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.37.0",
    "use_cache": True,
    "vocab_size": 51200,
}

HFModel = Callable[..., Path]
Logits = Callable[[str], torch.Tensor]


def edited(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the content of the first rank's file."""
    content = rank_content(root)
    change(content)
    torch.save(content, iteration_directory(root) / "mp_rank_00" / RANK_FILE)


# -- the table


def test_published_config_is_read_and_written() -> None:
    spec = spec_from_config(PHI_2)
    values = spec.values
    assert (values["parallel_block"], values["head_bias"], values["gated"]) == (True, True, False)
    assert (values["rotary_percent"], values["activation"], values["normalization"]) == (0.4, GELU_TANH, LAYER_NORM)
    assert (values["num_query_groups"], values["kv_channels"], values["norm_epsilon"]) == (32, 80, 1e-5)
    assert {"qkv_bias", "proj_bias", "mlp_bias"} <= {name for name, value in values.items() if value is True}
    written = config_from_spec(spec)
    decided = PHI_2.keys() & written.keys()
    assert {key: written[key] for key in decided} == {key: PHI_2[key] for key in decided}
    assert spec_from_config({**PHI_2, "num_key_value_heads": None}) == spec


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("qk_layernorm", True, "qk_layernorm=True; only False can be converted"),
        ("hidden_act", "silu", "hidden_act='silu'; only 'gelu_new'"),
        ("rope_scaling", {"type": "xdrope"}, "RoPE scaling of type 'xdrope'; supported are"),
    ],
)
def test_what_it_does_not_have_is_refused(key: str, value: object, words: str) -> None:
    with pytest.raises(ConversionError, match=words.replace("[", r"\[")):
        spec_from_config({**PHI_2, key: value})


def test_names_are_those_that_transformers_saves(hf_model: HFModel) -> None:
    tensors = hf_tensors(hf_model("phi"))
    layer = "model.layers.3."
    linears = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2")
    modules = [f"{layer}{name}" for name in (*linears, "input_layernorm")]
    wanted = [f"{name}.{kind}" for name in modules for kind in ("weight", "bias")]
    assert sorted(name for name in tensors if name.startswith(layer)) == sorted(wanted)
    assert {"model.final_layernorm.bias", "lm_head.bias"} <= tensors.keys()
    assert tensors["lm_head.bias"].abs().max() > 0.1


def test_blocks_of_both_kinds_in_one_model_are_refused() -> None:
    with pytest.raises(ConversionError, match="parallel_block differs between layers"):
        tiny_spec(parallel_block=PerLayer([True, False]))


def test_a_multiplier_of_logits_is_one_of_the_head_s_bias() -> None:
    model = folded(StoredModel(tiny_spec(head_bias=True, logits_multiplier=0.5)))
    assert (model.values["output_layer_bias"], model.values["final_norm"]) == (Affine(0.5), Affine(0.5))


# -- megatron-core


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
@pytest.mark.parametrize("sizes", [dict(), dict(tp=2, pp=2)], ids=["whole", "cut"])
@pytest.mark.parametrize("name", ["phi", "phi-tied"])
def test_megatron_computes_what_transformers_computes(
    megatron_pool: MegatronPool,
    hf_model: HFModel,
    logits: Logits,
    tmp_path: Path,
    name: str,
    sizes: dict[str, int],
    impl: str,
) -> None:
    folder, theirs = hf_model(name), logits(name)
    files = hf_to_megatron(folder, tmp_path / "files", impl=impl, **sizes, **ALLOWED)
    assert difference(megatron_pool.logits(files, TOKENS, **sizes, impl=impl), theirs) < TOLERANCE
    chunks = hf_to_torch_dist(folder, tmp_path / "chunks", impl=impl, **sizes, **ALLOWED)
    assert difference(megatron_pool.distributed_logits(chunks, TOKENS, impl=impl, tp=2, pp=1), theirs) < TOLERANCE
    for source in (files, chunks):
        back = megatron_to_hf(source, source / "hf")
        assert different(hf_tensors(folder), hf_tensors(back)) == []
        assert difference(hf_logits(back, TOKENS), theirs) == 0
    args = args_of(files)
    assert (args.spec, args.head_bias) == (["megatron_layers.parallel_shared_norm", "spec"], True)


@pytest.mark.parametrize("sizes", [dict(), dict(tp=2, pp=2), dict(pp=4)], ids=["whole", "cut", "stages"])
@pytest.mark.parametrize("name", ["phi", "phi-tied"])
def test_a_live_model_computes_what_transformers_computes(
    megatron_pool: MegatronPool, hf_model: HFModel, logits: Logits, name: str, sizes: dict[str, int]
) -> None:
    folder, theirs = hf_model(name), logits(name)
    found = megatron_pool.run(bridged, str(folder), TOKENS, sizes)
    parts = dict(shard for shard, _ in found if shard is not None)
    assert difference(torch.cat([parts[rank] for rank in sorted(parts)], dim=-1), theirs) < TOLERANCE
    tied = ["lm_head.weight"] if name == "phi-tied" and "lm_head.weight" in hf_tensors(folder) else []
    assert [names for _, names in found] == [tied] * 4


def test_virtual_stages_and_resharding(
    megatron_pool: MegatronPool, hf_model: HFModel, logits: Logits, tmp_path: Path
) -> None:
    folder, theirs = hf_model("phi"), logits("phi")
    split = mc.PipelineSplit(virtual=2)
    files = hf_to_megatron(folder, tmp_path / "virtual", impl="local", pp=2, split=split, **ALLOWED)
    assert difference(megatron_pool.logits(files, TOKENS, pp=2), theirs) < TOLERANCE
    again = reshard(files, tmp_path / "again", tp=2, pp=1, **ALLOWED)
    assert difference(megatron_pool.logits(again, TOKENS, tp=2, pp=1), theirs) < TOLERANCE


def test_the_head_s_bias_is_cut_and_padded_like_the_vocabulary(hf_model: HFModel, tmp_path: Path) -> None:
    """By hand: 199 rows, padded by repeating the last to 2 · 128, half on each rank of the last stage."""
    folder = hf_model("phi")
    root = hf_to_megatron(folder, tmp_path / "megatron", tp=2, pp=2, **ALLOWED)
    bias = hf_tensors(folder)["lm_head.bias"]
    padded = torch.cat([bias, bias[-1].expand(256 - VOCABULARY)])
    for rank in (0, 1):
        last = rank_content(root, f"mp_rank_{rank:02d}_001")["model"]
        assert torch.equal(last["output_layer.bias"], padded[rank * 128 :][:128])
        assert not any("pre_mlp_layernorm" in key or "layer_norm" in key for key in last)
        norm = hf_tensors(folder)["model.layers.2.input_layernorm.bias"]
        assert torch.equal(last["decoder.layers.0.input_layernorm.bias"], norm)
        assert "output_layer.bias" not in rank_content(root, f"mp_rank_{rank:02d}_000")["model"]


def test_gradients_are_those_of_transformers(megatron_pool: MegatronPool, hf_model: HFModel, tmp_path: Path) -> None:
    """Both blocks read the norm, so that its gradient has a part of each, from both ranks."""
    from transformers import AutoModelForCausalLM

    folder = hf_model("phi")
    names = {
        "decoder.layers.0.input_layernorm.weight": "model.layers.0.input_layernorm.weight",
        "decoder.layers.3.input_layernorm.bias": "model.layers.3.input_layernorm.bias",
        "decoder.layers.1.mlp.linear_fc2.bias": "model.layers.1.mlp.fc2.bias",
        "output_layer.bias": "lm_head.bias",
    }
    root = hf_to_megatron(folder, tmp_path / "megatron", tp=2, impl="local", **ALLOWED)
    found = megatron_pool.run(gradients, iteration_directory(root), TOKENS, VOCABULARY, list(names))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model(TOKENS, use_cache=False).logits.square().sum().backward()
    held = dict(model.named_parameters())
    for name, theirs in names.items():
        parts = [rank[name] for rank in found[:2]]
        whole = torch.cat(parts)[:VOCABULARY] if name == "output_layer.bias" else parts[0]
        expected = held[theirs].grad
        assert float((whole - expected).abs().max() / expected.abs().max()) < TOLERANCE, name


def test_attention_and_mlp_are_dropped_out_each_on_its_own(megatron_pool: MegatronPool) -> None:
    added, *outputs = megatron_pool.run(dropped_out, 0.5)[0]
    kept = [torch.stack([torch.zeros_like(output), 2 * output]) for output in outputs]
    cases = torch.stack([attention + mlp for attention in kept[0] for mlp in kept[1]])
    distance, case = (cases - added).detach().abs().min(dim=0)
    assert float(distance.max()) < 1e-4
    assert min(case.flatten().bincount(minlength=4)) > 150  # of 1024 elements, a quarter for each


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(), ""),
        (dict(recompute_granularity="selective", recompute_modules=["core_attn"]), ""),
        (dict(recompute_granularity="selective", recompute_modules=["mlp"]), "recompute_modules=['mlp']"),
        (dict(cuda_graph_impl="local", cuda_graph_scope="full"), "cuda_graph_impl='local', set it to 'none'"),
        (dict(num_moe_experts=4), "num_moe_experts: this layer of megatron_layers has an MLP"),
    ],
)
def test_options_that_a_parallel_block_does_not_heed_are_refused(
    megatron_pool: MegatronPool, options: dict[str, Any], words: str
) -> None:
    found = megatron_pool.run(refusal, "parallel_shared_norm", options)[0]
    assert words in found
    assert bool(words) == bool(found)


@pytest.mark.usefixtures("preloaded")
def test_logits_are_verified(hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_model("phi")
    root = hf_to_megatron(folder, tmp_path / "megatron", tp=2, **ALLOWED)
    succeeded(verb("verify", folder, root, "--logits"))
    edited(root, lambda content: content["model"]["output_layer.bias"].add_(0.1))
    assert verb("verify", folder, root, "--logits").code != 0


# -- negative controls


def test_layers_that_run_one_after_the_other_show(
    megatron_pool: MegatronPool, hf_model: HFModel, tmp_path: Path
) -> None:
    folder = hf_model("phi")
    root = hf_to_megatron(folder, tmp_path / "megatron", impl="local", **ALLOWED)
    edited(root, lambda content: setattr(content["args"], "spec", None))
    with pytest.raises(OracleError, match="pre_mlp_layernorm"):
        megatron_pool.logits(root, TOKENS)


def test_a_head_without_its_bias_shows(
    megatron_pool: MegatronPool, hf_model: HFModel, logits: Logits, tmp_path: Path
) -> None:
    folder, theirs = hf_model("phi"), logits("phi")
    root = hf_to_megatron(folder, tmp_path / "megatron", impl="local", **ALLOWED)
    edited(root, lambda content: content["model"]["output_layer.bias"].zero_())
    assert difference(megatron_pool.logits(root, TOKENS), theirs) > 1e-3
    edited(root, lambda content: setattr(content["args"], "head_bias", False))
    with pytest.raises(OracleError, match=r"output_layer\.bias"):
        megatron_pool.logits(root, TOKENS)


# -- what cannot hold it


@pytest.mark.parametrize("options", [(), ("--ckpt-format", "torch_dist"), ("--ckpt-format", "model_pt")])
def test_files_are_refused_unless_asked_for(hf_model: HFModel, tmp_path: Path, options: tuple[str, ...]) -> None:
    words = ("a bias of the output layer", "live only, through AutoBridge")
    command = ("convert", hf_model("phi"), tmp_path / "out", "--to", "megatron", *options)
    refused(verb(*command), *words, "--allow-inexpressible")
    nothing_complete(tmp_path / "out")
    run = succeeded(verb(*command, "--allow-inexpressible"))
    assert "warning: Megatron-LM will not compute a bias of the output layer" in run.err
    succeeded(verb("convert", tmp_path / "out", tmp_path / "back"))
    assert different(hf_tensors(hf_model("phi")), hf_tensors(tmp_path / "back")) == []
    refused(verb("args", hf_model("phi")), *words)


def test_mindspore_has_no_place_for_it(hf_model: HFModel, tmp_path: Path) -> None:
    words = ("attention and MLP in parallel: its layers", "output_layer_bias")
    refused(verb("convert", hf_model("phi"), tmp_path / "out", "--to", "mindspore"), *words)
    assert not (tmp_path / "out").exists()


def test_it_is_no_other_family(hf_model: HFModel, tmp_path: Path) -> None:
    run = verb("convert", hf_model("phi"), tmp_path / "out", "--to", "hf", "--as", "starcoder2")
    refused(run, "parallel_block: True, not False", code=2)


def test_the_queue_carries_it(hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_model("phi-tied")
    options = (
        "--loader",
        "llama_mistral",
        "--saver",
        "mcore",
        "--load-dir",
        folder,
        "--save-dir",
        tmp_path / "megatron",
    )
    refused(convert(*options), "--allow-inexpressible")
    succeeded(convert(*options, "--allow-inexpressible", "--target-tensor-parallel-size", 2))
    assert different(hf_tensors(folder), hf_tensors(megatron_to_hf(tmp_path / "megatron", tmp_path / "hf"))) == []


def test_inspection_says_so(hf_model: HFModel, tmp_path: Path) -> None:
    root = hf_to_megatron(hf_model("phi"), tmp_path / "megatron", tp=2, **ALLOWED)
    shown = succeeded(verb("inspect", root, "--html", tmp_path / "page.html")).out
    assert "parallel block" in shown
    assert "query, key and value, attention output, MLP, output layer" in shown
    assert json.loads(succeeded(verb("inspect", root, "--json")).out)


def test_longrope_of_phi_3_is_said_and_its_weights_come_back(tmp_path: Path) -> None:
    divisors = [1.0 + 0.2 * number for number in range(6)]
    rope = dict(rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.75, short_factor=divisors)
    hf = make_model(
        "phi3-partial",
        tmp_path / "hf",
        max_position_embeddings=4096,
        original_max_position_embeddings=512,
        rope_parameters={**rope, "long_factor": [2 * divisor for divisor in divisors]},
    )
    refused(
        verb("convert", hf, tmp_path / "meg"), "LongRoPE: each rotary frequency", "multiplied by 1.1547", "--allow-inex"
    )
    nothing_complete(tmp_path / "meg")
    run = succeeded(verb("convert", hf, tmp_path / "meg", "--allow-inexpressible"))
    assert "warning: Megatron-LM will not compute LongRoPE" in run.out + run.err
    back = megatron_to_hf(tmp_path / "meg", tmp_path / "back")
    assert different(hf_tensors(hf), hf_tensors(back)) == []
    assert (back / "config.json").read_text() == (hf / "config.json").read_text()
    refused(verb("verify", hf, tmp_path / "meg", "--logits"), "would compute another model", "LongRoPE", code=2)

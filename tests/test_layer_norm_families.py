"""Families with LayerNorm or with an MLP that has no gate: published configs, what files lack, and what Megatron-LM lacks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_converters.families.config_json import config_from_spec, spec_from_config
from tests.conversions import different, hf_to_megatron, hf_to_torch_dist, megatron_to_hf
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
from tests.oracle.live_jobs import bridged
from tests.oracle.pool import MegatronPool

HFModel = Callable[..., Path]
ALLOWED = dict(allow_inexpressible=True)

# -- published configs

_SUMMARY = dict.fromkeys(("summary_activation", "summary_first_dropout", "summary_type")) | dict(
    summary_proj_to_labels=True, summary_use_proj=True
)
_DROPOUT = dict(attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1)
_NEOX = dict(
    model_type="gpt_neox",
    architectures=["GPTNeoXForCausalLM"],
    **dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=16, num_hidden_layers=24, vocab_size=50304),
    **dict(hidden_act="gelu", layer_norm_eps=1e-5, max_position_embeddings=2048, initializer_range=0.02),
    **dict(rotary_emb_base=10000, rotary_pct=0.25, tie_word_embeddings=False, use_cache=True),
)
#: By repository: config.json as published, and some of what it means.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bigcode/starcoder": (
        dict(
            model_type="gpt_bigcode",
            architectures=["GPTBigCodeForCausalLM"],
            activation_function="gelu",
            **dict(attention_softmax_in_fp32=True, scale_attention_softmax_in_fp32=True, scale_attn_weights=True),
            **dict(inference_runner=0, max_batch_size=None, max_sequence_length=None, pad_key_length=True),
            **dict(pre_allocate_kv_cache=False, validate_runner_input=True, multi_query=True),
            **dict(n_embd=6144, n_head=48, n_inner=24576, n_layer=40, n_positions=8192, vocab_size=49152),
            **_SUMMARY,
            **_DROPOUT,
        ),
        dict(num_query_groups=1, activation="gelu", kv_channels=128, tied=True),
    ),
    "cerebras/Cerebras-GPT-111M": (
        dict(
            model_type="gpt2",
            architectures=["GPT2LMHeadModel"],
            activation_function="gelu",
            **dict(n_embd=768, n_head=12, n_inner=3072, n_layer=10, n_positions=2048, vocab_size=50257),
            **dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, scale_attn_weights=True, layer_norm_epsilon=1e-5),
        ),
        dict(activation="gelu", max_position_embeddings=2048, tied=True),
    ),
    "distilbert/distilgpt2": (
        dict(
            model_type="gpt2",
            architectures=["GPT2LMHeadModel"],
            activation_function="gelu_new",
            **dict(_num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}, task_specific_params={"a": {}}),
            **dict(n_ctx=1024, n_embd=768, n_head=12, n_layer=6, n_positions=1024, vocab_size=50257),
            **_SUMMARY,
            **_DROPOUT,
        ),
        dict(ffn_hidden_size=3072),
    ),
    "allenai/OLMo-1B-hf": (
        dict(
            model_type="olmo",
            architectures=["OlmoForCausalLM"],
            **dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=16, num_hidden_layers=16),
            **dict(attention_bias=False, clip_qkv=None, num_key_value_heads=16, pretraining_tp=1, rope_scaling=None),
            **dict(rope_theta=10000.0, tie_word_embeddings=True, vocab_size=50304, max_position_embeddings=2048),
        ),
        dict(norm_epsilon=1e-5, normalization="LayerNorm", mlp_bias=False, tied=True),
    ),
    "stabilityai/stablelm-2-1_6b": (
        dict(
            model_type="stablelm",
            architectures=["StableLmForCausalLM"],
            **dict(hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_hidden_layers=24),
            **dict(num_key_value_heads=32, partial_rotary_factor=0.25, rope_theta=10000, use_qkv_bias=True),
            **dict(hidden_act="silu", layer_norm_eps=1e-5, vocab_size=100352, max_position_embeddings=4096),
        ),
        dict(qkv_bias=True, proj_bias=False, rotary_percent=0.25, gated=True),
    ),
    "nvidia/Minitron-4B-Base": (
        dict(
            model_type="nemotron",
            architectures=["NemotronForCausalLM"],
            **dict(hidden_size=3072, intermediate_size=9216, num_attention_heads=24, num_hidden_layers=32),
            **dict(num_key_value_heads=8, head_dim=128, partial_rotary_factor=0.5, rope_percent=0.5, rope_theta=10000),
            **dict(hidden_act="relu2", norm_eps=1e-5, vocab_size=256000, attention_bias=False, mlp_bias=False),
        ),
        dict(zero_centred=True, activation="squared_relu", rotary_percent=0.5),
    ),
    "an older Nemotron": (
        dict(
            model_type="nemotron",
            architectures=["NemotronForCausalLM"],
            **dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=32),
            **dict(num_key_value_heads=None, rope_percent=0.75),
        ),
        dict(num_query_groups=4, rotary_percent=0.75),
    ),
    "adept/persimmon-8b-base": (
        dict(
            model_type="persimmon",
            architectures=["PersimmonForCausalLM"],
            **dict(hidden_size=4096, intermediate_size=16384, num_attention_heads=64, num_hidden_layers=36),
            **dict(num_key_value_heads=64, partial_rotary_factor=0.5, qk_layernorm=True, rope_theta=25000.0),
            **dict(hidden_act="relu2", hidden_dropout=0.0, vocab_size=262144, max_position_embeddings=16384),
        ),
        dict(qk_norm="each head", num_query_groups=64, rotary_percent=0.5),
    ),
    "EleutherAI/pythia-1.4b": (
        _NEOX | dict(use_parallel_residual=True),
        dict(parallel_block=True, parallel_norms=True, activation="gelu", rotary_percent=0.25),
    ),
    "EleutherAI/gpt-neox-20b": (
        _NEOX | dict(hidden_act="gelu_fast", attention_probs_dropout_prob=0, hidden_dropout_prob=0),
        dict(parallel_block=True, activation="gelu_tanh"),
    ),
    "togethercomputer/RedPajama-INCITE-Base-3B-v1": (
        _NEOX | dict(use_parallel_residual=False, rotary_pct=1.0),
        dict(parallel_block=False, parallel_norms=False, rotary_percent=1.0),
    ),
    "facebook/opt-125m": (
        dict(
            model_type="opt",
            architectures=["OPTForCausalLM"],
            **dict(_remove_final_layer_norm=False, activation_dropout=0.0, activation_function="relu", dropout=0.1),
            **dict(do_layer_norm_before=True, ffn_dim=3072, hidden_size=768, init_std=0.02, layerdrop=0.0),
            **dict(max_position_embeddings=2048, num_attention_heads=12, num_hidden_layers=12, vocab_size=50272),
            **dict(prefix="</s>", word_embed_proj_dim=768, pad_token_id=1),
        ),
        dict(activation="relu", tied=True, learned_positions=True, ffn_hidden_size=3072),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_and_written(name: str) -> None:
    config, meaning = PUBLISHED[name]
    spec = spec_from_config(config)
    assert {key: spec.values[key] for key in meaning} == meaning
    written = config_from_spec(spec)
    assert spec_from_config(written) == spec
    if name == "EleutherAI/gpt-neox-20b":
        assert (written["rotary_pct"], written["rotary_emb_base"]) == (0.25, 10000)  # as older programs read it


# -- slots that files leave out


def _edited(root: Path, change: Callable[[dict[str, torch.Tensor]], object], rank: str = "mp_rank_00") -> None:
    content = rank_content(root, rank)
    change(content["model"])
    torch.save(content, iteration_directory(root) / rank / RANK_FILE)


def test_norms_without_tensors_become_ones_and_zeros(hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_model("olmo-bias")
    root = tmp_path / "megatron"
    run = succeeded(verb("convert", folder, root, "--dtype", "bf16"))
    assert "no tensors where Megatron-LM has weights: 1 in input_norm, mlp_norm, final_norm; 0 in" in run.out
    held = rank_content(root)["model"]
    for name in ("decoder.layers.2.self_attention.linear_qkv.layer_norm", "decoder.layers.3.mlp.linear_fc1.layer_norm"):
        assert torch.equal(held[f"{name}_weight"], torch.ones(64, dtype=torch.bfloat16))
        assert torch.equal(held[f"{name}_bias"], torch.zeros(64, dtype=torch.bfloat16))
    assert not held["decoder.layers.0.mlp.linear_fc1.bias"].any()
    assert held["decoder.layers.0.self_attention.linear_proj.bias"].any()
    plan = succeeded(verb("plan", folder, tmp_path / "planned")).out
    assert f"{len(hf_tensors(folder))} source tensors, each read once" in plan
    assert "verify" not in succeeded(verb("verify", folder, root, "--as-cast")).out


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("decoder.layers.1.mlp.linear_fc1.layer_norm_weight", 1.0 + 2**-20, "layer 1 mlp_norm"),
        ("decoder.final_layernorm.bias", 2**-30, "final_norm_bias"),
        ("decoder.layers.0.mlp.linear_fc2.bias", float("nan"), "layer 0 fc2_bias"),
    ],
)
def test_what_training_has_changed_of_them_is_refused(
    hf_model: HFModel, tmp_path: Path, key: str, value: float, words: str
) -> None:
    """Also where the change would vanish in the dtype that is written."""
    root = hf_to_megatron(hf_model("olmo-bias"), tmp_path / "megatron")
    _edited(root, lambda held: held[key].__setitem__(5, value))
    run = verb("convert", root, tmp_path / "back", "--dtype", "bf16")
    refused(
        run,
        words,
        key,
        "in all elements (the first other is in row 5)",
        "the configuration describes has no tensor for",
    )
    nothing_complete(tmp_path / "back")
    if "mlp_norm" in words:  # which this family has weights for
        succeeded(verb("convert", hf_model("olmo"), tmp_path / "other", "--to", "hf", "--as", "stablelm"))
        norm = hf_tensors(tmp_path / "other")["model.norm.weight"]
        assert torch.equal(norm, torch.ones(64))


def test_the_queue_carries_what_no_file_holds(hf_model: HFModel, tmp_path: Path) -> None:
    folder, root = hf_model("olmo"), tmp_path / "megatron"
    options = ("--loader", "llama_mistral", "--saver", "mcore", "--load-dir", folder, "--save-dir", root)
    succeeded(convert(*options, "--target-tensor-parallel-size", 2))
    assert torch.equal(rank_content(root)["model"]["decoder.final_layernorm.weight"], torch.ones(64))
    assert different(hf_tensors(folder), hf_tensors(megatron_to_hf(root, tmp_path / "hf"))) == []


# -- positions with rows that nothing reads


def test_opt_s_positions_begin_two_rows_later(hf_model: HFModel, tmp_path: Path) -> None:
    folder, name = hf_model("opt-gelu"), "model.decoder.embed_positions.weight"
    files = tmp_path / "files"
    run = succeeded(verb("convert", folder, files))
    assert f"2 rows of {name}, which the model does not read, are left out" in run.out
    theirs = hf_tensors(folder)
    assert torch.equal(rank_content(files)["model"]["embedding.position_embeddings.weight"], theirs[name][2:])
    chunks = hf_to_torch_dist(folder, tmp_path / "chunks")
    for number, source in enumerate((files, chunks)):
        back = tmp_path / f"back{number}"
        run = succeeded(verb("convert", source, back))
        assert f"2 rows at the beginning of {name}, which the model does not read, are 0" in run.out
        ours = hf_tensors(back)
        assert different(theirs, ours) == [name]
        assert torch.equal(ours[name], torch.cat([torch.zeros(2, 64), theirs[name][2:]]))
        succeeded(verb("verify", back))
        succeeded(verb("verify", folder, back))


# -- what Megatron-LM has no arguments for


def test_it_is_refused_unless_asked_for(hf_model: HFModel, tmp_path: Path) -> None:
    name, words = "opt", "an MLP of ReLU"
    command = ("convert", hf_model(name), tmp_path / "out", "--to", "megatron")
    refused(verb(*command), words, "AutoBridge's live models compute it", "--allow-inexpressible")
    nothing_complete(tmp_path / "out")
    refused(verb("args", hf_model(name)), words)
    run = succeeded(verb(*command, "--allow-inexpressible"))
    assert f"warning: Megatron-LM will not compute {words}" in run.err


def test_mindspore_has_no_parallel_blocks(hf_model: HFModel, tmp_path: Path) -> None:
    command = ("convert", hf_model("gpt_neox-parallel"), tmp_path / "out", "--to", "mindspore")
    refused(verb(*command), "attention and MLP in parallel: its layers run one after the other")


def test_a_live_model_with_parallel_blocks_of_two_norms(
    megatron_pool: MegatronPool, hf_model: HFModel, logits: Callable[[str], torch.Tensor]
) -> None:
    from tests.oracle.hf import TOKENS, difference

    name = "gpt_neox-parallel"
    found = megatron_pool.run(bridged, str(hf_model(name)), TOKENS, dict(tp=2, pp=2))
    parts = dict(shard for shard, _ in found if shard is not None)
    assert difference(torch.cat([parts[rank] for rank in sorted(parts)], dim=-1), logits(name)) < 1e-5


def test_a_head_under_its_name_in_memory(hf_model: HFModel, tmp_path: Path) -> None:
    """transformers holds `lm_head`, and files that are saved so have it; published ones have `embed_out`."""
    folder = hf_model("gpt_neox")
    tensors = hf_tensors(folder)
    shutil.copytree(folder, tmp_path / "hf", ignore=shutil.ignore_patterns("*.safetensors"))
    head = tensors.pop("embed_out.weight" if "embed_out.weight" in tensors else "lm_head.weight")
    for name in ("embed_out.weight", "lm_head.weight"):
        save_file({**tensors, name: head}, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
        root = hf_to_megatron(tmp_path / "hf", tmp_path / name, tp=2)
        assert torch.equal(rank_content(root)["model"]["output_layer.weight"], head[:128])
    save_file(
        {**tensors, "embed_out.weight": head, "lm_head.weight": head.clone()}, tmp_path / "hf" / "model.safetensors"
    )
    refused(verb("convert", tmp_path / "hf", tmp_path / "both", "--to", "megatron"), "lm_head.weight is not a tensor")


def test_nemotron_s_norms_are_said_by_both_attributes(hf_model: HFModel, tmp_path: Path) -> None:
    run = succeeded(verb("convert", hf_model("nemotron"), tmp_path / "local", "--transformer-impl", "local"))
    assert "warning: --transformer-impl local: Megatron-LM builds --apply-layernorm-1p from" in run.err
    args = args_of(tmp_path / "local")
    assert (args.apply_layernorm_1p, args.layernorm_zero_centered_gamma, args.squared_relu) == (True, True, True)
    shown = succeeded(verb("args", tmp_path / "local")).out
    flags = {line.removesuffix(" \\").strip() for line in shown.splitlines()}
    wanted = {"--apply-layernorm-1p", "--squared-relu", "--rotary-percent 0.5", "--disable-bias-linear"}
    assert wanted | {"--normalization LayerNorm", "--norm-epsilon 0.001"} <= flags
    # A training run without a record of the conversion is known by its args alone.
    content = rank_content(tmp_path / "local")
    del content["args"].hf_config
    torch.save(content, iteration_directory(tmp_path / "local") / "mp_rank_00" / RANK_FILE)
    back = megatron_to_hf(tmp_path / "local", tmp_path / "back")
    assert json.loads((back / "config.json").read_text())["model_type"] == "nemotron"
    assert different(hf_tensors(hf_model("nemotron")), hf_tensors(back)) == []


def test_arcee_s_yarn_needs_a_release(hf_model: HFModel, tmp_path: Path) -> None:
    shutil.copytree(hf_model("arcee"), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    yarn = {"rope_type": "yarn", "factor": 20.0, "original_max_position_embeddings": 4096, "mscale": 1.0}
    config = json.loads(path.read_text())
    config["rope_parameters"] |= yarn | {"beta_fast": 32.0, "beta_slow": 1.0}
    path.write_text(json.dumps(config))
    words = ("convert", tmp_path / "hf", tmp_path / "out", "--to", "megatron", "--megatron-version")
    refused(verb(*words, "0.18"), "Megatron-LM 0.18", "--yarn-beta-fast", "from 0.19 on")
    assert "--yarn-beta-fast 32.0" in succeeded(verb(*words, "0.19")).out

"""Checkpoints without args, whose model a file of the program that wrote them describes: plain values, used like args."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_converters.bridge import AutoBridge
from megatron_converters.formats.megatron.arguments import spec_fields
from megatron_converters.formats.megatron.config_fields import args_of_fields
from megatron_converters.live.buildable_args import activation, provider_fields
from megatron_converters.model.layers import GELU, GELU_TANH, SQUARED_RELU
from tests.conversions import different, hf_to_megatron
from tests.helpers import edit_rank, hf_tensors, nothing_complete, refused, same_tensors, succeeded, verb
from tests.oracle import by_hand_dist
from tests.oracle.hf import make_model
from tests.test_megatron_args import CASES, all_args
from tests.tiny import tiny_spec

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SIZES = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=48)
#: Fields of the model, as a GPTModelProvider of Megatron-Bridge has them.
PROVIDER: dict[str, Any] = {
    "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
    "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "bf16": False,
    "ffn_hidden_size": 48,
    "gated_linear_unit": True,
    "hidden_size": 32,
    "hf_model_id": "someone/model",
    "kv_channels": 4,
    "layernorm_epsilon": 1.0e-05,
    "make_vocab_size_divisible_by": 128,
    "normalization": "RMSNorm",
    "num_attention_heads": 8,
    "num_layers": 2,
    "num_moe_experts": None,
    "num_query_groups": 4,
    "params_dtype": {"_target_": "torch.float32", "_call_": False},
    "position_embedding_type": "rope",
    "qk_layernorm": False,
    "rope_scaling": False,
    "rope_scaling_factor": 1.0,
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "seq_len_interpolation_factor": None,
    "seq_length": 512,
    "share_embeddings_and_output_weights": False,
    "should_pad_vocab": True,
    "transformer_layer_spec": {"_target_": "os.system", "_args_": ["touch ran"], "_call_": True},
    "vocab_size": 199,
    "window_size": None,
    "yarn_mscale": None,
}
CHECKPOINT = "iter_0000001"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama2", tmp_path_factory.mktemp("hf") / "llama2", **SIZES)


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distributed checkpoint without args, as the programs of these files write it."""
    root = by_hand_dist.convert(model, tmp_path_factory.mktemp("dist"))
    torch.save({"iteration": 1}, root / CHECKPOINT / "common.pt")
    return root


@pytest.fixture
def bare(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "bare")
    return tmp_path / "bare"


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content))


def as_text(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields as ModelOpt writes them: everything but text, integers and switches as its `str`."""
    dropped = ("fp4", "fp8", "tp_", "parallel", "cuda_graph", "init_", "cpu", "recompute", "pipeline", "comm", "batch")
    kept = {name: value for name, value in fields.items() if not any(part in name for part in dropped)}
    return {name: value if isinstance(value, (bool, int, str)) else str(value) for name, value in kept.items()}


def transformer_config() -> dict[str, Any]:
    """Fields of megatron-core's TransformerConfig for the model, from the source of the installed release."""
    (core,) = (Path(folder) / "core" for folder in importlib.import_module("megatron").__path__)
    fields: dict[str, Any] = {}
    for file in ("model_parallel_config.py", "transformer/transformer_config.py"):
        classes = [node for node in ast.parse((core / file).read_text()).body if isinstance(node, ast.ClassDef)]
        for line in classes[0].body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                literal = isinstance(line.value, ast.Constant)
                fields[line.target.id] = ast.literal_eval(line.value) if literal and line.value is not None else None
    assert len(fields) > 200
    return fields | {name: value for name, value in PROVIDER.items() if name in fields}


NESTED = {name: value for name, value in PROVIDER.items() if name not in ("share_embeddings_and_output_weights",)}
#: Files that say all of the model, by where they lie.
COMPLETE: dict[str, tuple[str, dict[str, Any]]] = {
    "Megatron-Bridge": (f"{CHECKPOINT}/run_config.yaml", {"model": PROVIDER, "train": {"train_iters": 1}}),
    "Megatron-LM after 0.19": (
        f"{CHECKPOINT}/run_config.yaml",
        {"model": {"transformer": NESTED, "share_embeddings_and_output_weights": False, "_builder_": "x.Y"}},
    ),
    "NeMo": ("context/model.yaml", {"_target_": "nemo.LlamaModel", "config": PROVIDER, "tokenizer": {}}),
}


def converted_exactly(source: Path, model: Path, target: Path, described_by: str) -> None:
    """Assert that a conversion without a reference gives the model back."""
    run = succeeded(verb("convert", source, target))
    assert f"{described_by} describes its model" in run.out + run.err
    assert different(hf_tensors(model), hf_tensors(target)) == []
    ours, written = (json.loads((folder / "config.json").read_text()) for folder in (model, target))
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "vocab_size", "model_type")
    assert {name: written[name] for name in names} == {name: ours[name] for name in names}


@pytest.mark.parametrize("program", COMPLETE)
def test_no_reference_is_needed(program: str, bare: Path, model: Path, tmp_path: Path) -> None:
    """Nor is anything run that the file names."""
    path, content = COMPLETE[program]
    write(bare / path, content)
    converted_exactly(bare, model, tmp_path / "hf", Path(path).name)
    assert not any(folder.joinpath("ran").exists() for folder in (Path(), bare, bare / CHECKPOINT))


def test_other_heads_of_a_reference_are_refused(bare: Path, tmp_path: Path) -> None:
    """Equal shapes, but queries, keys and values in another order: the logits would be off by whole units."""
    other = make_model("llama2", tmp_path / "other", **SIZES, num_attention_heads=4, num_key_value_heads=2)
    assert {t.shape for t in hf_tensors(other).values()} >= {torch.Size([16, 32])}
    write(bare / CHECKPOINT / "run_config.yaml", {"model": PROVIDER})
    words = ("is another model than the checkpoint", "num_attention_heads: 4, not 8", "run_config.yaml")
    refused(verb("convert", bare, tmp_path / "hf", "--hf-config", other), *words)
    refused(verb("verify", other, bare, "--hf-config", other), *words, code=2)
    nothing_complete(tmp_path / "hf")


def test_modelopt_s_text_needs_no_reference(bare: Path, model: Path, tmp_path: Path) -> None:
    """It writes what a provider has besides, too."""
    more = {name: value for name, value in PROVIDER.items() if name != "_target_"}
    text = as_text({**transformer_config(), **more, "activation_func": torch.nn.functional.silu})
    assert (text["layernorm_epsilon"], text["window_size"]) == ("1e-05", "None")
    assert text["activation_func"].startswith("<function silu at")
    write(bare / CHECKPOINT / "modelopt_run_config.yaml", text | {"nvidia_modelopt_version": "0.40.0"})
    converted_exactly(bare, model, tmp_path / "hf", "modelopt_run_config.yaml")


@pytest.mark.parametrize("folder", ["", f"{CHECKPOINT}/"])
def test_verl_s_file_says_heads_and_little_more(folder: str, bare: Path, model: Path, tmp_path: Path) -> None:
    """A TransformerConfig without functions: a reference must say the rest, and is checked against it."""
    config = {name: value for name, value in transformer_config().items() if not isinstance(value, dict)}
    write(bare / f"{folder}transformer_config.json", config)
    missing = ("does not say max_position_embeddings, position_embedding_type, swiglu", "--hf-config DIR")
    refused(verb("inspect", bare), "transformer_config.json", *missing)
    succeeded(verb("convert", bare, tmp_path / "hf", "--hf-config", model))
    same_tensors(hf_tensors(tmp_path / "hf"), hf_tensors(model))
    write(bare / f"{folder}transformer_config.json", {**config, "layernorm_epsilon": 1e-6})
    run = succeeded(verb("inspect", bare, "--hf-config", model))
    assert f"warning: taken from {model}: norm_epsilon: 1e-05, not 1e-06 of " in run.out
    write(bare / f"{folder}transformer_config.json", {**config, "num_query_groups": None, "num_attention_heads": 4})
    refused(verb("inspect", bare, "--hf-config", model), "is another model than the checkpoint")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layernorm_epsilon": None}, "run_config.yaml, which describes its model, does not say layernorm_epsilon"),
        ({"rotary_base": None}, "does not say rotary_base"),
        ({"num_layers": "two"}, "no valid num_layers"),
        ({"hidden_size": 0}, "no valid hidden_size"),
        ({"position_embedding_type": "yarn"}, "position_embedding_type='yarn' without rotary_scaling_factor"),
        ({"output_logit_softcapping": 30.0}, "output_logit_softcapping=30.0"),
        ({"activation_func": {"_target_": "nemo.fn.activation.openai_gelu"}}, "mlp_activation='openai_gelu, gated'"),
        ({"softmax_type": "off-by-one"}, "softmax_type='off-by-one'; only 'vanilla' and 'learnable'"),
    ],
)
def test_what_a_file_leaves_open_or_cannot_mean(change: dict[str, Any], reason: str, bare: Path) -> None:
    write(bare / CHECKPOINT / "run_config.yaml", {"model": {**PROVIDER, **change}})
    refused(verb("inspect", bare), reason)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model: !!python/object/apply:os.system ['touch ran']", "could not determine a constructor"),
        ("model: [", "run_config.yaml, line"),
        (
            "a: &a [x,x,x,x,x,x,x,x,x]\n"
            + "".join(f"{b}: &{b} [{','.join(9 * ['*' + a])}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
            "aliases",
        ),
    ],
    ids=["code", "broken", "aliases"],
)
def test_a_file_that_is_no_list_of_plain_values(text: str, reason: str, bare: Path) -> None:
    (bare / CHECKPOINT / "run_config.yaml").write_text(text)
    refused(verb("inspect", bare), reason)


def test_a_file_without_a_model_is_none(bare: Path) -> None:
    write(bare / CHECKPOINT / "run_config.yaml", {"train": {}})
    refused(verb("inspect", bare), "common.pt has no args", "no run_config.yaml", "--hf-config DIR")


def test_nemo_s_scaling(bare: Path) -> None:
    """Its Llama31Config applies llama3 scaling by itself, with constants of its own."""
    scaling = {"scale_factor": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
    write(bare / "context/model.yaml", {"config": {**PROVIDER, **scaling}})
    run = succeeded(verb("inspect", bare))
    assert "llama3, factor 32, low 1, high 4, from 8192 positions" in run.out and "warning" not in run.out


@pytest.mark.parametrize("family", ["llama3.1", "glm", "gpt2", "deepseek-v3-yarn", "mistral-window"])
def test_models_of_other_kinds(family: str, hf_model: Callable[..., Path], tmp_path: Path) -> None:
    """Their AutoBridge writes the file, and its settings are checked against megatron-core in tests/test_bridge_files.py."""
    folder = hf_model(family, **(dict(attn_pdrop=0.0) if family == "gpt2" else {}))
    AutoBridge.import_ckpt(folder, tmp_path / "megatron", show_progress=False)
    torch.save({"iteration": 1}, next((tmp_path / "megatron").glob("iter_*")) / "common.pt")
    assert "EQUAL" in succeeded(verb("verify", folder, tmp_path / "megatron")).out


def test_files_of_ranks_without_args(model: Path, tmp_path: Path) -> None:
    root = hf_to_megatron(model, tmp_path / "megatron", tp=2)
    for rank in ("mp_rank_00", "mp_rank_01"):
        edit_rank(root, rank, args=None)
    refused(verb("inspect", root), "the file of rank 0 has no args")
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1}
    write(root / CHECKPOINT / "run_config.yaml", {"model": {**PROVIDER, **sizes}})
    converted_exactly(root, model, tmp_path / "hf", "run_config.yaml")


def test_args_come_first(made: Path, model: Path, tmp_path: Path) -> None:
    """Where a checkpoint has args, as slime's have beside ModelOpt's file, these describe the model."""
    root = by_hand_dist.convert(model, tmp_path / "dist")
    write(root / CHECKPOINT / "run_config.yaml", {"model": {**PROVIDER, "rotary_base": 7}})
    assert "describes its model" not in succeeded(verb("inspect", root)).out


#: Models that a provider can have: none has multipliers or sparse attention.
BUILT = {name: fields for name, fields in CASES.items() if name != "multipliers" and "dsa_indexer_topk" not in fields}
FUNCTIONS = {
    "silu": "torch.nn.functional.silu",
    "gelu": "torch._C._nn.gelu",
    "gelu_tanh": "torch._C._nn.gelu",
    "squared_relu": "megatron.core.activations.squared_relu",
    "quick_gelu": "megatron.core.fusions.fused_bias_geglu.quick_gelu",
}


@pytest.mark.parametrize("fields", BUILT.values(), ids=BUILT)
def test_args_of_a_provider_s_fields_are_the_args_that_it_was_made_from(fields: dict[str, Any]) -> None:
    args = all_args(tiny_spec(**fields))
    named = activation(args)
    provided = provider_fields(args) | {"activation_func": {"_target_": FUNCTIONS[named], "_call_": False}}
    provided |= {"bias_activation_fusion": named == "gelu_tanh"}
    if args.get("spec"):  # as bridge/run_config.py writes it
        provided |= {"transformer_layer_spec": {"_target_": ".".join(args["spec"]), "_call_": False}}
    read, meant = (spec_fields(argparse.Namespace(**values)) for values in (args_of_fields(provided), args))
    of_training = {"initializer_range", "moe_aux_loss_coeff"}
    assert meant.keys() - read.keys() <= of_training
    assert {name: value for name, value in meant.items() if name not in of_training}.items() <= read.items()


@pytest.mark.parametrize(
    ("function", "gated", "fused", "meant"),
    [
        ("<function silu at 0x7f0>", True, True, {"swiglu": True}),
        ("<built-in function gelu>", False, True, {"swiglu": False, "squared_relu": False, "bias_gelu_fusion": True}),
        ("gelu", False, True, {"swiglu": False, "squared_relu": False, "bias_gelu_fusion": False}),
        ("swiglu", False, True, {"swiglu": True}),
        ("<function quick_gelu at 0x7f0>", True, True, {"swiglu": False, "quick_geglu": True}),
        ("squaredrelu", False, False, {"swiglu": False, "squared_relu": True}),
        ("<built-in function gelu>", True, False, {"swiglu": False, "mlp_activation": "gelu, gated"}),
        ("silu", False, False, {"swiglu": False, "mlp_activation": "silu, not gated"}),
    ],
)
def test_functions_by_their_text(function: str, gated: bool, fused: bool, meant: dict[str, Any]) -> None:
    fields = {"activation_func": function, "gated_linear_unit": gated, "bias_activation_fusion": fused}
    assert {name: value for name, value in args_of_fields(fields).items() if name not in fields} == meant
    assert {GELU, GELU_TANH, SQUARED_RELU} <= {*FUNCTIONS}


@pytest.mark.parametrize(
    ("given", "layer"),
    [
        (
            {"_target_": "megatron.bridge.models.olmoe.olmoe_provider.olmoe_layer_spec", "_call_": False},
            "norms_over_heads",
        ),
        ("<function exaone4_layer_spec at 0x7f0>", "post_norms"),
        ({"_target_": "megatron.bridge.models.gpt_provider.default_layer_spec", "_call_": False}, None),
        (None, None),
    ],
)
def test_layers_by_the_functions_that_make_their_specs(given: Any, layer: str | None) -> None:
    found = args_of_fields({"transformer_layer_spec": given}).get("spec")
    assert found == (None if layer is None else [f"megatron_layers.{layer}", "spec"])

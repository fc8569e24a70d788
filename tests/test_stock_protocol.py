"""Our plugins with the stock tools' own: the contract of Megatron-LM's tools/checkpoint/convert.py, message by message.

The other side is a stand-in that knows nothing of the package. Where MEGATRON_LM_TREES says where trees of Megatron-LM are, the
real convert.py of its main branch takes the place of the stand-in's. With real plugins: `test_trees`.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.forked import forked_script
from tests.helpers import (
    ROOT,
    Run,
    args_of,
    config_of,
    convert_back,
    finished,
    hf_tensors,
    nothing_complete,
    refused,
    same_tensors,
    start,
    succeeded,
)
from tests.oracle.args import megatron_args
from tests.oracle.by_hand_mindspore import write_by_hand
from tests.test_trees import folder_of

HFModel = Callable[..., Path]
Messages = list[Any]

#: What stock convert.py does: plugins by the end of a module's name or by all of it, old names for some, a torch.multiprocessing
#: queue, a saver process, no exit code.
CONVERT = """
import argparse, importlib
import torch.multiprocessing as mp

def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, conflict_handler="resolve")
    for name in ("--model-type", "--loader", "--saver", "--load-dir", "--save-dir"):
        parser.add_argument(name, type=str, required=True)
    parser.add_argument("--max-queue-size", type=int, default=50)
    parser.add_argument("--no-checking", action="store_false", dest="checking")
    known, _ = parser.parse_known_args()
    plugins = []
    for kind in ("loader", "saver"):
        name = {"megatron": "legacy", "mcore": "core"}.get(getattr(known, kind), getattr(known, kind))
        try:
            plugins.append(importlib.import_module(f"{kind}_{name}"))
        except ModuleNotFoundError:
            plugins.append(importlib.import_module(name))
        plugins[-1].add_arguments(parser)
    args = parser.parse_args()
    queue = mp.Queue(maxsize=args.max_queue_size)
    process = mp.Process(target=plugins[1].save_checkpoint, args=(queue, args))
    process.start()
    plugins[0].load_checkpoint(queue, args)
    process.join()
    print("SAVER", process.exitcode, flush=True)

if __name__ == "__main__":
    main()
"""
#: A saver that keeps what it receives, as the stock ones read it.
KEEPING_SAVER = """
import os, torch

def add_arguments(parser):
    parser.add_argument("--keep", required=True)

def save_checkpoint(queue, args):
    messages = [queue.get()]
    while messages[-1] not in ("done", "exit"):
        messages.append(queue.get())
        if isinstance(messages[-1], dict):
            messages[-1] = {key: value.clone() if key != "name" else value for key, value in messages[-1].items()}
    if hasattr(messages[0], "megatron_converters"):
        del messages[0].megatron_converters
    torch.save(messages, args.keep)
"""
#: A loader that sends what it is given, as the stock ones do.
GIVEN_LOADER = """
import torch

def add_arguments(parser):
    parser.add_argument("--give", required=True)

def load_checkpoint(queue, args):
    for message in torch.load(args.give, weights_only=False):
        queue.put(message)
"""


@pytest.fixture(scope="module", params=["stand-in", "Megatron-LM"])
def tools(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like Megatron-LM's tools/checkpoint with our files copied into it, and nothing else of ours anywhere."""
    folder = tmp_path_factory.mktemp("tools") / "checkpoint"
    folder.mkdir()
    if request.param == "stand-in":
        (folder / "convert.py").write_text(CONVERT)
    else:
        shutil.copy(folder_of("main") / "tools" / "checkpoint" / "convert.py", folder)
    for path in (*ROOT.glob("loaders/loader_*.py"), *ROOT.glob("savers/saver_*.py")):
        shutil.copy(path, folder)
    shutil.copytree(
        ROOT / "megatron_converters", folder / "megatron_converters", ignore=shutil.ignore_patterns("__pycache__")
    )
    # What stock convert.py makes of `--saver mcore` and `--loader mcore`.
    shutil.copy(folder / "saver_mcore.py", folder / "saver_core.py")
    (folder / "saver_keeping.py").write_text(KEEPING_SAVER)
    (folder / "loader_given.py").write_text(GIVEN_LOADER)
    return folder


def stock(
    tools: Path, loader: str, saver: str, load_dir: Path, save_dir: Path, *options: Any, anew: bool = False
) -> Run:
    """Run convert.py: the stand-in in a forked process that has torch already, unless `anew`."""
    common = (
        "--model-type",
        "GPT",
        "--loader",
        loader,
        "--saver",
        saver,
        "--load-dir",
        load_dir,
        "--save-dir",
        save_dir,
    )
    script = tools / "convert.py"
    if anew or script.read_text() != CONVERT:
        return finished(start(script, *common, *options, cwd=tools.parent))
    return forked_script(script, *common, *options, cwd=tools.parent)


def packed(tensors: dict[str, torch.Tensor], prefix: str, kind: str, config: dict[str, Any]) -> torch.Tensor:
    """Query, key and value as Megatron-LM has them: per group its queries, its key, its value."""
    groups = config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    each = [tensors[f"{prefix}self_attn.{part}_proj.{kind}"] for part in "qkv"]
    rows = [part.reshape(groups, -1, dim, *part.shape[1:]) for part in each]
    return torch.cat(rows, dim=1).reshape(-1, *each[0].shape[1:])


def expected_messages(source: Path) -> Messages:
    """The dictionaries that stock loader_llama_mistral sends for a model, written by hand."""
    tensors, config = hf_tensors(source), config_of(source)
    messages: Messages = [{"name": "embeddings", "word embeddings": tensors["model.embed_tokens.weight"]}]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        message = {
            "name": f"transformer layer {layer}",
            "input norm weight": tensors[prefix + "input_layernorm.weight"],
            "post norm weight": tensors[prefix + "post_attention_layernorm.weight"],
            "mlp l0 weight W": tensors[prefix + "mlp.gate_proj.weight"],
            "mlp l0 weight V": tensors[prefix + "mlp.up_proj.weight"],
            "qkv weight": packed(tensors, prefix, "weight", config),
            "dense weight": tensors[prefix + "self_attn.o_proj.weight"],
            "mlp l1 weight": tensors[prefix + "mlp.down_proj.weight"],
        }
        if prefix + "self_attn.q_proj.bias" in tensors:
            message["qkv bias"] = packed(tensors, prefix, "bias", config)
        if prefix + "mlp.up_proj.bias" in tensors:
            message |= {
                "dense bias": tensors[prefix + "self_attn.o_proj.bias"],
                "mlp l0 bias W": tensors[prefix + "mlp.gate_proj.bias"],
                "mlp l0 bias V": tensors[prefix + "mlp.up_proj.bias"],
                "mlp l1 bias": tensors[prefix + "mlp.down_proj.bias"],
            }
        messages.append(message)
    messages.append({"name": "final norm", "weight": tensors["model.norm.weight"]})
    if not config["tie_word_embeddings"]:
        messages.append({"name": "output layer", "weight": tensors["lm_head.weight"]})
    return messages


# --- our loaders, a saver that is not ours


@pytest.mark.parametrize("family", ["llama3.1", "llama-bias", "qwen2", "qwen2-tied", "mistral"])
def test_our_loader_sends_what_a_stock_saver_reads(family: str, hf_model: HFModel, tools: Path, tmp_path: Path) -> None:
    source, keep = hf_model(family, dtype="bfloat16"), tmp_path / "messages.pt"
    succeeded(stock(tools, "llama_mistral", "keeping", source, tmp_path / "out", "--keep", keep))
    metadata, *dicts, last = torch.load(keep, weights_only=False)
    assert last == "done"
    expected = expected_messages(source)
    assert [message["name"] for message in dicts] == [message["name"] for message in expected]
    for ours, theirs in zip(dicts, expected, strict=True):
        same_tensors(*({key: value for key, value in message.items() if key != "name"} for message in (ours, theirs)))
        assert all(value.is_contiguous() for key, value in ours.items() if key != "name")
    config = config_of(source)
    told = {
        "model_type": "GPT",
        "num_layers": 4,
        "hidden_size": 64,
        "seq_length": min(4096, config["max_position_embeddings"]),
        "num_attention_heads": 8,
        "max_position_embeddings": config["max_position_embeddings"],
        "tokenizer_type": "HuggingFaceTokenizer",
        "iteration": 1,
        "params_dtype": torch.bfloat16,
        "bert_binary_head": True,
        "output_layer": not config["tie_word_embeddings"],
        "position_embedding_type": "rope",
        "linear_bias": family == "llama-bias",
        "qkv_bias": family.startswith(("qwen2", "llama-bias")),
        "norm_has_bias": False,
        "swiglu": True,
        "previous_tensor_parallel_size": 1,
        "previous_pipeline_parallel_size": 1,
        "true_vocab_size": 199,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    assert {name: getattr(metadata, name, "absent") for name in told} == told
    assert hasattr(metadata, "make_vocab_size_divisible_by")
    args = metadata.checkpoint_args
    assert isinstance(args, Namespace)
    rope = config["rope_parameters"]
    assert (args.rotary_base, args.norm_epsilon, args.bf16) == (rope["rope_theta"], config["rms_norm_eps"], True)
    assert args.params_dtype is torch.bfloat16
    assert (args.num_query_groups, args.kv_channels) == (4, config.get("head_dim", 8))


@pytest.mark.parametrize("family", ["qwen2", "llama2"])
def test_our_loader_of_mindspore_s_weights(family: str, hf_model: HFModel, tools: Path, tmp_path: Path) -> None:
    """bf16 as the documentation has it; stock savers take it from the metadata and the arguments."""
    folder, keep = hf_model(family, dtype="bfloat16"), tmp_path / "messages.pt"
    source = write_by_hand(folder, tmp_path / "ms", mlp="contiguous")
    sizes = ("--num-attention-heads", 8, "--num-query-groups", 4, "--padded-vocab-size", 199, "--seq-length", 512)
    succeeded(stock(tools, "core_mf", "keeping", source, tmp_path / "out", "--keep", keep, *sizes, "--swiglu"))
    metadata, *dicts, last = torch.load(keep, weights_only=False)
    assert last == "done"
    for ours, theirs in zip(dicts, expected_messages(folder), strict=True):
        same_tensors(*({key: value for key, value in message.items() if key != "name"} for message in (ours, theirs)))
    told = (metadata.num_layers, metadata.hidden_size, metadata.num_attention_heads, metadata.params_dtype)
    assert told == (4, 64, 8, torch.bfloat16)
    assert (metadata.swiglu, metadata.linear_bias, metadata.output_layer) == (True, False, True)
    args = metadata.checkpoint_args
    assert (args.num_query_groups, args.ffn_hidden_size, args.bf16) == (4, 112, True)


def test_a_saver_that_is_not_ours_gets_no_model_that_megatron_lacks(
    hf_model: HFModel, tools: Path, tmp_path: Path
) -> None:
    """It would write another model without saying so; ours say it themselves."""
    source = shutil.copytree(hf_model("qwen2"), tmp_path / "hf")
    (source / "config.json").write_text(json.dumps({**config_of(source), "is_causal": False}))
    keep = ("--keep", tmp_path / "messages.pt")
    run = stock(tools, "llama_mistral", "keeping", source, tmp_path / "out", *keep)
    refused(run, "attention to later tokens", "--allow-inexpressible", code=run.code)
    run = stock(tools, "llama_mistral", "keeping", source, tmp_path / "out", *keep, "--allow-inexpressible")
    assert "will not compute attention to later tokens" in run.out + run.err
    assert torch.load(tmp_path / "messages.pt", weights_only=False)[-1] == "done"


def test_a_stock_saver_needs_a_divisor(hf_model: HFModel, tools: Path, tmp_path: Path) -> None:
    """saver_base hands `make_vocab_size_divisible_by` to Megatron's parser, unless it is None."""
    keep = tmp_path / "messages.pt"
    options = ("--keep", keep, "--make-vocab-size-divisible-by", 64)
    succeeded(stock(tools, "llama_mistral", "keeping", hf_model("llama2"), tmp_path / "out", *options))
    assert torch.load(keep, weights_only=False)[0].make_vocab_size_divisible_by == 64


def test_our_loader_of_checkpoints_and_casting(
    megatron_model: Callable[..., tuple[Path, Path]], tools: Path, tmp_path: Path
) -> None:
    source, meg = megatron_model("qwen2")
    keep = tmp_path / "messages.pt"
    succeeded(stock(tools, "core", "keeping", meg, tmp_path / "out", "--keep", keep, "--bf16"))
    metadata, *dicts, last = torch.load(keep, weights_only=False)
    assert last == "done"
    assert (metadata.params_dtype, metadata.previous_tensor_parallel_size) == (torch.bfloat16, 2)
    for ours, theirs in zip(dicts, expected_messages(source), strict=True):
        cast = {key: value.bfloat16() for key, value in theirs.items() if key != "name"}
        same_tensors({key: value for key, value in ours.items() if key != "name"}, cast)


def test_a_failing_loader_tells_a_stock_saver(tools: Path, tmp_path: Path) -> None:
    run = stock(tools, "llama_mistral", "keeping", tmp_path / "nothing", tmp_path / "out", "--keep", tmp_path / "kept")
    assert run.code == 2
    assert "nothing does not exist" in run.err
    assert torch.load(tmp_path / "kept", weights_only=False) == ["exit"]


# --- loaders that are not ours, our savers


def stock_messages(source: Path, **changes: Any) -> Messages:
    """Everything that stock loader_core sends, "done" twice included. `changes` are attributes of the metadata."""
    config = config_of(source)
    tied = config["tie_word_embeddings"]
    dtype = hf_tensors(source)["model.norm.weight"].dtype
    args = megatron_args(
        layernorm_epsilon=config["rms_norm_eps"],
        rotary_base=int(config["rope_parameters"]["rope_theta"]),
        kv_channels=config.get("head_dim"),
        untie_embeddings_and_output_weights=not tied,
        params_dtype=dtype,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
    )
    metadata = SimpleNamespace(
        model_type="GPT",
        num_layers=4,
        hidden_size=64,
        seq_length=512,
        num_attention_heads=8,
        max_position_embeddings=512,
        tokenizer_type="HuggingFaceTokenizer",
        iteration=7,
        params_dtype=dtype,
        bert_binary_head=True,
        output_layer=not tied,
        position_embedding_type="rope",
        linear_bias=False,
        qkv_bias=config["model_type"] == "qwen2",
        norm_has_bias=False,
        swiglu=True,
        previous_tensor_parallel_size=2,
        previous_pipeline_parallel_size=1,
        true_vocab_size=199,
        make_vocab_size_divisible_by=128,
        checkpoint_args=args,
        use_legacy_models=False,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )
    vars(metadata).update(changes)
    return [metadata, *expected_messages(source), "done", "done"]


def give(tools: Path, messages: Messages, saver: str, save_dir: Path, *options: Any) -> Run:
    given = tools.parent / "given.pt"
    torch.save(messages, given)
    return stock(tools, "given", saver, tools, save_dir, "--give", given, *options)


@pytest.mark.parametrize("family", ["llama2", "qwen2", "qwen2-tied"])
@pytest.mark.parametrize("saver", ["core", "hf"])
def test_our_savers_take_what_stock_loaders_send(
    saver: str, family: str, hf_model: HFModel, tools: Path, tmp_path: Path
) -> None:
    source, out = hf_model(family, dtype="bfloat16"), tmp_path / "out"
    sizes = ("--target-tensor-parallel-size", 4, "--target-pipeline-parallel-size", 2)
    run = give(tools, stock_messages(source), saver, out, *(sizes if saver == "core" else ()))
    succeeded(run)
    if saver == "core":
        args = args_of(out, "iter_0000007")
        assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.sequence_parallel) == (
            4,
            2,
            False,
        )
        theta = config_of(source)["rope_parameters"]["rope_theta"]
        assert (args.rotary_base, args.params_dtype, args.bf16) == (theta, torch.bfloat16, True)
        assert not hasattr(args, "tokenizer_type")
        succeeded(convert_back("--load-path", out, "--save-path", tmp_path / "hf"))
    folder = out if saver == "hf" else tmp_path / "hf"
    same_tensors(hf_tensors(folder), hf_tensors(source))
    assert config_of(folder)["rms_norm_eps"] == config_of(source)["rms_norm_eps"]
    assert config_of(folder)["rope_theta"] == config_of(source)["rope_parameters"]["rope_theta"]


def test_sizes_are_by_default_those_of_the_loader(hf_model: HFModel, tools: Path, tmp_path: Path) -> None:
    succeeded(give(tools, stock_messages(hf_model("llama2")), "core", tmp_path / "out"))
    assert len(list((tmp_path / "out" / "iter_0000007").glob("mp_rank_*"))) == 2


@pytest.mark.parametrize(("true_size", "kept"), [(199, 199), (None, 256)])
def test_padded_embeddings(true_size: int | None, kept: int, hf_model: HFModel, tools: Path, tmp_path: Path) -> None:
    """Stock loader_core sends them as stored; only --true-vocab-size lets it say what is padding."""
    messages = stock_messages(hf_model("llama2"), true_vocab_size=true_size)
    for message, key in ((messages[1], "word embeddings"), (messages[-3], "weight")):
        message[key] = torch.cat([message[key], message[key][-1:].expand(57, -1)])
    succeeded(give(tools, messages, "hf", tmp_path / "out"))
    tensors = hf_tensors(tmp_path / "out")
    assert tensors["model.embed_tokens.weight"].shape[0] == tensors["lm_head.weight"].shape[0] == kept
    assert torch.equal(tensors["lm_head.weight"][:199], hf_tensors(hf_model("llama2"))["lm_head.weight"])


def swap(messages: Messages) -> None:
    messages[2], messages[3] = messages[3], messages[2]


def misshape(messages: Messages) -> None:
    messages[3]["dense weight"] = messages[3]["dense weight"][:-1]


def recast(messages: Messages) -> None:
    messages[3]["dense weight"] = messages[3]["dense weight"].half()


SPOILT: dict[str, tuple[Callable[[Messages], object], str]] = {
    "wrong order": (swap, "transformer layer 0"),
    "missing message": (lambda messages: messages.pop(4), "transformer layer 2"),
    "missing key": (lambda messages: messages[3].pop("qkv weight"), "'qkv weight'"),
    "extra key": (lambda messages: messages[3].update({"qkv bias": torch.ones(128)}), "'qkv bias'"),
    "shape": (misshape, "dense weight"),
    "dtype": (recast, "float16"),
    "no tensor": (lambda messages: messages[3].update({"dense weight": 5}), "dense weight"),
    "no tensor at first": (lambda messages: messages[1].update({"word embeddings": 5}), "word embeddings"),
    "exit at once": (lambda messages: messages.insert(0, "exit"), "loader stopped"),
    "exit midway": (lambda messages: messages.insert(4, "exit"), "loader stopped"),
    "done too early": (lambda messages: messages.insert(4, "done"), "'done'"),
    "more than the model has": (lambda messages: messages.insert(-2, {"name": "pooler"}), "'pooler'"),
    "another kind of model": (lambda messages: setattr(messages[0], "model_type", "BERT"), "BERT"),
    "experts without a router": (lambda messages: setattr(messages[0], "num_experts", 8), "router weight"),
    "norms with bias": (lambda messages: setattr(messages[0], "norm_has_bias", True), "bias"),
    "no arguments": (lambda messages: delattr(messages[0], "checkpoint_args"), "checkpoint_args"),
    "no metadata": (lambda messages: messages.pop(0), "metadata"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_a_loader_must_not_send(case: str, hf_model: HFModel, tools: Path, tmp_path: Path) -> None:
    spoil, word = SPOILT[case]
    messages = stock_messages(hf_model("llama2"))
    spoil(messages)
    run = give(tools, messages, "core", tmp_path / "out")
    refused(run, word, code=run.code)  # stock convert.py ends with 0 whatever the saver does
    nothing_complete(tmp_path / "out")
    if "SAVER" in run.out:
        assert "SAVER 1" in run.out


def test_no_checking_forgives_names_and_surplus(hf_model: HFModel, tools: Path, tmp_path: Path) -> None:
    messages = stock_messages(hf_model("llama2"))
    for message in messages[1:-2]:
        message["name"] = "called otherwise"
    messages[3]["capacity bins"] = torch.ones(3)
    refused(give(tools, messages, "hf", tmp_path / "checked"), "called otherwise", code=0)
    nothing_complete(tmp_path / "checked")
    succeeded(give(tools, messages, "hf", tmp_path / "out", "--no-checking"))
    same_tensors(hf_tensors(tmp_path / "out"), hf_tensors(hf_model("llama2")))


# --- the drop-in as a whole


def test_both_of_ours_under_stock_convert(hf_model: HFModel, tools: Path, tmp_path: Path) -> None:
    source = hf_model("qwen3")
    options = ("--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2)
    succeeded(stock(tools, "llama_mistral", "core", source, tmp_path / "meg", *options, anew=True))
    succeeded(stock(tools, "core", "hf", tmp_path / "meg", tmp_path / "hf", anew=True))
    same_tensors(hf_tensors(tmp_path / "hf"), hf_tensors(source))


def test_a_failing_saver_under_stock_convert_does_not_block(hf_model: HFModel, tools: Path, tmp_path: Path) -> None:
    source = hf_model("llama2")
    options = ("--target-tensor-parallel-size", 3, "--max-queue-size", 1)
    run = stock(tools, "llama_mistral", "core", source, tmp_path / "out", *options, anew=True)
    refused(run, "tp=3", "the saver ended")
    nothing_complete(tmp_path / "out")

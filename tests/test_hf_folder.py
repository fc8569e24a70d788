"""Hugging Face folders: every kind is read, and what is written is what transformers expects."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.helpers import (
    args_of,
    config_of,
    convert,
    convert_back,
    edit_rank,
    hf_tensors,
    nothing_complete,
    rank_content,
    refused,
    same_tensors,
    succeeded,
)
from tests.oracle.hf import FAMILIES

HFModel = Callable[..., Path]
MegatronModel = Callable[..., tuple[Path, Path]]
INDEX = "model.safetensors.index.json"


def round_trip(source: Path, tmp_path: Path, *options: Any, forward: tuple[Any, ...] = ()) -> Path:
    meg, back = tmp_path / "round-meg", tmp_path / "round-back"
    succeeded(convert("--load-dir", source, "--save-dir", meg, "--target-tensor-parallel-size", 2, *forward))
    succeeded(convert_back("--load-path", meg, "--save-path", back, *options))
    return back


# --- what is written


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_transformers_loads_the_output_without_a_complaint(
    family: str, megatron_model: MegatronModel, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    source, meg = megatron_model(family)
    succeeded(convert_back("--load-path", meg, "--save-path", tmp_path))
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype="auto")
    assert not any(report.values()), report
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    same_tensors(model.state_dict(), theirs.state_dict())
    ours, expected = model.config.to_dict(), theirs.config.to_dict()
    assert {**ours, "_name_or_path": ""} == {**expected, "_name_or_path": ""}


@pytest.mark.parametrize("family", ["llama3.1", "qwen2-tied", "qwen3", "mistral-window"])
def test_the_architecture_is_found_without_a_recorded_config(
    family: str, megatron_model: MegatronModel, tmp_path: Path
) -> None:
    """A training run keeps Megatron's own arguments alone."""
    from transformers import AutoModelForCausalLM

    source, original = megatron_model(family)
    meg = shutil.copytree(original, tmp_path / "meg")
    for path in meg.rglob("model_optim_rng.pt"):
        content = rank_content(meg, path.parent.name)
        del content["args"].hf_config
        torch.save(content, path)
    succeeded(convert_back("--load-path", meg, "--save-path", tmp_path / "hf"))
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True, dtype="auto")
    assert not any(report.values()), report
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    same_tensors(model.state_dict(), theirs.state_dict())
    for name in ("rope_parameters", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "sliding_window"):
        assert getattr(model.config, name, None) == getattr(theirs.config, name, None), name


@pytest.mark.parametrize("limit", ["60KB", "100KiB", "150000"])
def test_shards(limit: str, megatron_model: MegatronModel, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source, meg = megatron_model("llama2")
    succeeded(convert_back("--load-path", meg, "--save-path", tmp_path, "--max-shard-size", limit))
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert [path.name for path in shards] == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]
    index = json.loads((tmp_path / INDEX).read_text())
    in_files = {name: path.name for path in shards for name in load_file(path)}
    assert index["weight_map"] == in_files
    tensors = hf_tensors(source)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    bytes_of = {"60KB": 60_000, "100KiB": 102_400, "150000": 150_000}[limit]
    for path in shards:
        held = load_file(path)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= bytes_of
    same_tensors(hf_tensors(tmp_path), tensors)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report


def test_one_file_has_no_index_and_says_that_torch_wrote_it(megatron_model: MegatronModel, tmp_path: Path) -> None:
    _, meg = megatron_model("llama2")
    succeeded(convert_back("--load-path", meg, "--save-path", tmp_path))
    assert not (tmp_path / INDEX).exists()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_tied_model_is_written_without_lm_head(megatron_model: MegatronModel, tmp_path: Path) -> None:
    _, meg = megatron_model("qwen2-tied")
    succeeded(convert_back("--load-path", meg, "--save-path", tmp_path))
    assert "lm_head.weight" not in hf_tensors(tmp_path)


def test_generation_config_comes_with_the_reference(megatron_model: MegatronModel, tmp_path: Path) -> None:
    source, meg = megatron_model("llama3")
    succeeded(convert_back("--load-path", meg, "--save-path", tmp_path, "--hf-config", source))
    ours, theirs = (json.loads((folder / "generation_config.json").read_text()) for folder in (tmp_path, source))
    assert ours == theirs
    assert config_of(tmp_path) == config_of(source)


def test_differences_from_the_reference_are_listed(megatron_model: MegatronModel, tmp_path: Path) -> None:
    source, meg = megatron_model("llama3")
    reference = shutil.copytree(source, tmp_path / "reference")
    (reference / "config.json").write_text(json.dumps({**config_of(source), "rms_norm_eps": 1e-3, "custom": None}))
    run = succeeded(convert_back("--load-path", meg, "--save-path", tmp_path / "out", "--hf-config", reference))
    assert "norm_epsilon: 0.001, not 1e-05" in run.err  # a warning
    assert config_of(tmp_path / "out")["rms_norm_eps"] == 1e-3


def test_the_reference_decides_the_vocabulary(megatron_model: MegatronModel, tmp_path: Path) -> None:
    source, original = megatron_model("llama2")
    meg = shutil.copytree(original, tmp_path / "meg")
    for path in meg.rglob("model_optim_rng.pt"):
        content = rank_content(meg, path.parent.name)
        del content["args"].vocab_size, content["args"].hf_config
        torch.save(content, path)
    run = succeeded(convert_back("--load-path", meg, "--save-path", tmp_path / "all"))
    assert hf_tensors(tmp_path / "all")["lm_head.weight"].shape[0] == 256
    assert "--true-vocab-size" in run.out + run.err
    for number, option in enumerate([("--true-vocab-size", 199), ("--hf-config", source)]):
        succeeded(convert_back("--load-path", meg, "--save-path", tmp_path / str(number), *option))
        same_tensors(hf_tensors(tmp_path / str(number)), hf_tensors(source))


def test_another_vocabulary_than_the_args_say_is_warned_of(megatron_model: MegatronModel, tmp_path: Path) -> None:
    """What is left out then may be no padding."""
    _, meg = megatron_model("llama2")
    run = succeeded(
        convert_back("--load-path", meg, "--save-path", tmp_path / "out", "--true-vocab-size", 150, "--quiet")
    )
    assert "warning: --true-vocab-size 150 is taken, although the args say 199" in run.err
    assert hf_tensors(tmp_path / "out")["lm_head.weight"].shape[0] == 150


def test_a_null_tokenizer_has_a_token_more_than_its_vocabulary(megatron_model: MegatronModel, tmp_path: Path) -> None:
    source, original = megatron_model("llama2")
    meg = shutil.copytree(original, tmp_path / "meg")
    for path in meg.rglob("model_optim_rng.pt"):
        content = rank_content(meg, path.parent.name)
        del content["args"].hf_config
        content["args"].tokenizer_type, content["args"].vocab_size = "NullTokenizer", 198
        torch.save(content, path)
    succeeded(convert_back("--load-path", meg, "--save-path", tmp_path / "out"))
    same_tensors(hf_tensors(tmp_path / "out"), hf_tensors(source))


def test_rows_that_padding_does_not_explain_are_warned_of(megatron_model: MegatronModel, tmp_path: Path) -> None:
    """The args' vocab_size is what a user once typed; the tokenizer's, which made the embeddings, is not recorded."""
    meg = shutil.copytree(megatron_model("llama2", 1, 1)[1], tmp_path / "meg")
    content = rank_content(meg)
    content["args"].vocab_size = 128
    torch.save(content, meg / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt")
    run = succeeded(convert_back("--load-path", meg, "--save-path", tmp_path / "out"))
    assert "warning: the args' vocab_size of 128 needs 128 rows, but there are 256" in run.err
    assert "--true-vocab-size" in run.err


def test_begin_and_end_tokens_are_the_tokenizer_s(megatron_model: MegatronModel, tmp_path: Path) -> None:
    """A training run records no configuration, and transformers' own numbers for a Llama are 1 and 2."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

    vocabulary = {f"token{number}": number for number in range(199)}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="token0")),
        bos_token="token17",
        eos_token="token42",
    )
    made.save_pretrained(tmp_path / "tokenizer")
    meg = shutil.copytree(megatron_model("llama2")[1], tmp_path / "meg")
    for path in meg.rglob("model_optim_rng.pt"):
        content = rank_content(meg, path.parent.name)
        del content["args"].hf_config
        content["args"].tokenizer_model = str(tmp_path / "tokenizer")
        torch.save(content, path)
    run = succeeded(convert_back("--load-path", meg, "--save-path", tmp_path / "named"))
    assert "bos_token_id 17, eos_token_id 42 of the tokenizer" in run.out
    config, tokenizer = (kind.from_pretrained(tmp_path / "named") for kind in (AutoConfig, AutoTokenizer))
    assert (config.bos_token_id, config.eos_token_id) == (17, 42) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    shutil.rmtree(tmp_path / "tokenizer")
    run = succeeded(convert_back("--load-path", meg, "--save-path", tmp_path / "unnamed"))
    assert "config.json names no begin and end tokens" in run.out
    config = AutoConfig.from_pretrained(tmp_path / "unnamed")
    assert (config.bos_token_id, config.eos_token_id) == (None, None)


def test_begin_and_end_tokens_that_a_vocabulary_suggests_are_said(hf_model: HFModel, tmp_path: Path) -> None:
    source, meg = hf_model("llama2", vocab_size=32000, num_hidden_layers=1), tmp_path / "meg"
    succeeded(convert("--load-dir", source, "--save-dir", meg))
    args = args_of(meg)
    del args.hf_config
    edit_rank(meg, "mp_rank_00", args=args)
    run = succeeded(convert_back("--load-path", meg, "--save-path", tmp_path / "out"))
    assert "bos_token_id 1, eos_token_id 2 of llama2, whose vocabulary has this size" in run.out
    assert config_of(tmp_path / "out")["eos_token_id"] == 2


@pytest.mark.parametrize(("model_type", "end"), [("llama3", [128001, 128009]), ("llama3.1", [128001, 128008, 128009])])
def test_an_instruct_model(model_type: str, end: list[int], megatron_model: MegatronModel, tmp_path: Path) -> None:
    _, meg = megatron_model("llama3")
    options = ("--instruct", "--source-model-type", model_type)
    succeeded(convert_back("--load-path", meg, "--save-path", tmp_path, *options))
    assert config_of(tmp_path)["eos_token_id"] == end
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["do_sample"]) == (end, True)


def test_the_tokenizer_and_its_template_travel(hf_model: HFModel, tmp_path: Path) -> None:
    source = shutil.copytree(hf_model("llama2"), tmp_path / "hf")
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []}
    files = {
        "tokenizer.json": json.dumps(tokenizer),
        "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}',
        "chat_template.jinja": "{{ messages }}",
    }
    for name, text in files.items():
        (source / name).write_text(text)
    back = round_trip(source, tmp_path)
    assert {name: (back / name).read_text() for name in files} == files
    assert args_of(tmp_path / "round-meg").tokenizer_model == str(source)


# --- what is read


@pytest.mark.parametrize(
    "options", [{"weights": "bin"}, {"weights": "bin", "max_shard_size": "150KB"}, {"max_shard_size": "150KB"}]
)
def test_kinds_of_weights(options: dict[str, Any], hf_model: HFModel, tmp_path: Path) -> None:
    source = hf_model("qwen3", **options)
    files = [path.name for path in source.iterdir() if path.suffix in (".bin", ".safetensors")]
    assert (len(files) > 1) == ("max_shard_size" in options)
    same_tensors(hf_tensors(round_trip(source, tmp_path)), hf_tensors(source))


@pytest.mark.parametrize("family", ["llama3.1", "mistral-window", "qwen2", "qwen3-tied"])
def test_configs_of_transformers_4(family: str, hf_model: HFModel, tmp_path: Path) -> None:
    old, new = hf_model(family, legacy_config=True), hf_model(family)
    assert "rope_theta" in config_of(old)
    for number, source in enumerate((old, new)):
        succeeded(convert("--load-dir", source, "--save-dir", tmp_path / str(number)))
    ours, theirs = (vars(args_of(tmp_path / str(number))) for number in range(2))
    assert {**ours, "hf_config": None} == {**theirs, "hf_config": None}


def test_a_single_file_wins_over_an_index_as_in_transformers(hf_model: HFModel, tmp_path: Path) -> None:
    """Such a folder is an accident; what `from_pretrained` reads is what must be converted."""
    source = shutil.copytree(hf_model("llama2", max_shard_size="150KB", seed=1), tmp_path / "hf")
    shutil.copy(hf_model("llama2") / "model.safetensors", source)
    same_tensors(hf_tensors(round_trip(source, tmp_path)), hf_tensors(hf_model("llama2")))


def test_safetensors_win_over_bin(hf_model: HFModel, tmp_path: Path) -> None:
    source = shutil.copytree(hf_model("llama2", weights="bin", seed=1), tmp_path / "hf")
    shutil.copy(hf_model("llama2") / "model.safetensors", source)
    same_tensors(hf_tensors(round_trip(source, tmp_path)), hf_tensors(hf_model("llama2")))


def test_each_tensor_keeps_its_dtype(hf_model: HFModel, tmp_path: Path) -> None:
    source = shutil.copytree(hf_model("llama2", dtype="bfloat16"), tmp_path / "hf")
    path = source / "model.safetensors"
    mixed = {name: tensor.float() if "norm" in name else tensor for name, tensor in load_file(path).items()}
    save_file(mixed, path, {"format": "pt"})
    same_tensors(hf_tensors(round_trip(source, tmp_path)), mixed)
    args = args_of(tmp_path / "round-meg")
    assert (args.params_dtype, args.bf16) == (torch.bfloat16, True)
    run = succeeded(convert("--load-dir", source, "--save-dir", tmp_path / "again"))
    assert "final_norm (float32) differ from the model's dtype, bfloat16" in run.err


@pytest.mark.parametrize(
    ("option", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_the_target_dtype(option: str, dtype: torch.dtype, hf_model: HFModel, tmp_path: Path) -> None:
    source = hf_model("llama2", dtype="bfloat16")
    back = round_trip(source, tmp_path, "--target-params-dtype", option)
    same_tensors(hf_tensors(back), {name: tensor.to(dtype) for name, tensor in hf_tensors(source).items()})
    assert config_of(back)["dtype"] == str(dtype).removeprefix("torch.")


def test_casting_rounds_as_torch_does_and_keeps_what_is_no_number(hf_model: HFModel, tmp_path: Path) -> None:
    source = shutil.copytree(hf_model("llama2"), tmp_path / "hf")
    path = source / "model.safetensors"
    tensors = load_file(path)
    special = [float("inf"), -float("inf"), float("nan"), -0.0, 1e-40, 1 + 2**-8, 1 + 3 * 2**-9, 65500.0, 6e-8]
    tensors["model.norm.weight"][: len(special)] = torch.tensor(special)
    save_file(tensors, path, {"format": "pt"})
    for option, dtype in (("--bf16", torch.bfloat16), ("--fp16", torch.float16)):
        succeeded(convert("--load-dir", source, "--save-dir", tmp_path / option, option))
        written = rank_content(tmp_path / option)["model"]["decoder.final_layernorm.weight"]
        expected = tensors["model.norm.weight"].to(dtype)
        assert written.dtype == dtype
        numbers = ~expected.isnan()
        assert torch.equal(written.isnan(), ~numbers)
        assert torch.equal(written[numbers].view(torch.int16), expected[numbers].view(torch.int16))


@pytest.mark.parametrize(("option", "value"), [("--bf16", 3.4e38), ("--fp16", 65520.0)])
def test_a_value_that_would_become_infinite(option: str, value: float, hf_model: HFModel, tmp_path: Path) -> None:
    source = shutil.copytree(hf_model("llama2"), tmp_path / "hf")
    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = value
    save_file(tensors, path, {"format": "pt"})
    run = convert("--load-dir", source, "--save-dir", tmp_path / "out", option)
    refused(run, "model.norm.weight", "range")
    nothing_complete(tmp_path / "out")


def test_buffers_of_old_files_are_left_out(hf_model: HFModel, tmp_path: Path) -> None:
    source = shutil.copytree(hf_model("llama2"), tmp_path / "hf")
    path = source / "model.safetensors"
    tensors = load_file(path)
    stale = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(4)}
    save_file({**tensors, **stale}, path, {"format": "pt"})
    same_tensors(hf_tensors(round_trip(source, tmp_path)), tensors)


def test_views_of_one_storage_in_a_bin_file(hf_model: HFModel, tmp_path: Path) -> None:
    """`torch.save` keeps views: transposed, cut out of a larger tensor, shared."""
    source = shutil.copytree(hf_model("qwen2-tied", weights="bin"), tmp_path / "hf")
    path = source / "pytorch_model.bin"
    state = torch.load(path)
    expected = {name: tensor.clone() for name, tensor in state.items()}
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = state[name].t().contiguous().t()
    larger = torch.randn(300, 64)
    larger[50 : 50 + 112] = state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.1.mlp.up_proj.weight"] = larger[50 : 50 + 112]
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state["model.norm.weight"] = torch.nn.Parameter(state["model.norm.weight"])
    torch.save(state, path)
    same_tensors(hf_tensors(round_trip(source, tmp_path)), expected)


def test_symbolic_links_as_in_the_hub_cache(hf_model: HFModel, tmp_path: Path) -> None:
    source = tmp_path / "snapshot"
    source.mkdir()
    for path in hf_model("llama2").iterdir():
        (source / path.name).symlink_to(path)
    same_tensors(hf_tensors(round_trip(source, tmp_path)), hf_tensors(hf_model("llama2")))


def test_a_checkpoint_of_the_local_names(hf_model: HFModel, tmp_path: Path) -> None:
    for family in ("llama-bias", "qwen3"):
        (tmp_path / family).mkdir()
        back = round_trip(hf_model(family), tmp_path / family, forward=("--saver-transformer-impl", "local"))
        same_tensors(hf_tensors(back), hf_tensors(hf_model(family)))


@pytest.mark.parametrize("kind", ["none", "empty tensor", "bytes"])
def test_extra_state_of_any_kind_is_left_out(kind: str, megatron_model: MegatronModel, tmp_path: Path) -> None:
    import io

    source, original = megatron_model("llama2")
    meg = shutil.copytree(original, tmp_path / "meg")
    value = {"none": None, "empty tensor": torch.empty(0, dtype=torch.uint8), "bytes": io.BytesIO(b"state")}[kind]
    for path in meg.rglob("model_optim_rng.pt"):
        content = rank_content(meg, path.parent.name)
        states = [key for key in content["model"] if key.endswith("_extra_state")]
        assert states
        content["model"].update(dict.fromkeys(states, value))
        torch.save(content, path)
    succeeded(convert_back("--load-path", meg, "--save-path", tmp_path / "hf"))
    same_tensors(hf_tensors(tmp_path / "hf"), hf_tensors(source))


def test_optimizer_state_is_left_out_and_named(megatron_model: MegatronModel, tmp_path: Path) -> None:
    source, original = megatron_model("llama2")
    meg = shutil.copytree(original, tmp_path / "meg")
    for path in meg.rglob("model_optim_rng.pt"):
        content = rank_content(meg, path.parent.name)
        torch.save({**content, "optimizer": {"state": torch.ones(3)}, "rng_state": [1]}, path)
    run = succeeded(convert_back("--load-path", meg, "--save-path", tmp_path / "hf"))
    assert "optimizer" in run.out
    assert "rng_state" in run.out
    same_tensors(hf_tensors(tmp_path / "hf"), hf_tensors(source))


def test_a_link_to_nowhere(hf_model: HFModel, tmp_path: Path) -> None:
    source = shutil.copytree(hf_model("llama2"), tmp_path / "hf")
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to(tmp_path / "gone")
    refused(convert("--load-dir", source, "--save-dir", tmp_path / "out"), "model.safetensors")

"""The command lines as the README and the stock tools give them, on tiny models, checked with the libraries' own readers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_converters.cli import main as cli
from tests.helpers import (
    BACK,
    CONVERT,
    RANK_FILE,
    ROOT,
    TRACKER,
    args_of,
    config_of,
    convert,
    convert_back,
    hf_tensors,
    rank_content,
    refused,
    same_tensors,
    start_verb,
    succeeded,
    verb,
)
from tests.oracle.hf import FAMILIES

HFModel = Callable[..., Path]
MegatronModel = Callable[..., tuple[Path, Path]]


def sizes(tp: int, pp: int) -> tuple[str, ...]:
    return ("--target-tensor-parallel-size", str(tp), "--target-pipeline-parallel-size", str(pp))


# --- the command lines of the README, in full


def test_stock_command_line_and_back(hf_model: HFModel, tmp_path: Path) -> None:
    source = shutil.copytree(hf_model("llama3.1"), tmp_path / "hf")
    tokenizer = source / "tokenizer.json"
    tokenizer.write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}))
    margs = {"params_dtype": "torch.bfloat16", "main_params_dtype": "torch.float32", "lr": 1e-4, "save": "/gone"}
    (source / "source_megatron_args.json").write_text(json.dumps(margs))
    meg, back = tmp_path / "meg", tmp_path / "back"

    forward = f"""--bf16 --model-type GPT --loader llama_mistral --saver mcore
        --loader-transformer-impl local --saver-transformer-impl transformer_engine
        --target-tensor-parallel-size 2 --target-pipeline-parallel-size 2
        --checkpoint-type hf --source-margs-file {source}/source_megatron_args.json
        --load-dir {source} --save-dir {meg} --tokenizer-model {tokenizer} --model-size llama3-70B"""
    succeeded(convert(*forward.split()))
    args = args_of(meg)
    assert args.params_dtype is torch.bfloat16
    assert args.main_params_dtype is torch.float32
    assert args.lr == 1e-4
    assert not hasattr(args, "save")
    assert args.tokenizer_model == str(tokenizer)
    shutil.move(meg / "iter_0000001", meg / "iter_0000004")

    backward = f"""--ckpt-dir-name iter_0000004 --target-params-dtype bf16 --source-model-type llama3.1
        --load-path {meg} --save-path {back}"""
    succeeded(convert_back(*backward.split()))
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in hf_tensors(source).items()}
    same_tensors(hf_tensors(back), expected)
    stored = json.loads((back / "source_megatron_args.json").read_text())
    assert (stored["params_dtype"], stored["lr"]) == ("torch.bfloat16", 1e-4)
    assert (back / "tokenizer.json").read_bytes() == tokenizer.read_bytes()

    again = tmp_path / "again"
    succeeded(
        convert("--load-dir", back, "--save-dir", again, "--source-margs-file", back / "source_megatron_args.json")
    )
    assert args_of(again).main_params_dtype is torch.float32
    assert args_of(again).params_dtype is torch.bfloat16


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_short_command_line_and_back_by_queue(family: str, megatron_model: MegatronModel, tmp_path: Path) -> None:
    source, meg = megatron_model(family)
    assert (meg / TRACKER).read_bytes() == b"1"
    succeeded(
        convert("--model-type", "GPT", "--loader", "core", "--saver", "hf", "--load-dir", meg, "--save-dir", tmp_path)
    )
    same_tensors(hf_tensors(tmp_path), hf_tensors(source))
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, source))
    assert ours == theirs


@pytest.mark.parametrize(
    ("tp", "pp", "impl"), [(1, 1, "local"), (4, 1, "local"), (1, 4, "transformer_engine"), (8, 2, "local")]
)
@pytest.mark.parametrize("family", ["llama-bias", "qwen3-tied"])
def test_reshard(family: str, tp: int, pp: int, impl: str, megatron_model: MegatronModel, tmp_path: Path) -> None:
    source, meg = megatron_model(family)
    other, back = tmp_path / "other", tmp_path / "back"
    reshard = ("--model-type", "GPT", "--loader", "core", "--saver", "mcore", "--load-dir", meg, "--save-dir", other)
    succeeded(convert(*reshard, *sizes(tp, pp), "--saver-transformer-impl", impl))
    assert len(list(other.glob(f"iter_0000001/mp_rank_*/{RANK_FILE}"))) == tp * pp
    assert args_of(other).transformer_impl == impl
    succeeded(convert_back("--load-path", other, "--save-path", back))
    same_tensors(hf_tensors(back), hf_tensors(source))


def test_resharding_to_the_sizes_of_the_source_changes_no_tensor(megatron_model: MegatronModel, tmp_path: Path) -> None:
    _, meg = megatron_model("qwen2-tied")
    succeeded(convert("--loader", "core", "--load-dir", meg, "--save-dir", tmp_path))
    for path in sorted(meg.glob(f"iter_0000001/mp_rank_*/{RANK_FILE}")):
        ours, theirs = (rank_content(folder, path.parent.name)["model"] for folder in (tmp_path, meg))
        assert list(ours) == list(theirs)
        same_tensors(*({k: v for k, v in model.items() if v is not None} for model in (ours, theirs)))


# --- options


STOCK_LOADER = "--megatron-path /m --checkpoint-type hf --true-vocab-size 199 --max-queue-size 50 --no-checking"
ACCEPTED = {
    "nvidia": f"--loader llama_mistral --saver core --model-size llama3-8B {STOCK_LOADER} --vocab-file v.json",
    "nvidia, older": f"--loader llama_mistral --saver megatron --model-size llama2-7Bf {STOCK_LOADER}",
    "habana": f"--loader llama_mistral --saver mcore --model-size llama3 --fp16 --max-queue-size 200 {STOCK_LOADER}",
    "padding": "--make-vocab-size-divisible-by 8",
    "expert size": "--target-expert-parallel-size 1 --loader-transformer-impl transformer_engine",
}


@pytest.mark.parametrize("options", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_stock_options_are_accepted(options: str, hf_model: HFModel, tmp_path: Path) -> None:
    run = convert(*options.split(), "--model-type", "GPT", "--load-dir", hf_model("llama3"), "--save-dir", tmp_path)
    succeeded(run)
    assert (tmp_path / TRACKER).exists()


STOCK_CORE = "--megatron-path /m --true-vocab-size 199 --position-embedding-type rope --loader-transformer-impl local"


@pytest.mark.parametrize("loader", ["core", "mcore", "megatron"])
def test_stock_options_of_the_core_loader_are_accepted(
    loader: str, megatron_model: MegatronModel, tmp_path: Path
) -> None:
    _, meg = megatron_model("llama2")
    succeeded(convert("--loader", loader, *STOCK_CORE.split(), "--load-dir", meg, "--save-dir", tmp_path))


def test_options_of_the_script(megatron_model: MegatronModel, tmp_path: Path) -> None:
    source, meg = megatron_model("llama2")
    options = "--target-params-dtype fp16 --source-model-type llama2 --no-instruct --max-shard-size 100KB"
    succeeded(convert_back(*options.split(), "--load-path", meg, "--save-path", tmp_path))
    same_tensors(hf_tensors(tmp_path), {name: tensor.half() for name, tensor in hf_tensors(source).items()})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--true-vocab-size 200", ("200", "199")),
        ("--model-size mistral-7B", ("mistral", "llama")),
        ("--model-size qwen2.5-7B", ("qwen2", "llama")),
        ("--model-size gpt5", ("gpt5",)),
        ("--bf16 --fp16", ("--bf16", "--fp16")),
        ("--target-expert-parallel-size 2", ("--target-expert-parallel-size 2",)),
        ("--loader nosuch", ("nosuch", "llama_mistral")),
        ("--saver nosuch", ("nosuch", "mcore")),
        ("--model-type T5", ("T5", "GPT")),
        ("--model-type BERT", ("BERT", "GPT")),
        ("--target-tensor-paralell-size 2", ("--target-tensor-paralell-size",)),
    ],
)
def test_contradictions_exit_2_and_name_both_sides(
    options: str, words: tuple[str, ...], hf_model: HFModel, tmp_path: Path
) -> None:
    run = convert(*options.split(), "--load-dir", hf_model("llama2"), "--save-dir", tmp_path / "meg")
    refused(run, *words, code=2)
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("size", ["0", "5XB", "-1", "GB", "1.5.0GB"])
def test_a_shard_size_that_is_none(size: str, megatron_model: MegatronModel, tmp_path: Path) -> None:
    _, meg = megatron_model("llama2")
    run = convert_back("--load-path", meg, "--save-path", tmp_path / "hf", f"--max-shard-size={size}")
    refused(run, size, code=2)


@pytest.mark.parametrize(
    ("option", "dtype"), [("--bf16", torch.bfloat16), ("--fp16", torch.float16), (None, torch.float32)]
)
@pytest.mark.parametrize("loader", ["llama_mistral", "core"])
def test_the_dtype_is_kept_unless_asked(
    option: str | None, dtype: torch.dtype, loader: str, megatron_model: MegatronModel, tmp_path: Path
) -> None:
    source, meg = megatron_model("llama3")
    load_dir = meg if loader == "core" else source
    succeeded(
        convert(
            "--loader", loader, "--load-dir", load_dir, "--save-dir", tmp_path, *filter(None, [option]), *sizes(1, 1)
        )
    )
    content = rank_content(tmp_path)
    assert {tensor.dtype for tensor in content["model"].values() if tensor is not None} == {dtype}
    args = content["args"]
    assert (args.params_dtype, args.bf16, args.fp16) == (dtype, dtype == torch.bfloat16, dtype == torch.float16)
    weight = hf_tensors(source)["model.norm.weight"]
    assert torch.equal(content["model"]["decoder.final_layernorm.weight"], weight.to(dtype))


def test_release(hf_model: HFModel, tmp_path: Path) -> None:
    meg, back = tmp_path / "meg", tmp_path / "back"
    succeeded(convert("--load-dir", hf_model("mistral"), "--save-dir", meg, "--release"))
    assert (meg / TRACKER).read_text() == "release"
    assert rank_content(meg, iteration="release")["iteration"] == 1
    succeeded(convert_back("--load-path", meg, "--save-path", back))
    same_tensors(hf_tensors(back), hf_tensors(hf_model("mistral")))


def test_quiet_says_nothing_but_warnings(hf_model: HFModel, tmp_path: Path) -> None:
    run = succeeded(convert("--load-dir", hf_model("llama2"), "--save-dir", tmp_path / "meg", "--quiet"))
    assert (run.out, run.err) == ("", "")
    run = succeeded(convert_back("--load-path", tmp_path / "meg", "--save-path", tmp_path / "hf", "--quiet"))
    assert run.out == ""
    assert run.err.startswith("warning: wrote no tokenizer")
    assert len(run.err.splitlines()) == 1


@pytest.mark.parametrize("script", [CONVERT, BACK], ids=lambda path: path.name)
def test_help(script: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-X", "importtime", script, "--help"], capture_output=True, text=True, cwd="/"
    )
    assert run.returncode == 0, run.stderr[-500:]
    assert "--save" in run.stdout
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    assert "megatron_converters" in imported
    assert not {"torch", "transformers", "megatron", "safetensors", "tqdm"} & imported


def test_help_of_a_loader_and_a_saver() -> None:
    out = succeeded(convert("--loader", "core", "--saver", "hf", "--help")).out
    for option in ("--ckpt-dir-name", "--max-shard-size", "--hf-config", "--max-queue-size", "--overwrite"):
        assert option in out


def test_neither_megatron_nor_transformer_engine_nor_transformers_is_imported(
    hf_model: HFModel, tmp_path: Path
) -> None:
    """Any import of these fails, in every process of a conversion."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('megatron', 'transformer_engine', 'transformers', 'apex'):\n"
        "            raise RuntimeError('FORBIDDEN ' + name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    env = {"PYTHONPATH": str(tmp_path)}
    probe = subprocess.run(
        [sys.executable, "-c", "import megatron"], env={**os.environ, **env}, capture_output=True, text=True
    )
    assert "FORBIDDEN megatron" in probe.stderr
    for method in ("fork", "spawn"):
        meg, back = tmp_path / method, tmp_path / f"{method}-back"
        options = ("--load-dir", hf_model("qwen3"), "--save-dir", meg, *sizes(2, 2), "--start-method", method, "--bf16")
        succeeded(convert(*options, env=env))
        succeeded(convert_back("--load-path", meg, "--save-path", back, env=env))
    assert (back / "config.json").exists()


def test_it_runs_anywhere_and_by_relative_paths(hf_model: HFModel, tmp_path: Path) -> None:
    shutil.copytree(hf_model("llama2"), tmp_path / "hf")
    (tmp_path / "loaders").mkdir()  # the user's own folder of that name must not be taken for ours
    (tmp_path / "convert.py").write_text("raise SystemExit('the wrong convert.py')\n")
    succeeded(convert("--load-dir", "hf", "--save-dir", "meg", cwd=tmp_path))
    succeeded(convert_back("--load-path", "meg", "--save-path", "back", cwd=tmp_path))
    same_tensors(hf_tensors(tmp_path / "back"), hf_tensors(tmp_path / "hf"))


def test_reading_from_a_read_only_folder(hf_model: HFModel, tmp_path: Path) -> None:
    source = shutil.copytree(hf_model("llama2"), tmp_path / "hf")
    before = {path.name: path.stat().st_mtime_ns for path in source.iterdir()}
    succeeded(convert("--load-dir", source, "--save-dir", tmp_path / "meg"))
    assert {path.name: path.stat().st_mtime_ns for path in source.iterdir()} == before


# --- what is written


def test_files_are_sound_archives(megatron_model: MegatronModel) -> None:
    _, meg = megatron_model("llama3.1")
    files = sorted(meg.rglob(RANK_FILE))
    assert len(files) == 4
    for path in files:
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
    if shutil.which("unzip"):
        assert subprocess.run(["unzip", "-tq", files[0]], capture_output=True).returncode == 0


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_args_say_what_the_model_is(family: str, megatron_model: MegatronModel) -> None:
    source, meg = megatron_model(family)
    args, config = args_of(meg), config_of(source)
    rope = config["rope_parameters"]
    assert isinstance(rope, dict)
    kv_channels = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]  # type: ignore[operator]
    window = config.get("sliding_window")
    expected = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": config["num_key_value_heads"],
        "group_query_attention": True,
        "kv_channels": kv_channels,
        "max_position_embeddings": config["max_position_embeddings"],
        "seq_length": min(4096, int(str(config["max_position_embeddings"]))),
        "rotary_base": int(rope["rope_theta"]),
        "use_rope_scaling": rope["rope_type"] == "llama3",
        "rope_scaling_factor": rope.get("factor", 8.0),
        "norm_epsilon": config["rms_norm_eps"],
        "layernorm_epsilon": config["rms_norm_eps"],
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "swiglu": True,
        "vocab_size": 199,
        "padded_vocab_size": 256,
        "make_vocab_size_divisible_by": 128,
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "add_qkv_bias": family.startswith(("qwen2", "llama-bias")),
        "add_bias_linear": family == "llama-bias",
        "qk_layernorm": family.startswith("qwen3"),
        "window_size": (window - 1, 0) if isinstance(window, int) else None,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bf16": False,
        "fp16": False,
        "params_dtype": torch.float32,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "world_size": 4,
        "transformer_impl": "transformer_engine",
        "ckpt_format": "torch",
        "global_batch_size": 1024,
    }
    assert {name: getattr(args, name, "absent") for name in expected} == expected
    assert not hasattr(args, "tokenizer_type")
    assert all(type(value) in (int, float) for value in (args.rotary_base, args.norm_epsilon))


@pytest.mark.parametrize(
    ("family", "needed", "unneeded"),
    [
        (
            "llama3.2-tied",
            ("--use-rope-scaling", "--rope-scaling-factor 32.0", "--norm-epsilon 1e-05"),
            ("--qk-layernorm",),
        ),
        ("qwen3", ("--qk-layernorm", "--norm-epsilon 1e-06"), ("--use-rope-scaling", "--rope-scaling-factor")),
        ("mistral-window", ("--window-size 6,0", "--attention-dropout 0.0", "--hidden-dropout 0.0"), ("--bf16",)),
    ],
)
def test_flags_that_megatron_needs_are_printed_and_stored(
    family: str, needed: tuple[str, ...], unneeded: tuple[str, ...], hf_model: HFModel, tmp_path: Path
) -> None:
    run = succeeded(convert("--load-dir", hf_model(family), "--save-dir", tmp_path))
    (stored,) = tmp_path.rglob("pretrain_gpt_flags.txt")
    text = stored.read_text()
    assert text.strip() in run.out
    for flag in ("--use-checkpoint-args", "--no-load-optim", "--no-load-rng", f"--load {tmp_path}", *needed):
        assert flag in text
    for flag in unneeded:
        assert flag not in text


def test_a_factor_that_megatron_ignores_is_pointed_out(hf_model: HFModel, tmp_path: Path) -> None:
    run = succeeded(convert("--load-dir", hf_model("llama3.2-tied"), "--save-dir", tmp_path))
    assert "rope_scaling_factor" in run.out + run.err
    assert "32" in run.out + run.err


@pytest.mark.parametrize(
    ("vocabulary", "tp", "divisor", "padded"),
    [(203, 1, 1, 203), (203, 2, 64, 256), (256, 4, 64, 256), (257, 2, 128, 512)],
)
def test_padding_of_the_vocabulary(
    vocabulary: int, tp: int, divisor: int, padded: int, hf_model: HFModel, tmp_path: Path
) -> None:
    source = hf_model("llama2", vocab_size=vocabulary)
    meg, back = tmp_path / "meg", tmp_path / "back"
    options = ("--make-vocab-size-divisible-by", divisor, *sizes(tp, 1))
    succeeded(convert("--load-dir", source, "--save-dir", meg, *options))
    parts = [rank_content(meg, f"mp_rank_{rank:02d}")["model"] for rank in range(tp)]
    for key, name in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        whole = torch.cat([part[key] for part in parts])
        weight = hf_tensors(source)[name]
        assert whole.shape[0] == padded == args_of(meg).padded_vocab_size
        assert torch.equal(whole, torch.cat([weight, weight[-1:].expand(padded - vocabulary, -1)]))
    run = succeeded(convert_back("--load-path", meg, "--save-path", back))
    assert hf_tensors(back)["lm_head.weight"].shape[0] == vocabulary
    assert (f"{padded - vocabulary} rows of vocabulary padding" in run.out) == (padded > vocabulary)


def test_uneven_stages(hf_model: HFModel, tmp_path: Path) -> None:
    meg, back = tmp_path / "meg", tmp_path / "back"
    options = ("--decoder-first-pipeline-num-layers", 1, "--decoder-last-pipeline-num-layers", 1)
    succeeded(convert("--load-dir", hf_model("llama2"), "--save-dir", meg, *sizes(1, 3), *options))
    layers = [
        {
            key.split(".")[2]
            for key in rank_content(meg, f"mp_rank_00_{pp:03d}")["model"]
            if key.startswith("decoder.layers")
        }
        for pp in range(3)
    ]
    assert layers == [{"0"}, {"0", "1"}, {"0"}]
    flags = next(meg.rglob("pretrain_gpt_flags.txt")).read_text()
    assert "--decoder-first-pipeline-num-layers 1" in flags
    succeeded(convert_back("--load-path", meg, "--save-path", back))
    same_tensors(hf_tensors(back), hf_tensors(hf_model("llama2")))


def test_accounting_for_embedding_and_loss(hf_model: HFModel, tmp_path: Path) -> None:
    meg, back = tmp_path / "meg", tmp_path / "back"
    options = ("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split")
    succeeded(convert("--load-dir", hf_model("llama2"), "--save-dir", meg, *sizes(1, 3), *options))
    assert args_of(meg).account_for_embedding_in_pipeline_split is True
    succeeded(convert_back("--load-path", meg, "--save-path", back))
    same_tensors(hf_tensors(back), hf_tensors(hf_model("llama2")))


VIRTUAL = {
    "--target-num-layers-per-virtual-pipeline-stage": 1,
    "--target-num-virtual-stages-per-pipeline-rank": 2,
    "--pipeline-model-parallel-layout": "Et|t|t|tL",
}


@pytest.mark.parametrize("option", VIRTUAL)
def test_virtual_pipeline_stages(hf_model: HFModel, tmp_path: Path, option: str) -> None:
    meg, back, even = tmp_path / "meg", tmp_path / "back", tmp_path / "even"
    run = succeeded(convert("--load-dir", hf_model("llama2"), "--save-dir", meg, *sizes(1, 2), option, VIRTUAL[option]))
    assert "(tp=1, pp=2, vpp=2, layers 1+1+1+1)" in run.out
    content = rank_content(meg, "mp_rank_00_001")
    assert "model" not in content
    keys = [{key for key in content[model] if not key.endswith("_extra_state")} for model in ("model0", "model1")]
    last = {"decoder.final_layernorm.weight", "output_layer.weight"}
    assert keys[1] - keys[0] == last and len(keys[0]) == 6
    succeeded(convert_back("--load-path", meg, "--save-path", back))
    same_tensors(hf_tensors(back), hf_tensors(hf_model("llama2")))
    succeeded(convert("--loader", "core", "--load-dir", meg, "--save-dir", even, *sizes(2, 1)))
    assert args_of(even).virtual_pipeline_model_parallel_size is None
    kept = succeeded(convert("--loader", "core", "--load-dir", meg, "--save-dir", tmp_path / "kept"))
    assert "vpp=2" in kept.out


def test_overwriting_replaces_a_checkpoint_in_full(hf_model: HFModel, tmp_path: Path) -> None:
    succeeded(convert("--load-dir", hf_model("llama2"), "--save-dir", tmp_path, *sizes(4, 2)))
    succeeded(convert("--load-dir", hf_model("qwen3"), "--save-dir", tmp_path, *sizes(2, 1), "--overwrite"))
    assert sorted(path.name for path in (tmp_path / "iter_0000001").glob("mp_*")) == ["mp_rank_00", "mp_rank_01"]
    assert args_of(tmp_path).qk_layernorm is True
    assert not [path for path in tmp_path.rglob("*") if ".incomplete" in path.name]


def test_resharding_in_place(megatron_model: MegatronModel, tmp_path: Path) -> None:
    source, original = megatron_model("qwen2-tied")
    meg = shutil.copytree(original, tmp_path / "meg")
    options = ("--loader", "core", "--load-dir", meg, "--save-dir", meg, *sizes(1, 4))
    refused(convert(*options), "iter_0000001", "--overwrite")
    succeeded(convert(*options, "--overwrite"))
    succeeded(convert_back("--load-path", meg, "--save-path", tmp_path / "back"))
    same_tensors(hf_tensors(tmp_path / "back"), hf_tensors(source))


def test_the_checkout_needs_no_installation() -> None:
    """The scripts are what README's commands name, and nothing of the package is found elsewhere."""
    code = "import megatron_converters; print(megatron_converters.__file__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == str(ROOT / "megatron_converters" / "__init__.py")


def test_a_reader_that_has_enough_ends_nothing(hf_model: HFModel, tmp_path: Path) -> None:
    """`convert … | true` and the like."""
    for options in (("convert", hf_model("llama2"), tmp_path / "out", "--tp", "2"), ("inspect", hf_model("llama2"))):
        process = start_verb(*options)
        process.stdout.close()
        code, said = process.wait(60), process.stderr.read()
        assert code == 0, said
        assert "Traceback" not in said and "Exception" not in said
    assert (tmp_path / "out" / TRACKER).exists()


TARGETS = [
    ("checkpoint", (), "hf"),
    ("checkpoint", ("--max-shard-size", "1MB"), "hf"),
    ("checkpoint", ("--tp", "1"), "megatron"),
    ("checkpoint", ("--ckpt-format", "torch"), "megatron"),
    ("checkpoint", ("--ckpt-format", "torch_dist"), "megatron"),
    ("checkpoint", ("--release",), "megatron"),
    ("checkpoint", ("--make-vocab-size-divisible-by", "8"), "megatron"),
    ("folder", (), "megatron"),
    ("folder", ("--to", "hf"), "hf"),
]


@pytest.mark.parametrize(("source", "options", "target"), TARGETS)
def test_an_option_of_checkpoints_asks_for_one(
    source: str, options: tuple[str, ...], target: str, megatron_model: MegatronModel, tmp_path: Path, capsys: Any
) -> None:
    path = dict(zip(("folder", "checkpoint"), megatron_model("llama2"), strict=True))[source]
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", str(path), str(tmp_path / "out"), *options, "--no-measure"])
    assert caught.value.code == 0
    assert f"to    {tmp_path / 'out'} ({target})" in capsys.readouterr().out


def test_what_travels_beside_the_weights_can_be_named_for_any_conversion(
    megatron_model: MegatronModel, tmp_path: Path
) -> None:
    """A tokenizer for a checkpoint that is written, training arguments for one that is read."""
    folder, checkpoint = megatron_model("llama2")
    margs = tmp_path / "margs.json"
    margs.write_text(json.dumps({"seq_length": 77}))
    for number, source in enumerate((folder, checkpoint)):
        out = tmp_path / str(number)
        options = ("--tp", 1, "--tokenizer-model", folder, "--source-margs-file", margs)
        succeeded(verb("convert", source, out, *options))
        args = vars(args_of(out))
        assert (args["tokenizer_model"], args["seq_length"]) == (str(folder), 77)


UNHEEDED = [
    (("plan", "checkpoint", "out", "--to", "hf", "--tp", "2"), "--target-tensor-parallel-size: only for writing"),
    (("plan", "checkpoint", "out", "--tp", "2", "--max-shard-size", "1GB"), "--max-shard-size: only for writing"),
    (("convert", "folder", "out", "--instruct"), "--instruct: only for writing a Hugging Face folder"),
    (("convert", "folder", "out", "--hf-config", "x"), "--hf-config is for reading a Megatron-LM checkpoint"),
    (("inspect", "folder", "--ckpt-dir-name", "iter_0000008"), "--ckpt-dir-name is for reading"),
    (("args", "checkpoint", "--untie"), "--untie is for reading a Hugging Face folder"),
    (("verify", "folder", "folder", "--ckpt-dir-name", "release"), "--ckpt-dir-name is for reading"),
    (("diff", "checkpoint", "checkpoint", "--ignore-config-fields", "a"), "--ignore-config-fields is for reading"),
]


@pytest.mark.parametrize(("arguments", "words"), UNHEEDED)
def test_an_option_that_would_go_unheeded_is_refused(
    arguments: tuple[str, ...], words: str, megatron_model: MegatronModel, tmp_path: Path, capsys: Any
) -> None:
    folder, checkpoint = megatron_model("llama2")
    paths = {"folder": folder, "checkpoint": checkpoint, "out": tmp_path / "out"}
    with pytest.raises(SystemExit) as caught:
        cli.main([str(paths.get(argument, argument)) for argument in arguments])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

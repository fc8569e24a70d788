"""`args`: every flag means to stock's parser what `args` say, and a folder's flags are those that its documentation gives."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megatron_converters as mc
from megatron_converters.basics.dtypes import dtype_named
from megatron_converters.cli import main as cli
from megatron_converters.formats.megatron.argument import Context
from megatron_converters.formats.megatron.arguments import ARGUMENTS, written_args
from megatron_converters.formats.megatron.flags import all_flags, flag_warnings, least_release, unknown_flags
from megatron_converters.formats.megatron.releases import OLDEST
from megatron_converters.formats.megatron.rows_mindspeed import MINDSPEED
from megatron_converters.sharding.ranks import parallel_for
from megatron_converters.sharding.stages import PipelineSplit
from tests.conversions import hf_to_megatron
from tests.helpers import args_of, edit_rank
from tests.sparse import PUBLISHED, sparse_hf, sparse_megatron
from tests.test_megatron_args import CASES
from tests.tiny import tiny_spec

HFModel = Callable[..., Path]


def frequency(text: str) -> Any:
    """`moe_freq_type`, `no_rope_freq_type` and `la_freq_type` of Megatron-LM, for what is written here."""
    return json.loads(text)


def window(text: str) -> tuple[int, ...]:
    """`tuple_type` of Megatron-LM."""
    return tuple(map(int, text.split(",")))


#: Options of the parser of Megatron-LM core_v0.16.1, training/arguments.py, and of those that it makes of the fields in
#: core/transformer/transformer_config.py: attribute, type or constant, default. Those of muP are from core_v0.17.1, and
#: those of YaRN outside multi-latent attention and of layouts by release from core_v0.19.0.
STOCK: dict[str, tuple[str, Any, Any]] = {
    "--num-layers": ("num_layers", int, None),
    "--hidden-size": ("hidden_size", int, None),
    "--ffn-hidden-size": ("ffn_hidden_size", int, None),
    "--num-attention-heads": ("num_attention_heads", int, None),
    "--group-query-attention": ("group_query_attention", True, False),
    "--num-query-groups": ("num_query_groups", int, 1),
    "--kv-channels": ("kv_channels", int, None),
    "--max-position-embeddings": ("max_position_embeddings", int, None),
    "--seq-length": ("seq_length", int, None),
    "--position-embedding-type": ("position_embedding_type", str, "learned_absolute"),
    "--rotary-base": ("rotary_base", int, 10000),
    "--rotary-percent": ("rotary_percent", float, 1.0),
    "--rotary-interleaved": ("rotary_interleaved", True, False),
    "--no-rope-freq": ("no_rope_freq", frequency, None),
    "--use-rope-scaling": ("use_rope_scaling", True, False),
    "--rope-scaling-factor": ("rope_scaling_factor", float, 8.0),
    "--rotary-seq-len-interpolation-factor": ("rotary_seq_len_interpolation_factor", int, None),
    "--swiglu": ("swiglu", True, False),
    "--squared-relu": ("squared_relu", True, False),
    "--no-bias-gelu-fusion": ("bias_gelu_fusion", False, True),
    "--quick-geglu": ("quick_geglu", True, False),
    "--glu-linear-offset": ("glu_linear_offset", float, 0.0),
    "--activation-func-clamp-value": ("activation_func_clamp_value", float, None),
    "--normalization": ("normalization", str, "LayerNorm"),
    "--norm-epsilon": ("layernorm_epsilon", float, 1e-5),
    "--apply-layernorm-1p": ("layernorm_zero_centered_gamma", True, False),
    "--disable-bias-linear": ("add_bias_linear", False, True),
    "--add-qkv-bias": ("add_qkv_bias", True, False),
    "--qk-layernorm": ("qk_layernorm", True, False),
    "--spec": ("spec", "words", None),
    "--untie-embeddings-and-output-weights": ("untie_embeddings_and_output_weights", True, False),
    "--window-size": ("window_size", window, None),
    "--window-attn-skip-freq": ("window_attn_skip_freq", frequency, None),
    "--softmax-type": ("softmax_type", str, "vanilla"),
    "--multi-latent-attention": ("multi_latent_attention", True, False),
    "--q-lora-rank": ("q_lora_rank", int, None),
    "--kv-lora-rank": ("kv_lora_rank", int, 32),
    "--qk-head-dim": ("qk_head_dim", int, 128),
    "--qk-pos-emb-head-dim": ("qk_pos_emb_head_dim", int, 64),
    "--v-head-dim": ("v_head_dim", int, 128),
    "--mla-down-proj-fusion": ("mla_down_proj_fusion", True, False),
    "--rope-type": ("rope_type", str, None),
    "--rotary-scaling-factor": ("rotary_scaling_factor", float, 1.0),
    "--mscale": ("mscale", float, 1.0),
    "--mscale-all-dim": ("mscale_all_dim", float, 0.0),
    "--yarn-original-max-position-embeddings": ("yarn_original_max_position_embeddings", int, None),
    "--yarn-beta-fast": ("yarn_beta_fast", float, None),
    "--yarn-beta-slow": ("yarn_beta_slow", float, None),
    "--no-yarn-correction-range-round-to-int": ("yarn_correction_range_round_to_int", False, None),
    "--experimental-attention-variant": ("experimental_attention_variant", str, None),
    "--linear-attention-freq": ("linear_attention_freq", frequency, None),
    "--linear-conv-kernel-dim": ("linear_conv_kernel_dim", int, 4),
    "--linear-key-head-dim": ("linear_key_head_dim", int, 128),
    "--linear-value-head-dim": ("linear_value_head_dim", int, 128),
    "--linear-num-key-heads": ("linear_num_key_heads", int, 16),
    "--linear-num-value-heads": ("linear_num_value_heads", int, 32),
    "--attention-output-gate": ("attention_output_gate", True, False),
    "--dsa-indexer-n-heads": ("dsa_indexer_n_heads", int, None),
    "--dsa-indexer-head-dim": ("dsa_indexer_head_dim", int, None),
    "--dsa-indexer-topk": ("dsa_indexer_topk", int, None),
    "--dsa-indexer-rope-interleaved": ("dsa_indexer_rope_interleaved", True, False),
    "--dsa-indexer-topk-freq": ("dsa_indexer_topk_freq", int, 1),
    "--dsa-indexer-skip-topk-offset": ("dsa_indexer_skip_topk_offset", int, 0),
    "--dsa-indexer-k-norm-epsilon": ("dsa_indexer_k_norm_epsilon", float, None),
    "--no-rope-fusion": ("apply_rope_fusion", False, True),
    "--use-mup": ("use_mup", True, False),
    "--mup-embedding-mult": ("mup_embedding_mult", float, 1.0),
    "--mup-output-mult": ("mup_output_mult", float, 1.0),
    "--mup-base-head-dim": ("mup_base_head_dim", float, None),
    "--mup-attn-scale-power": ("mup_attn_scale_power", float, 1.0),
    "--mtp-num-layers": ("mtp_num_layers", int, None),
    "--attention-dropout": ("attention_dropout", float, 0.1),
    "--hidden-dropout": ("hidden_dropout", float, 0.1),
    "--init-method-std": ("init_method_std", float, 0.02),
    "--bf16": ("bf16", True, False),
    "--fp16": ("fp16", True, False),
    "--num-experts": ("num_experts", int, None),
    "--moe-layer-freq": ("moe_layer_freq", frequency, 1),
    "--moe-ffn-hidden-size": ("moe_ffn_hidden_size", int, None),
    "--moe-router-topk": ("moe_router_topk", int, 2),
    "--moe-router-pre-softmax": ("moe_router_pre_softmax", True, False),
    "--moe-router-score-function": ("moe_router_score_function", str, "softmax"),
    "--moe-router-enable-expert-bias": ("moe_router_enable_expert_bias", True, False),
    "--moe-router-topk-scaling-factor": ("moe_router_topk_scaling_factor", float, None),
    "--moe-router-num-groups": ("moe_router_num_groups", int, None),
    "--moe-router-group-topk": ("moe_router_group_topk", int, None),
    "--moe-router-dtype": ("moe_router_dtype", str, None),
    "--moe-router-load-balancing-type": ("moe_router_load_balancing_type", str, "aux_loss"),
    "--moe-aux-loss-coeff": ("moe_aux_loss_coeff", float, 0.0),
    "--moe-shared-expert-intermediate-size": ("moe_shared_expert_intermediate_size", int, None),
    "--moe-shared-expert-gate": ("moe_shared_expert_gate", True, False),
    "--moe-grouped-gemm": ("moe_grouped_gemm", True, False),
    "--moe-use-legacy-grouped-gemm": ("moe_use_legacy_grouped_gemm", True, False),
    "--no-bias-dropout-fusion": ("bias_dropout_fusion", False, True),
    "--moe-single-grouped-weight": ("moe_single_grouped_weight", True, False),
    "--moe-single-grouped-bias": ("moe_single_grouped_bias", True, False),
    "--use-transformer-engine-op-fuser": ("use_transformer_engine_op_fuser", True, False),
    "--moe-token-dispatcher-type": ("moe_token_dispatcher_type", str, "allgather"),
    "--transformer-impl": ("transformer_impl", str, "transformer_engine"),
    "--tensor-model-parallel-size": ("tensor_model_parallel_size", int, 1),
    "--sequence-parallel": ("sequence_parallel", True, False),
    "--pipeline-model-parallel-size": ("pipeline_model_parallel_size", int, 1),
    "--decoder-first-pipeline-num-layers": ("decoder_first_pipeline_num_layers", int, None),
    "--decoder-last-pipeline-num-layers": ("decoder_last_pipeline_num_layers", int, None),
    "--account-for-embedding-in-pipeline-split": ("account_for_embedding_in_pipeline_split", True, False),
    "--account-for-loss-in-pipeline-split": ("account_for_loss_in_pipeline_split", True, False),
    "--num-layers-per-virtual-pipeline-stage": ("num_layers_per_virtual_pipeline_stage", int, None),
    "--num-virtual-stages-per-pipeline-rank": ("num_virtual_stages_per_pipeline_rank", int, None),
    "--pipeline-model-parallel-layout": ("pipeline_model_parallel_layout", str, None),
    "--expert-model-parallel-size": ("expert_model_parallel_size", int, 1),
    "--expert-tensor-parallel-size": ("expert_tensor_parallel_size", int, None),
    "--make-vocab-size-divisible-by": ("make_vocab_size_divisible_by", int, 128),
    "--padded-vocab-size": ("padded_vocab_size", int, None),
    "--ckpt-format": ("ckpt_format", str, "torch_dist"),
    "--tokenizer-type": ("tokenizer_type", str, None),
    "--tokenizer-model": ("tokenizer_model", str, None),
    "--load": ("load", str, None),
    "--no-load-optim": ("no_load_optim", True, None),
    "--no-load-rng": ("no_load_rng", True, None),
}
#: The same parser's defaults for what no supported model has.
UNSAID = {
    "openai_gelu": False,
    "apply_residual_connection_post_layernorm": False,
    "add_position_embedding": True,
    "use_rotary_position_embeddings": False,
    "apply_query_key_layer_scaling": False,
    "attention_softmax_in_fp32": False,
    "heterogeneous_layers_config_path": None,
}


def parsed(words: list[str]) -> dict[str, Any]:
    """What stock's parser makes of these words; an unknown one is an error."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name, (attribute, kind, default) in STOCK.items():
        if isinstance(kind, bool):
            action = "store_true" if kind else "store_false"
            parser.add_argument(name, dest=attribute, action=action, default=default)
        elif kind == "words":
            parser.add_argument(name, dest=attribute, nargs="*", default=default)
        else:
            parser.add_argument(name, dest=attribute, type=kind, default=default)
    return vars(parser.parse_args(words))


def run(capsys: pytest.CaptureFixture[str], *options: Any, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["args", *map(str, options)])
    shown = capsys.readouterr()
    assert exit_.value.code == code, shown
    return shown.out, shown.err


def words_of(capsys: pytest.CaptureFixture[str], *options: Any) -> list[str]:
    out, _ = run(capsys, *options)
    return shlex.split(out.replace("\\\n", " "))


# --- the table


def test_the_table_has_stock_s_options() -> None:
    names = [row.flag.name for row in ARGUMENTS if row.flag is not None and row not in MINDSPEED]
    assert names == list(STOCK)


LAYOUTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "whole": ({}, "local", "sequential"),
    "cut": (dict(tp=2, ep=2, etp=1), "transformer_engine", "grouped"),
    "uneven": (dict(tp=2, pp=2, split=PipelineSplit(first=1)), "transformer_engine", "stacked"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_stock_s_parser_gives_the_args_back(fields: dict[str, Any], layout: str) -> None:
    """All of them was also run through the parsers and validate_args of core_v0.12.0 to core_v0.19.0."""
    spec = tiny_spec(**{**fields, "dtype": dtype_named("bf16")})
    sizes, impl, experts = LAYOUTS[layout]
    if not spec.num_experts:
        sizes = {name: value for name, value in sizes.items() if name not in ("ep", "etp")}
    if spec.values.get("num_query_groups") == 3 and "tp" in sizes:
        sizes = {**sizes, "tp": 3}
    parallel = parallel_for(spec, **{"tp": 1, "pp": 1, **sizes})
    router = dtype_named("fp32") if spec.num_experts else None
    args = {**written_args(Context(spec, parallel, experts, 128, 64, impl, router=router)), "seq_length": 32}
    found = {**UNSAID, **parsed(shlex.split(" ".join(all_flags(args))))}
    elsewhere = {"no_load_optim": "no_save_optim", "no_load_rng": "no_save_rng"}
    wrong = {
        name: (value, args[elsewhere.get(name, name)])
        for name, value in found.items()
        if elsewhere.get(name, name) in args and value != args[elsewhere.get(name, name)]
    }
    if not args["group_query_attention"]:
        wrong.pop("num_query_groups", None)  # stock reads it only where groups are asked for
    wrong.pop("ckpt_format")  # how a run saves; loading recognises what is there
    if not spec.num_experts:
        wrong.pop("expert_tensor_parallel_size", None)
    assert wrong == {}


def test_flags_that_releases_lack_are_named() -> None:
    """What the parsers of core_v0.8.0 to 0.17.1 do not know."""
    names = "moe-ffn-hidden-size 8,padded-vocab-size 128,moe-shared-expert-gate,moe-use-legacy-grouped-gemm"
    assert flag_warnings(tiny_spec(), [f"--{name}" for name in names.split(",")]) == [
        "--moe-ffn-hidden-size exists from Megatron-LM 0.10 on",
        "--padded-vocab-size exists from Megatron-LM 0.14 on",
        "--moe-shared-expert-gate exists from Megatron-LM 0.16 on",
        "--moe-use-legacy-grouped-gemm exists from Megatron-LM 0.11 on",
        "--moe-use-legacy-grouped-gemm exists up to Megatron-LM 0.16 only",
    ]


@pytest.mark.parametrize(
    ("case", "release"),
    [
        ("plain", "0.8"),  # whose padded vocabulary every release works out
        ("qkv bias", "0.8"),
        ("llama3 rope", "0.10"),
        ("llama3.2 rope", "0.11"),
        ("linear rope", "0.19"),  # before, pretrain_gpt.py takes the flag and ignores it
        ("rotation on one layer", "0.13"),
        ("window", "0.15"),
        ("sinks", "0.15"),
        ("quick gelu", "0.15"),
        ("experts", "0.11"),  # which first ran such a model, though 0.10 knows the flags
        ("latents", "0.12"),  # where YaRN by a factor of 1 is what --rope-type rope is later
        ("tokens further on", "0.12"),
        ("gated DeltaNet", "0.16"),
        ("sparse attention", "0.19"),  # 0.18 computes another
        ("gated shared expert", "0.16"),
        ("multipliers", "0.17"),
    ],
)
def test_the_least_release_is_the_first_that_knows_every_flag(case: str, release: str) -> None:
    spec = tiny_spec(**CASES[case])
    args = written_args(Context(spec, parallel_for(spec, 1, 1), "sequential", 128, 128, "local"))
    assert least_release(spec, args, 1) == release
    assert unknown_flags(args, release) == []
    if release != OLDEST and case != "experts":
        assert unknown_flags(args, f"0.{int(release.partition('.')[2]) - 1}")


# --- folders


#: The model arguments of Megatron-LM's own documents (core_v0.16.1): docs/llama_mistral.md, examples/mixtral.
DOCUMENTED = {
    "Llama-3.1-8B": """--seq-length 4096 --max-position-embeddings 131072 --untie-embeddings-and-output-weights
        --normalization RMSNorm --position-embedding-type rope --group-query-attention --num-query-groups 8
        --disable-bias-linear --rotary-base 500000 --use-rope-scaling --swiglu --bf16 --ffn-hidden-size 14336
        --num-attention-heads 32""",
    "Mixtral-8x7B": """--disable-bias-linear --seq-length 4096 --max-position-embeddings 32768 --num-layers 32
        --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --attention-dropout 0.0 --hidden-dropout 0.0
        --normalization RMSNorm --position-embedding-type rope --swiglu --untie-embeddings-and-output-weights
        --group-query-attention --num-query-groups 8 --rotary-base 1000000 --num-experts 8 --moe-router-topk 2
        --moe-router-load-balancing-type aux_loss --moe-grouped-gemm --moe-token-dispatcher-type alltoall --bf16""",
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_folder_has_the_documented_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    folder = sparse_hf(PUBLISHED[name], tmp_path / "hf")
    found, documented = words_of(capsys, folder), DOCUMENTED[name].split()
    said, wanted = parsed(found), parsed(documented)
    attributes = {STOCK[word][0] for word in documented if word.startswith("--")}
    assert {attribute: said[attribute] for attribute in attributes} == {
        attribute: wanted[attribute] for attribute in attributes
    }
    layout = (
        "--load",
        "--tensor-model-parallel-size",
        "--transformer-impl",
        "--expert-model-parallel-size",
        "--sequence-parallel",
    )
    assert not set(layout) & set(found)


def test_a_checkpoint_also_says_how_it_is_cut(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = sparse_megatron(PUBLISHED["Mixtral-8x7B"], tmp_path / "meg", tp=2, pp=4, ep=4, etp=1)
    said = parsed(words_of(capsys, folder))
    sizes = ("tensor_model", "pipeline_model", "expert_model", "expert_tensor")
    assert [said[f"{size}_parallel_size"] for size in sizes] == [2, 4, 4, 1]
    assert (said["transformer_impl"], said["sequence_parallel"]) == ("transformer_engine", True)
    assert (said["make_vocab_size_divisible_by"], said["padded_vocab_size"]) == (128, 32000)
    assert (said["load"], said["no_load_optim"], said["no_load_rng"]) == (str(folder), True, True)
    named = parsed(words_of(capsys, folder, "--ckpt-dir-name", "iter_0000001"))
    assert named["load"] is None, "Megatron-LM loads what the tracker names, which need not be this folder"


def test_a_shell_takes_what_is_printed(hf_model: HFModel, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = shutil.copytree(hf_model("qwen3-moe-dense-layers"), tmp_path / "a model $HOME")
    (source / "tokenizer.json").write_text("{}")
    out, _ = run(capsys, source)
    script = f"FLAGS=({out})\nprintf '%s\\n' \"${{FLAGS[@]}}\""
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    found = json.loads(run(capsys, source, "--json")[0])
    assert words == found["flags"]
    said = parsed(words)
    assert said["tokenizer_model"] == str(source) and said["tokenizer_type"] == "HuggingFaceTokenizer"
    assert said["moe_layer_freq"] == [1, 1, 0, 1] == found["arguments"]["moe_layer_freq"]
    assert found["arguments"]["params_dtype"] == "torch.float32"
    assert all(
        note.endswith(("exists from Megatron-LM 0.10 on", "exist from Megatron-LM 0.10 on")) for note in found["notes"]
    )


def test_a_training_run_s_own_choices_are_kept(
    hf_model: HFModel, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = hf_to_megatron(hf_model("mixtral"), tmp_path / "meg", tp=1, divisor=50, impl="local")
    args = args_of(folder)
    chosen = dict(
        hidden_dropout=0.1,
        seq_length=128,
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model="/gone/tokenizer.model",
        moe_router_load_balancing_type="sinkhorn",
        moe_token_dispatcher_type="allgather",
    )
    vars(args).update(chosen, no_save_optim=None, no_save_rng=None)
    edit_rank(folder, "mp_rank_00", args=args)
    said = parsed(words_of(capsys, folder))
    assert {name: said[name] for name in chosen} == chosen
    assert (said["no_load_optim"], said["no_load_rng"]) == (None, None)
    assert (said["make_vocab_size_divisible_by"], said["padded_vocab_size"]) == (50, 200)
    assert (said["transformer_impl"], said["moe_grouped_gemm"]) == ("local", False)


def test_a_divisor_is_found_where_none_is_recorded(
    hf_model: HFModel, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = hf_to_megatron(hf_model("llama3"), tmp_path / "meg", tp=2, divisor=50)
    args = args_of(folder)
    del args.make_vocab_size_divisible_by
    for rank in ("mp_rank_00", "mp_rank_01"):
        edit_rank(folder, rank, args=args)
    said = parsed(words_of(capsys, folder))
    assert said["padded_vocab_size"] == 200
    divisor = said["make_vocab_size_divisible_by"] * said["tensor_model_parallel_size"]
    assert -(-199 // divisor) * divisor == 200


@pytest.mark.parametrize(
    ("name", "content", "kind", "note"),
    [
        ("tokenizer.model", b"\n\x0b\n\x05<unk>", "Llama2Tokenizer", ""),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", None, "is Llama 3's tiktoken file"),
        ("tokenizer.json", b"{}", "HuggingFaceTokenizer", ""),
        (None, b"", None, "no tokenizer is known"),
    ],
    ids=["sentencepiece", "tiktoken", "json", "none"],
)
def test_tokenizers(
    hf_model: HFModel,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    name: str | None,
    content: bytes,
    kind: str | None,
    note: str,
) -> None:
    folder = hf_to_megatron(hf_model("llama3"), tmp_path / "meg")
    args = args_of(folder)
    args.tokenizer_model = None
    if name is not None:
        (tmp_path / name).write_bytes(content)
        args.tokenizer_model = str(tmp_path / name)
    edit_rank(folder, "mp_rank_00", args=args)
    out, err = run(capsys, folder)
    said = parsed(shlex.split(out.replace("\\\n", " ")))
    assert said["tokenizer_type"] == kind
    model = str(tmp_path if name == "tokenizer.json" else tmp_path / "tokenizer.model")
    assert said["tokenizer_model"] == (model if kind else None)
    assert note in err


def test_what_to_know_goes_to_standard_error(
    hf_model: HFModel, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, err = run(capsys, hf_model("llama3.2-tied"))
    assert "--use-rope-scaling exists from Megatron-LM 0.10 on\n" in err
    assert "warning: --rope-scaling-factor 32.0:" in err and "warning" not in out
    habana = hf_to_megatron(hf_model("mixtral"), tmp_path / "habana", expert_layout="dynamic", impl="local")
    assert "--moe-dynamic-hpu" in run(capsys, habana)[1]


def test_what_arguments_cannot_express_is_refused(hf_model: HFModel, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, hf_model("opt"), code=1)
    assert out == "" and "an MLP of ReLU" in err and "--allow-inexpressible" in err
    out, err = run(capsys, hf_model("opt"), "--allow-inexpressible")
    assert "--normalization LayerNorm" in out and "warning: Megatron-LM will not compute an MLP of ReLU" in err


def test_layers_of_this_project_come_with_the_line_that_installs_them(
    hf_model: HFModel, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, err = run(capsys, hf_model("olmo2"))
    assert "--spec megatron_layers.post_norms_over_heads spec" in out and "--qk-layernorm" in out
    assert "--spec exists from Megatron-LM 0.12 on" in err
    words = "names a layer of this project's package megatron_layers"
    assert words in err and "pip install --no-deps DIR" in err
    planned = mc.plan(hf_model("olmo2"), tmp_path / "megatron")
    assert [note for note in planned.notes if words in note]

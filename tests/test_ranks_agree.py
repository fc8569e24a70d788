"""The ranks of a checkpoint say the same of the model, or they are of different saves."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_converters.basics.errors import ConversionError
from megatron_converters.formats.megatron.arguments import rank_invariants
from megatron_converters.formats.megatron.rank_files_source import MegatronSource
from megatron_converters.storage.pickle_reader import StandIn
from tests.conversions import hf_to_megatron
from tests.helpers import edit_rank, rank_content, refused, succeeded, verb

HFModel = Callable[..., Path]
#: By family: arguments that change no tensor's shape, or that no rank of another save shares, and another value of each.
CHANGES: dict[str, dict[str, Any]] = {
    "llama3.1": {
        "norm_epsilon": 1e-6,
        "layernorm_epsilon": 1e-6,
        "rotary_base": 10000,
        "use_rope_scaling": False,
        "rope_scaling_factor": 32.0,
        "rotary_seq_len_interpolation_factor": 2,
        "window_size": (7, 0),
        "padded_vocab_size": 512,
        "vocab_size": 200,
        "params_dtype": torch.bfloat16,
        "bf16": True,
        "kv_channels": None,
        "num_query_groups": None,
        "swiglu": None,
        "add_qkv_bias": True,
        "softmax_scale": 1.0,
        "mtp_num_layers": 1,
        "num_experts": 8,
        "pipeline_model_parallel_layout": "Et|tttL",
        "account_for_loss_in_pipeline_split": True,
        "transformer_impl": "local",
        "make_vocab_size_divisible_by": 64,
        # What no row describes, but decides the model: the vocabulary, this project's marks, arguments of other programs.
        "null_tokenizer_eod_id": 3,
        "multipliers_folded": True,
        "sliding_window": 32,
        "rope_scaling": {"rope_type": "yarn"},
    },
    "qwen2-moe": {
        "num_experts": None,
        "moe_router_topk": 4,
        "moe_router_pre_softmax": False,
        "moe_router_load_balancing_type": "sinkhorn",
        "moe_layer_freq": [1, 1, 0, 1],
        "moe_ffn_hidden_size": 64,
        "moe_shared_expert_intermediate_size": None,
        "moe_shared_expert_gate": False,
        "moe_router_score_function": "sigmoid",
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": False,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": 1,
    },
}


@pytest.fixture
def saved(hf_model: HFModel, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint of TP 2, and of a mixture of experts EP 2, to be changed."""

    def make(family: str) -> Path:
        experts = {"ep": 2, "etp": 2} if family in ("qwen2-moe",) else {}
        return hf_to_megatron(hf_model(family), tmp_path, tp=2, **experts)

    return make


def _change(checkpoint: Path, folder: str, /, **changes: Any) -> None:
    args = vars(rank_content(checkpoint, folder)["args"])
    edit_rank(checkpoint, folder, args=argparse.Namespace(**{**args, **changes}))


@pytest.mark.parametrize(
    ("family", "rank"), [("llama3.1", "mp_rank_01"), ("qwen2-moe", "mp_rank_01_001")], ids=list(CHANGES)
)
def test_what_one_rank_says_otherwise_is_named(family: str, rank: str, saved: Callable[[str], Path]) -> None:
    checkpoint = saved(family)
    kept = vars(rank_content(checkpoint, rank)["args"])
    _change(checkpoint, rank, **CHANGES[family])
    with pytest.raises(ConversionError, match="of different saves") as caught:
        MegatronSource(checkpoint)
    said = {line.strip(" -") for line in str(caught.value).splitlines()[1:-1]}
    assert said == {f"{rank}: {name} is {value!r}, not {kept.get(name)!r}" for name, value in CHANGES[family].items()}


def test_two_saves_are_no_equal_of_a_model(saved: Callable[[str], Path], hf_model: HFModel, tmp_path: Path) -> None:
    """They differ in what no tensor shows."""
    checkpoint = saved("llama3.1")
    succeeded(verb("verify", hf_model("llama3.1"), checkpoint))
    _change(checkpoint, "mp_rank_01", norm_epsilon=1e-6, layernorm_epsilon=1e-6)
    words = ("mp_rank_01: layernorm_epsilon is 1e-06, not 1e-05", "of different saves")
    refused(verb("verify", hf_model("llama3.1"), checkpoint), *words, code=2)
    refused(verb("convert", checkpoint, tmp_path / "hf"), *words)


def test_a_recorded_configuration_counts_too(saved: Callable[[str], Path]) -> None:
    """It says what args cannot."""
    checkpoint = saved("llama3.1")
    _change(checkpoint, "mp_rank_01", hf_config=None)
    with pytest.raises(ConversionError, match=r"mp_rank_01: hf_config is None, not {'architectures'"):
        MegatronSource(checkpoint)


def test_what_ranks_may_say_otherwise(saved: Callable[[str], Path]) -> None:
    """Their own numbers and what no model depends on; None is as good as nothing, and args are not everywhere."""
    checkpoint = saved("qwen2-moe")
    folders = [f"mp_rank_0{tp}_00{ep}" for tp in range(2) for ep in range(2)]
    for number, folder in enumerate(folders):
        own = dict(rank=number, local_rank=number, lr=0.1 * number, data_path=[str(number)])
        _change(checkpoint, folder, **own, **({"mtp_num_layers": None} if number else {"mtp_use_repeated_layer": None}))
    edit_rank(checkpoint, folders[1], args=None)
    assert MegatronSource(checkpoint).spec.num_experts == 8


def test_objects_are_compared_by_what_they_hold() -> None:
    """As some versions of Megatron-LM keep a pipeline layout."""
    one, same, other = (
        rank_invariants(None, argparse.Namespace(pipeline_model_parallel_layout=StandIn(["E", "t", last])))
        for last in "LLt"
    )
    assert one == same != other


def test_the_first_stage_of_habana_s_saver_records_the_vocabulary_of_a_rank(hf_model: HFModel, tmp_path: Path) -> None:
    """As its tree wrote it for TP 2 and PP 2, and no other number of rows."""
    checkpoint = hf_to_megatron(hf_model("llama2"), tmp_path / "saved", tp=2, pp=2)
    rows = rank_content(checkpoint, "mp_rank_00_000")["model"]["embedding.word_embeddings.weight"].shape[0]
    for tp in range(2):
        _change(checkpoint, f"mp_rank_0{tp}_000", padded_vocab_size=rows)
    succeeded(verb("verify", hf_model("llama2"), checkpoint))
    _change(checkpoint, "mp_rank_01_000", padded_vocab_size=rows - 1)
    refused(verb("verify", hf_model("llama2"), checkpoint), f"padded_vocab_size is {rows - 1}, not {2 * rows}", code=2)

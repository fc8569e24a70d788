"""Command-R, Falcon, MiniMax-M2 and GLM-4-0414: published configurations, cuts by hand, scales of logits, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_converters.basics.errors import ConversionError
from megatron_converters.families.config_json import config_for, config_from_spec, spec_from_config
from megatron_converters.model.layers import ALL_HEADS, AROUND, LAYER_NORM, SIGMOID
from tests.conversions import different, hf_to_megatron, megatron_to_hf
from tests.helpers import hf_tensors, rank_content
from tests.oracle.hf import TOKENS, difference
from tests.oracle.pool import MegatronPool

Config = dict[str, Any]
HFModel = Callable[..., Path]


def named(architecture: str, model_type: str, layers: int, hidden: int, heads: int, **more: Any) -> Config:
    sizes = dict(num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads)
    return dict(architectures=[architecture], model_type=model_type, torch_dtype="bfloat16", **sizes, **more)


_COHERE: Config = dict(
    **dict(attention_bias=False, attention_dropout=0.0, hidden_act="silu", initializer_range=0.02, layer_norm_eps=1e-5),
    **dict(vocab_size=256000, bos_token_id=5, eos_token_id=255001, pad_token_id=0, use_cache=True),
)
_FALCON: Config = dict(
    **dict(alibi=False, bias=False, attention_dropout=0.0, hidden_dropout=0.0, initializer_range=0.02),
    **dict(layer_norm_epsilon=1e-5, parallel_attn=True, vocab_size=65024, bos_token_id=11, eos_token_id=11),
    **dict(apply_residual_connection_post_layernorm=False, multi_query=True, use_cache=True),
)
#: Published files of config.json, and properties that they say.
PUBLISHED: dict[str, tuple[Config, Config]] = {
    "command-r-v01": (
        named("CohereForCausalLM", "cohere", 40, 8192, 64, num_key_value_heads=64, intermediate_size=22528)
        | _COHERE
        | dict(logit_scale=0.0625, model_max_length=131072, max_position_embeddings=8192, rope_theta=8000000.0),
        dict(logits_multiplier=0.0625, parallel_block=True, parallel_norms=False, rotary_base=8e6, tied=True),
    ),
    "command-r7b": (
        named("Cohere2ForCausalLM", "cohere2", 32, 4096, 32, num_key_value_heads=8, intermediate_size=14336)
        | _COHERE
        | dict(cache_implementation="hybrid", head_dim=128, layer_switch=4, logit_scale=0.25, rotary_pct=1.0)
        | dict(max_position_embeddings=132096, order_of_interleaved_layers="local_attn_first", rope_scaling=None)
        | dict(position_embedding_type="rope_gptj", rope_theta=50000, sliding_window=4096, sliding_window_pattern=4)
        | dict(use_embedding_sharing=True, use_gated_activation=True, use_parallel_block=True)
        | dict(use_parallel_embedding=True, use_qk_norm=False),
        dict(logits_multiplier=0.25, normalization=LAYER_NORM, rotary_interleaved=True, kv_channels=128),
    ),
    "falcon-7b": (
        named("FalconForCausalLM", "falcon", 32, 4544, 71, new_decoder_architecture=False) | _FALCON,
        dict(num_query_groups=1, parallel_norms=False, ffn_hidden_size=18176, activation="gelu", tied=True),
    ),
    "falcon-40b": (
        named("FalconForCausalLM", "falcon", 60, 8192, 128, new_decoder_architecture=True, num_kv_heads=8) | _FALCON,
        dict(num_query_groups=8, parallel_block=True, parallel_norms=True, gated=False),
    ),
    "falcon-11b": (
        named("FalconForCausalLM", "falcon", 60, 4096, 32, new_decoder_architecture=True, num_kv_heads=8)
        | _FALCON
        | dict(num_ln_in_parallel_attn=1, ff_factor=4, max_position_embeddings=8192, rope_theta=500042.0)
        | dict(activation="gelu", rope_scaling=None, tie_word_embeddings=False),
        dict(num_query_groups=8, parallel_norms=False, rotary_base=500042.0, tied=False),
    ),
    "minimax-m2": (
        named("MiniMaxM2ForCausalLM", "minimax_m2", 62, 3072, 48, num_key_value_heads=8, head_dim=128)
        | dict(attention_dropout=0.0, attn_type_list=[1] * 62, bos_token_id=None, eos_token_id=None)
        | dict(hidden_act="silu", initializer_range=0.02, intermediate_size=1536, max_position_embeddings=196608)
        | dict(layernorm_full_attention_beta=1.0, layernorm_linear_attention_beta=1.0, layernorm_mlp_beta=1.0)
        | dict(mlp_intermediate_size=8192, mtp_transformer_layers=1, num_experts_per_tok=8, num_local_experts=256)
        | dict(num_mtp_modules=3, output_router_logits=False, qk_norm_type="per_layer", rms_norm_eps=1e-6)
        | dict(rope_theta=5000000, rotary_dim=64, router_aux_loss_coef=0.001, router_jitter_noise=0.0)
        | dict(scoring_func="sigmoid", shared_intermediate_size=0, shared_moe_mode="sigmoid", sliding_window=None)
        | dict(tie_word_embeddings=False, use_mtp=True, use_qk_norm=True, use_routing_bias=True, vocab_size=200064),
        dict(
            qk_norm=ALL_HEADS, rotary_percent=0.5, moe_router_score_function=SIGMOID, num_experts=256, mtp_num_layers=0
        ),
    ),
    "GLM-4-32B-0414": (
        named("Glm4ForCausalLM", "glm4", 61, 6144, 48, num_key_value_heads=8, head_dim=128, partial_rotary_factor=0.5)
        | dict(attention_bias=False, attention_dropout=0.0, hidden_act="silu", initializer_range=0.02)
        | dict(intermediate_size=23040, max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=10000.0)
        | dict(tie_word_embeddings=False, use_cache=True, vocab_size=151552, pad_token_id=151329),
        dict(block_norms=AROUND, rotary_percent=0.5, rotary_interleaved=True, qkv_bias=False),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read_and_come_back(name: str) -> None:
    config, wanted = PUBLISHED[name]
    spec = spec_from_config(config)
    assert {key: spec.values.get(key) for key in wanted} == wanted
    assert config_for(spec, config) == (config, [])
    assert spec_from_config(config_from_spec(spec)) == spec


def test_layers_of_command_r7b_rotate_where_they_have_a_window() -> None:
    values = spec_from_config(PUBLISHED["command-r7b"][0]).values
    assert values["sliding_window"][2:5] == (4096, None, 4096)
    assert values["rope"][2:5] == (True, False, True)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("command-r-v01", {"use_qk_norm": True}, "one norm of queries for all heads, and not one for each"),
        (
            "command-r7b",
            {"order_of_interleaved_layers": "global_attn_first"},
            "the architecture has 'local_attn_first'",
        ),
        ("command-r7b", {"use_embedding_sharing": False}, "which repeats tie_word_embeddings"),
        ("falcon-7b", {"alibi": True}, "Megatron-LM has no ALiBi"),
        ("falcon-7b", {"parallel_attn": False}, "only those of parallel blocks are converted"),
        ("falcon-7b", {"num_ln_in_parallel_attn": 2}, "only those of parallel blocks are converted"),
        ("falcon-7b", {"multi_query": False, "num_kv_heads": 8}, "neither new_decoder_architecture nor multi_query"),
        ("falcon-7b", {"multi_query": "yes"}, "it must be true or false"),
        ("falcon-7b", {"n_head": 71}, "n_head"),
        ("minimax-m2", {"attn_type_list": [0] + [1] * 61}, "attn_type_list"),
        ("minimax-m2", {"rotary_dim": 256}, "it must be a part of it"),
        ("minimax-m2", {"shared_intermediate_size": 8}, "shared_intermediate_size=8"),
    ],
)
def test_what_they_do_not_have_is_refused(name: str, changes: Config, words: str) -> None:
    with pytest.raises(ConversionError, match=words):
        spec_from_config(PUBLISHED[name][0] | changes)


def test_falcons_norms_and_groups_by_hand(hf_model: HFModel, tmp_path: Path) -> None:
    """A group is its two query heads, its key and its value, of 8 rows each, in the file as in Megatron-LM: two groups a rank."""
    folder = hf_model("falcon-two-norms")
    root, tensors = hf_to_megatron(folder, tmp_path / "megatron", tp=2), hf_tensors(folder)
    for rank in (0, 1):
        model = rank_content(root, f"mp_rank_{rank:02d}")["model"]
        for kind in ("weight", "bias"):
            theirs = tensors[f"transformer.h.3.self_attention.query_key_value.{kind}"]
            ours = model[f"decoder.layers.3.self_attention.linear_qkv.{kind}"]
            assert torch.equal(ours, theirs[rank * 64 : (rank + 1) * 64])
            for module, norm in (("self_attention.linear_qkv", "ln_attn"), ("mlp.linear_fc1", "ln_mlp")):
                ours = model[f"decoder.layers.3.{module}.layer_norm_{kind}"]
                assert torch.equal(ours, tensors[f"transformer.h.3.{norm}.{kind}"])


def test_a_scale_of_logits_is_folded_into_the_final_norm(
    megatron_pool: MegatronPool, hf_model: HFModel, logits: Any, tmp_path: Path
) -> None:
    """Norms without a bias get zeros, which stay zeros; 1/4 is exact, so that the way back is, too."""
    folder = hf_model("cohere")
    root = hf_to_megatron(folder, tmp_path / "folded", megatron_version="0.16", impl="local")
    assert difference(megatron_pool.logits(root, TOKENS), logits("cohere")) < 1e-5
    model, tensors = rank_content(root)["model"], hf_tensors(folder)
    assert torch.equal(model["decoder.final_layernorm.weight"], tensors["model.norm.weight"] / 4)
    for norm in ("decoder.final_layernorm", "decoder.layers.2.input_layernorm"):
        assert torch.equal(model[f"{norm}.bias"], torch.zeros(64))
    assert different(tensors, hf_tensors(megatron_to_hf(root, tmp_path / "hf"))) == []

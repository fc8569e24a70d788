"""config.json of published models that are Llamas, or nearly: each is read, and as the model that it is."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_converters.families.config_json import config_for, config_from_spec, spec_from_config
from megatron_converters.model.rotary import RopeScaling
from megatron_converters.model.spec import ModelSpec, PerLayer

Config = dict[str, Any]


def llama(
    layers: int, hidden: int, ffn: int, heads: tuple[int, int], vocabulary: int, positions: int, **more: Any
) -> Config:
    """Keys that nearly all of them have; `heads` are those of queries and of keys."""
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn, "vocab_size": vocabulary}
    common = {"hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16", "use_cache": True}
    named = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": positions}
    counts = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "tie_word_embeddings": False}
    return {**named, **sizes, **counts, **common, **tokens, "transformers_version": "4.46.0", **more}


NO_BIAS = {"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False}
PLAIN_ROPE: Config = {"pretraining_tp": 1, "rope_scaling": None}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def llama3(factor: float) -> Config:
    return {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": factor, **LLAMA3}}


def named(model_type: str, architecture: str) -> Config:
    return {"model_type": model_type, "architectures": [architecture]}


def own_code(name: str, architecture: str) -> Config:
    """Entry for code of the model's own, and names of both."""
    return {
        **named(name, architecture),
        "auto_map": {
            "AutoConfig": f"configuration_{name}.Config",
            "AutoModelForCausalLM": f"modeling_{name}.{architecture}",
        },
    }


QWEN_OFF = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 28}
SMOL2 = {
    **{"is_llama_config": True, "rope_interleaved": False, "rope_theta": 130000.0, "initializer_range": 0.0417},
    "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
}
NOPE = [int((layer + 1) % 4 != 0) for layer in range(36)]
SMOLLM3 = {
    **{"no_rope_layers": NOPE, "no_rope_layer_interval": 4, "layer_types": ["full_attention"] * 36, **QWEN_OFF},
    **{"rms_norm_eps": 1e-6, "rope_theta": 5000000.0, "bos_token_id": None, "pad_token_id": 128004},
}
PUBLISHED: dict[str, tuple[Config, Config]] = {
    "Yi-34B": (
        llama(60, 7168, 20480, (56, 8), 64000, 4096, **PLAIN_ROPE, rope_theta=5e6, pad_token_id=0),
        {"kv_channels": 128, "rotary_base": 5e6},
    ),
    "deepseek-llm-67b": (llama(95, 8192, 22016, (64, 8), 102400, 4096, **PLAIN_ROPE, attention_bias=False), {}),
    "deepseek-coder-33b": (
        llama(62, 7168, 19200, (56, 8), 32256, 16384, rope_theta=1e5, rope_scaling={"factor": 4.0, "type": "linear"}),
        {"rope_scaling": RopeScaling("linear", 4.0)},
    ),
    "SOLAR-10.7B": (llama(48, 4096, 14336, (32, 8), 32000, 4096, **PLAIN_ROPE), {}),
    "SmolLM-135M": (
        llama(30, 576, 1536, (9, 3), 49152, 2048, **NO_BIAS, **PLAIN_ROPE, tie_word_embeddings=True),
        {"kv_channels": 64, "tied": True},
    ),
    "SmolLM2-1.7B": (
        llama(24, 2048, 8192, (32, 32), 49152, 8192, **{**NO_BIAS, **PLAIN_ROPE, **SMOL2, "tie_word_embeddings": True}),
        {"rotary_base": 130000.0, "num_query_groups": 32},
    ),
    "SmolLM3-3B": (
        {
            key: value
            for key, value in llama(36, 2048, 11008, (16, 4), 128256, 65536, **NO_BIAS, **PLAIN_ROPE).items()
            if key != "tie_word_embeddings"
        }
        | SMOLLM3
        | named("smollm3", "SmolLM3ForCausalLM"),
        {"tied": True, "rope": PerLayer(map(bool, NOPE)), "sliding_window": None, "rotary_base": 5e6},
    ),
    "TinyLlama-1.1B": (llama(22, 2048, 5632, (32, 4), 32000, 2048, **PLAIN_ROPE, attention_bias=False), {}),
    "Llama-3.1-Minitron-4B-Width": (
        llama(32, 3072, 9216, (32, 8), 128256, 131072, **NO_BIAS, **llama3(8.0), head_dim=128),
        {"kv_channels": 128, "rope_scaling": RopeScaling("llama3", 8.0)},
    ),
    "Llama-3.1-Minitron-4B-Depth": (llama(16, 4096, 14336, (32, 8), 128256, 131072, **NO_BIAS, **llama3(8.0)), {}),
    "Mistral-NeMo-Minitron-8B": (
        llama(40, 4096, 11520, (32, 8), 131072, 8192, head_dim=128, sliding_window=None, rope_theta=1e6)
        | named("mistral", "MistralForCausalLM"),
        {"kv_channels": 128, "sliding_window": None},
    ),
    "Llama-3.1-Nemotron-Nano-8B": (
        llama(32, 4096, 14336, (32, 8), 128256, 131072, **NO_BIAS, **llama3(8.0), head_dim=128),
        {},
    ),
    "Llama-3.1-Nemotron-70B": (
        llama(80, 8192, 28672, (64, 8), 128256, 131072, **NO_BIAS, **llama3(8.0), eos_token_id=[128001, 128009]),
        {},
    ),
    "IQuest-Coder-V1-40B": (
        llama(80, 5120, 27648, (40, 8), 76800, 131072, **NO_BIAS, head_dim=128, rope_theta=5e5, clip_qkv=None)
        | own_code("iquestcoder", "IQuestCoderForCausalLM")
        | {"use_sliding_window": False, "sliding_window": None},
        {"kv_channels": 128, "qkv_bias": False},
    ),
    "Seed-OSS-36B": (
        llama(64, 5120, 27648, (80, 8), 155136, 524288, head_dim=128, rope_theta=1e7, mlp_bias=False)
        | {"attention_bias": True, "attention_out_bias": False, "attention_dropout": 0.1, "residual_dropout": 0.1}
        | {"rope_scaling": {"rope_type": "default"}, "rms_norm_eps": 1e-6, "pad_token_id": 1}
        | named("seed_oss", "SeedOssForCausalLM"),
        {"qkv_bias": True, "proj_bias": False, "attention_dropout": 0.1},
    ),
    "InternLM3-8B": (
        llama(48, 4096, 10240, (32, 2), 128512, 32768, head_dim=128, bias=False, qkv_bias=False, rope_theta=5e7)
        | {"rope_scaling": {"factor": 6.0, "rope_type": "dynamic"}}
        | own_code("internlm3", "InternLM3ForCausalLM"),
        {"rope_scaling": RopeScaling("dynamic", 6.0), "mlp_bias": False},
    ),
    "ERNIE-4.5-0.3B": (
        llama(18, 1024, 3072, (16, 2), 103424, 131072, head_dim=128, rope_theta=5e5, use_bias=False)
        | {"tie_word_embeddings": True, "rope_scaling": None, "pad_token_id": 0}
        | named("ernie4_5", "Ernie4_5ForCausalLM"),
        {"rotary_interleaved": True, "kv_channels": 128},
    ),
    "ERNIE-4.5-0.3B with its own code": (
        llama(18, 1024, 3072, (16, 2), 103424, 131072, head_dim=128, rope_theta=500000, use_bias=False)
        | own_code("ernie4_5", "Ernie4_5_ForCausalLM"),
        {"rotary_interleaved": True, "tied": False},
    ),
    "helium-1-2b": (
        llama(28, 2048, 8192, (16, 8), 64000, 4096, **NO_BIAS, head_dim=128, rope_theta=20000.0, rms_norm_eps=1e-8)
        | named("helium", "HeliumForCausalLM"),
        {"rotary_interleaved": True, "norm_epsilon": 1e-8, "proj_bias": False},
    ),
    "Ministral-8B-Instruct-2410": (
        llama(36, 4096, 12288, (32, 8), 131072, 32768, head_dim=128, sliding_window=32768, rope_theta=1e8)
        | named("mistral", "MistralForCausalLM"),
        {"sliding_window": 32768},
    ),
    "Ministral-8B as transformers 5 has it": (
        llama(36, 4096, 12288, (32, 8), 131072, 32768, head_dim=128, sliding_window=32768, rope_theta=1e8)
        | {"layer_types": ["full_attention", *["sliding_attention"] * 3] * 9}
        | named("ministral", "MinistralForCausalLM"),
        {"sliding_window": PerLayer([None, 32768, 32768, 32768] * 9)},
    ),
    "MiMo-7B": (
        llama(36, 4096, 11008, (32, 8), 151680, 32768, head_dim=128, rope_theta=640000, num_nextn_predict_layers=1)
        | {"attention_bias": True, "attention_dropout": 0.0, "rope_scaling": None, **QWEN_OFF}
        | own_code("mimo", "MiMoForCausalLM"),
        {"qkv_bias": True, "proj_bias": False, "mtp_num_layers": 1, "kv_channels": 128},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_read_and_kept(name: str) -> None:
    config, facts = PUBLISHED[name]
    spec = spec_from_config(config)
    assert spec.family == config["model_type"]
    sizes = {"num_layers": "num_hidden_layers", "ffn_hidden_size": "intermediate_size", "vocab_size": "vocab_size"}
    sizes |= {"num_query_groups": "num_key_value_heads", "max_position_embeddings": "max_position_embeddings"}
    expected = {field: config[key] for field, key in sizes.items()} | facts
    assert {field: spec.values[field] for field in expected} == expected
    assert spec_from_config(config_from_spec(spec)) == spec
    written, changed = config_for(spec, config)
    # Code of its own, which is not there, and its name for the class.
    assert {each.partition(":")[0] for each in changed} <= ({"auto_map", "architectures"} & config.keys())
    assert "auto_map" in config or not changed
    assert spec_from_config(written) == spec
    assert ModelSpec.from_dict(spec.to_dict()) == spec

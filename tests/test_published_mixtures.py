"""Configurations as they are published of families with routers that score by a sigmoid, with latents, and of Granite's mixtures.

Each is read as transformers' class of it reads it, down to the last field; what Megatron-LM lacks of it is named.
"""

from __future__ import annotations

from typing import Any

import pytest

from megatron_converters.basics.errors import ConversionError
from megatron_converters.families.config_json import config_from_spec, spec_from_config
from megatron_converters.formats.megatron.arguments import inexpressible
from tests.test_hf_config import facts, ours, theirs

_COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
_CODE = {
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "seq_aux": True,
}
_LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_CHOICE = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
_YARN = {"type": "yarn", "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}

_V3 = {
    **{**_COMMON, **_CODE, **_LATENT, **_CHOICE, "architectures": ["DeepseekV3ForCausalLM"]},
    **{"model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432},
    **{"moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128},
    **{"attention_bias": False, "q_lora_rank": 1536, "n_group": 8, "topk_group": 4, "n_routed_experts": 256},
    **{"n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5},
    **{"num_nextn_predict_layers": 1, "max_position_embeddings": 163840, "rope_theta": 10000, "rms_norm_eps": 1e-06},
    "rope_scaling": {**_YARN, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0},
}
_FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
_KIMI_K2 = {
    **{**_V3, "model_type": "kimi_k2", "vocab_size": 163840, "num_attention_heads": 64, "num_key_value_heads": 64},
    **{"n_group": 1, "topk_group": 1, "n_routed_experts": 384, "first_k_dense_replace": 1, "rope_theta": 50000.0},
    **{"routed_scaling_factor": 2.827, "num_nextn_predict_layers": 0, "max_position_embeddings": 131072},
    "rope_scaling": {**_YARN, "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0},
}
_GRANITE = {
    **{**_COMMON, "architectures": ["GraniteMoeForCausalLM"], "model_type": "granitemoe", "attention_bias": False},
    **{"hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 24, "num_attention_heads": 16},
    **{"num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 8, "max_position_embeddings": 131072},
    **{"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.015625},
    **{"logits_scaling": 6.0, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1500000.0},
    **{"router_aux_loss_coef": 0.0, "output_router_logits": False, "tie_word_embeddings": True, "vocab_size": 49155},
}
_GPT_OSS = {
    **{**_COMMON, "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True},
    **{"vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64, "num_hidden_layers": 24},
    **{"num_attention_heads": 64, "num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 4},
    **{"experts_per_token": 4, "router_aux_loss_coef": 0.9, "output_router_logits": False, "swiglu_limit": 7.0},
    **{"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 12, "rope_theta": 150000},
    **{"initial_context_length": 4096, "max_position_embeddings": 131072},
    **{"pad_token_id": 199999, "eos_token_id": 200002},
    "quantization_config": {
        "modules_to_not_convert": [
            *("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")
        ],
        "quant_method": "mxfp4",
    },
    "rope_scaling": {
        **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
        "original_max_position_embeddings": 4096,
    },
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt-oss-20b": _GPT_OSS,
    "gpt-oss-120b": {
        **{**_GPT_OSS, "num_hidden_layers": 36, "num_local_experts": 128},
        "layer_types": ["sliding_attention", "full_attention"] * 18,
    },
    "DeepSeek-V2-Lite": {
        **{**_COMMON, **_CODE, **_LATENT, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"},
        **{"vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408},
        **{"num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None},
        **{"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
        **{"n_group": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False},
        **{"routed_scaling_factor": 1.0, "max_position_embeddings": 163840, "rope_theta": 10000, "rms_norm_eps": 1e-06},
        "rope_scaling": {**_YARN, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "DeepSeek-V3": {**_V3, "quantization_config": _FP8},
    "DeepSeek-V3.1": {**_V3, "quantization_config": {**_FP8, "scale_fmt": "ue8m0"}},
    "Moonlight-16B-A3B": {
        **{**_V3, "vocab_size": 163840, "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408},
        **{"num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None},
        **{"n_group": 1, "topk_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6},
        **{"first_k_dense_replace": 1, "routed_scaling_factor": 2.446, "num_nextn_predict_layers": 0},
        **{"max_position_embeddings": 8192, "rope_theta": 50000.0, "rope_scaling": None, "rms_norm_eps": 1e-05},
    },
    "Kimi-K2-Instruct": _KIMI_K2,
    "GLM-4.7-Flash": {
        **{**_COMMON, "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite"},
        **{"attention_bias": False, "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240},
        **{"moe_intermediate_size": 1536, "num_hidden_layers": 47, "num_attention_heads": 20},
        **{"num_key_value_heads": 20, "partial_rotary_factor": 1.0, "rope_scaling": None, "rope_theta": 1000000},
        **{"q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64},
        **{"v_head_dim": 256, "n_routed_experts": 64, "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 1},
        **{"topk_group": 1, "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 1.8},
        **{"first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "max_position_embeddings": 202752},
    },
    "dots.llm1.inst": {
        **{**_COMMON, "architectures": ["Dots1ForCausalLM"], "model_type": "dots1", "attention_bias": False},
        **{"vocab_size": 152064, "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408},
        **{"num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 32, "pretraining_tp": 1},
        **{"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
        **{"moe_layer_freq": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "scoring_func": "noaux_tc"},
        **{"max_position_embeddings": 32768, "rope_scaling": None, "rope_theta": 10000000},
        **{"sliding_window": None, "max_window_layers": 62, "use_sliding_window": False},
    },
    "Solar-Open-100B": {
        **{**_COMMON, "architectures": ["SolarOpenForCausalLM"], "model_type": "solar_open", "head_dim": 128},
        **{"vocab_size": 196608, "hidden_size": 4096, "intermediate_size": 10240, "moe_intermediate_size": 1280},
        **{"num_hidden_layers": 48, "num_attention_heads": 64, "num_key_value_heads": 8, "partial_rotary_factor": 1.0},
        **{"n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 0},
        **{"norm_topk_prob": True, "routed_scaling_factor": 1.0, "rope_theta": 1000000},
        "max_position_embeddings": 131072,
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 65536},
    },
    "Hy3-preview": {
        **{**_COMMON, "architectures": ["HYV3ForCausalLM"], "model_type": "hy_v3", "attention_bias": False},
        **{"vocab_size": 120832, "hidden_size": 4096, "intermediate_size": 13312, "moe_intermediate_size": 1536},
        **{"expert_hidden_dim": 1536, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
        **{"head_dim": 128, "num_experts": 192, "num_experts_per_tok": 8, "num_shared_experts": 1},
        **{"first_k_dense_replace": 1, "moe_router_use_sigmoid": True, "moe_router_enable_expert_bias": True},
        **{"router_scaling_factor": 2.826, "route_norm": True, "qk_norm": True, "use_grouped_mm": True},
        **{"enable_attention_fp32_softmax": False, "enable_moe_fp32_combine": False, "enable_lm_head_fp32": True},
        **{"num_nextn_predict_layers": 1, "initializer_range": 0.006, "max_position_embeddings": 262144},
        **{"mlp_bias": False, "output_router_logits": True},
        "rope_parameters": {"rope_theta": 11158840.0, "rope_type": "default"},
    },
    "K-EXAONE-236B-A23B": {
        **{**_COMMON, "architectures": ["ExaoneMoEForCausalLM"], "model_type": "exaone_moe", "head_dim": 128},
        **{"vocab_size": 153600, "hidden_size": 6144, "intermediate_size": 18432, "moe_intermediate_size": 2048},
        **{"num_hidden_layers": 48, "num_attention_heads": 64, "num_key_value_heads": 8, "num_shared_experts": 1},
        **{"num_experts": 128, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "first_last_k_dense_replace": 1},
        **{"is_moe_layer": [False, *[True] * 47], "mlp_layer_types": ["dense", *["sparse"] * 47], **_CHOICE},
        **{"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "n_group": 1, "topk_group": 1},
        **{"routed_scaling_factor": 2.5, "sliding_window": 128, "sliding_window_pattern": "LLLG"},
        **{"max_position_embeddings": 262144, "num_nextn_predict_layers": 1, "rope_scaling": None},
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        "tokenizer_class": "GPT2Tokenizer",
    },
    "granite-3.1-1b-a400m": _GRANITE,
    "moe-7b-1b-active-shared-experts": {
        **{**_GRANITE, "architectures": ["GraniteMoeSharedForCausalLM"], "model_type": "granitemoeshared"},
        **{"hidden_size": 1536, "shared_intermediate_size": 512, "num_attention_heads": 24, "logits_scaling": 6.0},
    },
}
PUBLISHED["K-EXAONE-236B-A23B"]["layer_types"] *= 12
#: Names that transformers has not, or not so, and those of the same model that it has.
_NATIVE = {"kimi_k2": "deepseek_v3"}
LING_MINI = {
    **{**_COMMON, "architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe", "head_dim": 128},
    **{"vocab_size": 157184, "hidden_size": 2048, "intermediate_size": 5120, "moe_intermediate_size": 512},
    **{"moe_shared_expert_intermediate_size": 512, "num_hidden_layers": 20, "num_attention_heads": 16},
    **{"num_key_value_heads": 4, "num_experts": 256, "num_experts_per_tok": 8, "num_shared_experts": 1, "n_group": 8},
    **{"topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "score_function": "sigmoid"},
    **{"router_dtype": "fp32", "moe_router_enable_expert_bias": True, "first_k_dense_replace": 1, "use_qk_norm": True},
    **{"use_qkv_bias": False, "use_bias": False, "partial_rotary_factor": 0.5, "rope_theta": 600000},
    **{"rope_scaling": None, "rms_norm_eps": 1e-06, "max_position_embeddings": 32768, "max_window_layers": 20},
    **{"num_nextn_predict_layers": 0, "mtp_loss_scaling_factor": 0, "embedding_dropout": 0.0, "output_dropout": 0.0},
    **{"output_router_logits": False, "pad_token_id": 156892, "eos_token_id": 156892},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_what_it_is_to_transformers(name: str) -> None:
    values = PUBLISHED[name]
    spec = spec_from_config(values)
    model_type = _NATIVE.get(values["model_type"], values["model_type"])
    assert ours(spec) == facts(theirs({**values, "model_type": model_type}))
    assert len(spec.mtp) == (values.get("num_nextn_predict_layers", 0) if name != "K-EXAONE-236B-A23B" else 0)
    written = config_from_spec(spec)
    assert spec_from_config(written) == spec
    assert ours(spec) == facts(theirs(written))


def test_ling_2_is_read_like_the_model_of_another_class_that_is_the_same() -> None:
    """transformers has no class for it, but GLM-4.5's computes the same."""
    glm = {
        **{
            key: value for key, value in LING_MINI.items() if not key.startswith(("use_qkv", "use_bias", "num_experts"))
        },
        **{"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "n_routed_experts": 256},
        **{"n_shared_experts": 1, "num_experts_per_tok": 8, "use_qk_norm": True},
    }
    spec = spec_from_config(LING_MINI)
    assert ours(spec) == facts(theirs(glm))
    assert spec_from_config(config_from_spec(spec)) == spec
    assert spec_from_config({**LING_MINI, "model_type": "bailing_moe_v2"}) == spec


def test_what_megatron_lacks_of_them_is_named() -> None:
    plain = {
        name: values for name, values in PUBLISHED.items() if values["model_type"] != "solar_open"
    }  # whose YaRN has tests
    found = {name: inexpressible(spec_from_config(values)) for name, values in plain.items()}
    assert [name for name, reasons in found.items() if reasons] == ["Kimi-K2-Instruct"]
    assert found["Kimi-K2-Instruct"] == [
        "YaRN with beta_fast, beta_slow and original_max_position_embeddings of 1, 1 and 4096: Megatron-LM has 32, 1 and 4096 "
        "built in for multi-latent attention"
    ]
    assert inexpressible(spec_from_config(LING_MINI)) == []


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("dots.llm1.inst", {"norm_topk_prob": False}, "norm_topk_prob=False; only True can be converted"),
        ("dots.llm1.inst", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("dots.llm1.inst", {"n_routed_experts": None}, "config.json has no n_routed_experts"),
        ("Solar-Open-100B", {"first_k_dense_replace": 2}, "first_k_dense_replace=2"),
        ("Solar-Open-100B", {"partial_rotary_factor": 0.5}, "only a part of each head"),
        ("Hy3-preview", {"route_norm": False}, "route_norm=False"),
        ("Hy3-preview", {"mlp_bias": True}, "does not know: mlp_bias"),
        ("Hy3-preview", {"n_group": 8}, "n_group=8"),
        ("K-EXAONE-236B-A23B", {"sliding_windows": [128] * 48}, "does not know: sliding_windows"),
        ("K-EXAONE-236B-A23B", {"swiglu_limits": [7.0] * 48}, "does not know: swiglu_limits"),
        ("K-EXAONE-236B-A23B", {"layer_types": ["full_attention"] * 48}, "programs differ in whether"),
        ("K-EXAONE-236B-A23B", {"layer_types": None}, "sliding_window_pattern='LLLG'; they must be numbers"),
        ("K-EXAONE-236B-A23B", {"layer_types": ["full_attention"]}, "for each of 48 layers"),
        ("K-EXAONE-236B-A23B", {"sliding_window": None}, "sliding_window=None"),
        ("GLM-4.7-Flash", {"rope_interleave": False}, "rope_interleave=False"),
        ("GLM-4.7-Flash", {"mlp_layer_types": ["dense"]}, "for each of 47 layers"),
        ("DeepSeek-V2-Lite", {"topk_method": "group_limited_greedy"}, "topk_method='group_limited_greedy'"),
        ("granite-3.1-1b-a400m", {"shared_intermediate_size": 512}, "does not know: shared_intermediate_size"),
    ],
)
def test_what_cannot_be_converted_is_refused(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message.replace("(", r"\(")):
        spec_from_config({**PUBLISHED[name], **fields})


def test_dots_without_normed_choice_is_refused_by_default() -> None:
    values = {key: value for key, value in PUBLISHED["dots.llm1.inst"].items() if key != "norm_topk_prob"}
    with pytest.raises(ConversionError, match="has no norm_topk_prob, which means False; only True can be"):
        spec_from_config(values)


@pytest.mark.parametrize(
    "fields", [{"norm_head": True}, {"score_function": "softmax"}, {"use_rmsnorm": False}, {"use_sliding_window": True}]
)
def test_another_ling_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConversionError, match=next(iter(fields))):
        spec_from_config({**LING_MINI, **fields})


def test_groups_that_megatron_would_score_otherwise_are_named() -> None:
    found = inexpressible(spec_from_config({**LING_MINI, "num_experts_per_tok": 6, "topk_group": 2}))
    assert [reason.partition(":")[0] for reason in found] == [
        "6 experts from 2 of 8 groups, whose scores are sums of the best 2"
    ]

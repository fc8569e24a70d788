"""config.json against transformers' own config classes: defaults, spellings, refusals, and the way back."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_converters.basics.dtypes import dtype_named
from megatron_converters.basics.errors import ConversionError
from megatron_converters.basics.json_files import read_json
from megatron_converters.families import FAMILIES
from megatron_converters.families.config_json import (
    config_for,
    config_from_spec,
    config_notes,
    differences,
    family_from_config,
    infer_family,
    spec_from_config,
)
from megatron_converters.model.layers import AFTER, ALL_HEADS, AROUND, BEFORE, EACH_HEAD, LAYER_NORM
from megatron_converters.model.rotary import RopeScaling
from megatron_converters.model.spec import ModelSpec, PerLayer
from tests.tiny import KINDS, tiny_spec

SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
}
DENSE_LAST, DENSE_FIRST = PerLayer(["moe", "mlp"]), PerLayer(["mlp", "moe"])
EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 6, "moe_router_topk": 2}
LLAMA3 = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
LLAMA3_TABLE = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN_ORIGINAL = {"original_max_position_embeddings": 1024}
LONGROPE_TABLE = {"short_factor": [1.0], "long_factor": [1.5], "original_max_position_embeddings": 1024}


#: Keys of families that spell sizes in their own way, or require more.
OWN_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 32, "n_embd": 64, "n_inner": 96, "n_layer": 3, "n_head": 32},
    "gpt_bigcode": {"vocab_size": 32, "n_embd": 64, "n_inner": 96, "n_layer": 3, "n_head": 32},
    "opt": {**{name: size for name, size in SIZES.items() if name != "intermediate_size"}, "ffn_dim": 96},
    "deepseek_v2": {**SIZES, "num_experts_per_tok": 4},
    "dots1": {**SIZES, "num_experts_per_tok": 4, "n_routed_experts": 8, "norm_topk_prob": True},
    "falcon": {
        **{name: size for name, size in SIZES.items() if name not in ("intermediate_size", "num_key_value_heads")},
        "ffn_hidden_size": 96,
    },
    "helium": {**SIZES, "num_attention_heads": 40},  # its default are 20 groups
    # the fourth layer is the first with full attention
    **{name: {**SIZES, "num_hidden_layers": 4} for name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")},
}


def config(model_type: str = "llama", **fields: Any) -> dict[str, Any]:
    sizes = OWN_SIZES.get(model_type, SIZES)
    return {"architectures": [FAMILIES[model_type].architecture], "model_type": model_type, **sizes, **fields}


def spec_of(model_type: str = "llama", **fields: Any) -> ModelSpec:
    return spec_from_config(config(model_type, **fields))


def theirs(values: dict[str, Any]) -> Any:
    """transformers' config object of a config.json."""
    from transformers import AutoConfig

    plain = json.loads(json.dumps(values))
    return AutoConfig.for_model(**plain)


#: Families whose models have a kind of norm, activation or attention of their own.
UNGATED = (
    *("gpt2", "gpt_bigcode", "starcoder2", "phi", "opt", "gpt_neox", "persimmon"),
    *("nemotron", "arcee", "jais2", "falcon"),
)
WITH_LAYER_NORM = (*(name for name in UNGATED if name != "arcee"), "stablelm", "olmo", "cohere", "cohere2")
#: Families whose norms are before and after blocks, and those whose norms add 1 to their weights.
WITH_BOTH_NORMS = ("gemma2", "gemma3_text", "glm4")
AROUND_ZERO = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "nemotron", "gemma", "gemma2", "gemma3_text")
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu2": "squared_relu",
}
WITH_POSITIONS = ("gpt2", "gpt_bigcode", "opt")
#: Families whose linears all have biases, and those whose MLPs have them in any case.
WITH_BIASES = ("gpt2", "gpt_bigcode", "phi", "persimmon")
WITH_MLP_BIASES = (*WITH_BIASES, "gpt_neox", "gpt_oss")
#: Families that may have biases of one kind, where Megatron-LM's others are 0.
FILLED = ("olmo", "olmo2", "olmo3", "nemotron", "arcee", "jais2", "gpt_neox", "gpt_oss")
#: Families whose norms are after blocks.
WITH_POST_NORMS = ("olmo2", "olmo3", "exaone4")
#: Families whose modules rotate neighbouring rows (`rotate_half`).
INTERLEAVED = ("glm", "glm4", "ernie4_5", "helium", "cohere", "cohere2")
GATED_DELTA = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
SPARSE = ("deepseek_v32", "glm_moe_dsa")
LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", *SPARSE)
#: Families without a class in transformers.
REMOTE = ("minicpm", "bailing_moe", "mimo", "internlm2", "exaone", "qwen", "baichuan", "baichuan2", "chatglm")
NATIVE = [name for name in FAMILIES if name not in REMOTE]
CHOSEN_BY_SIGMOID = (
    *("glm4_moe", "deepseek_v3", "glm4_moe_lite", "dots1", "solar_open", "hy_v3", "exaone_moe", "minimax_m2"),
    *SPARSE,
)
#: Families whose experts are weighted by a softmax over those that are chosen, whatever config.json says.
CHOSEN_FIRST = ("mixtral", "granitemoe", "granitemoeshared", "gpt_oss", "qwen3_5_moe_text")
#: Families whose classes have no bias in the output of attention.
WITHOUT_OUTPUT_BIAS = ("glm", "glm4", "glm4_moe", "solar_open", "helium")


def facts(found: Any) -> dict[str, Any]:
    """What transformers' config object says, in our words; all but layers of multi-token prediction, which it has not."""
    kind, parallel = found.model_type, getattr(found, "use_parallel_residual", False)
    epsilons = ("rms_norm_eps", "norm_epsilon", "layer_norm_epsilon", "layer_norm_eps", "norm_eps")
    of_attention = first(found, ("attention_bias",), kind in WITH_BIASES)
    of_mlp = first(found, ("mlp_bias", "use_bias", "enable_bias", "bias"), kind in WITH_MLP_BIASES)
    absent = kind in FILLED and of_attention != of_mlp
    activation = first(found, ("hidden_act", "hidden_activation", "activation_function", "activation"), "silu")
    return {
        "num_layers": found.num_hidden_layers,
        "hidden_size": found.hidden_size,
        "ffn_hidden_size": first(
            found, ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "moe_intermediate_size"), None
        )
        or 4 * found.hidden_size,
        "vocab_size": found.vocab_size,
        "max_position_embeddings": found.max_position_embeddings,
        "norm_epsilon": first(found, epsilons, 1e-5),  # OlmoLayerNorm, and the default of torch's in OPT
        "normalization": LAYER_NORM if kind in WITH_LAYER_NORM else "RMSNorm",
        "zero_centred": kind in AROUND_ZERO,
        "learned_positions": kind in WITH_POSITIONS,
        "tied": found.tie_word_embeddings,
        "causal": getattr(found, "is_causal", True),  # masking_utils.py, create_causal_mask
        "mlp_bias": of_mlp or absent,
        "absent_biases": ("attention" if of_mlp else "mlp") if absent else "",
        "parallel_block": kind in ("phi", "cohere", "cohere2", "falcon") or parallel,  # PhiDecoderLayer
        "parallel_norms": parallel,  # GPTNeoXLayer
        "block_norms": norm_places(kind),
        "final_logit_softcapping": getattr(found, "final_logit_softcapping", None),
        "head_bias": kind == "phi",
        "num_labels": None,  # of a language model
        "activation": "quick_gelu" if kind == "gpt_oss" else ACTIVATIONS.get(activation, activation),  # GptOssExperts
        "glu_linear_offset": 1.0 if kind == "gpt_oss" else 0.0,
        "activation_func_clamp_value": getattr(found, "swiglu_limit", None),
        "gated": kind not in UNGATED,
        "initializer_range": first(found, ("initializer_range", "init_std"), None),
        "attention_dropout": first(found, ("attn_pdrop", "attention_dropout"), 0.0),
        **(minicpm_facts(found) if found.model_type == "minicpm3" else multiplier_facts(found)),
        **(latent_facts(found) if found.model_type in LATENT else attention_facts(found)),
        **rope_facts(found),
        **expert_facts(found),
    }


def norm_places(kind: str) -> str:
    if kind in WITH_BOTH_NORMS:
        return AROUND
    return AFTER if kind in WITH_POST_NORMS else BEFORE


def first(found: Any, names: tuple[str, ...], default: Any) -> Any:
    """The first of these attributes that there is."""
    return next((getattr(found, name) for name in names if hasattr(found, name)), default)


def multiplier_facts(found: Any) -> dict[str, Any]:
    gemma, scalar = found.model_type.startswith("gemma"), getattr(found, "query_pre_attn_scalar", None)
    own = getattr(found, "attention_multiplier", None)
    return {
        "embedding_multiplier": found.hidden_size**0.5 if gemma else getattr(found, "embedding_multiplier", 1.0),
        "residual_multiplier": getattr(found, "residual_multiplier", 1.0),
        "attention_multiplier": own if scalar is None or scalar == found.head_dim else scalar**-0.5,
        "logits_multiplier": getattr(found, "logit_scale", 1 / getattr(found, "logits_scaling", 1.0)),
    }


def minicpm_facts(found: Any) -> dict[str, Any]:
    return {
        "embedding_multiplier": found.scale_emb,
        "residual_multiplier": found.scale_depth / math.sqrt(found.num_hidden_layers),
        "attention_multiplier": None,
        "logits_multiplier": found.dim_model_base / found.hidden_size,
    }


def rope_facts(found: Any) -> dict[str, Any]:
    if found.model_type in WITH_POSITIONS:
        return {"rope": False}
    rope = dict(found.rope_parameters)
    if found.model_type == "olmo3":
        assert rope["full_attention"] == rope["sliding_attention"]
        rope = rope["full_attention"]
    own: dict[str, Any] = {}
    if found.model_type == "gemma3_text":
        own = {"rotary_base": one_or_per_layer(PerLayer(rope[kind]["rope_theta"] for kind in found.layer_types))}
        assert {table["rope_type"] for table in rope.values()} == {"default"}
        rope = rope["full_attention"]
    percent = rope.pop("partial_rotary_factor", 1.0)
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type", "type")}
    if rope["rope_type"] == "longrope":  # as in _compute_longrope_parameters
        scaling.setdefault("factor", found.max_position_embeddings / rope["original_max_position_embeddings"])
    if rope["rope_type"] == "dynamic":  # a key that transformers adds and does not read
        scaling.pop("original_max_position_embeddings", None)
    scaling.pop("max_position_embeddings", None)  # which Ministral 3 repeats in its table
    rotated = PerLayer(map(bool, getattr(found, "no_rope_layers", [1]) * found.num_hidden_layers))
    if found.model_type in ("exaone4", "exaone_moe", "cohere2") and found.sliding_window is not None:
        rotated = PerLayer(kind == "sliding_attention" for kind in found.layer_types)
    return {
        "rope": one_or_per_layer(PerLayer(rotated[: found.num_hidden_layers])),
        "rotary_base": rope["rope_theta"],
        "rotary_percent": percent,
        "rotary_interleaved": found.model_type in INTERLEAVED,
        "rope_scaling": None if rope["rope_type"] == "default" else RopeScaling(rope["rope_type"], **scaling),
        **own,
    }


def latent_facts(found: Any) -> dict[str, Any]:
    sparse = {}
    if found.model_type in SPARSE:
        shared = PerLayer(
            kind == "shared" for kind in getattr(found, "indexer_types", found.num_hidden_layers * ["full"])
        )
        sparse = {
            "dsa_indexer_n_heads": found.index_n_heads,
            "dsa_indexer_head_dim": found.index_head_dim,
            "dsa_indexer_topk": found.index_topk,
            "dsa_indexer_rope_interleaved": found.model_type == "glm_moe_dsa",  # GlmMoeDsaIndexer.forward
            "shared_indexer": one_or_per_layer(shared),
        }
    return {
        **sparse,
        "mixer": "sparse latent" if sparse else "latent",
        "num_attention_heads": found.num_attention_heads,
        "q_lora_rank": found.q_lora_rank,
        "kv_lora_rank": found.kv_lora_rank,
        "qk_head_dim": found.qk_nope_head_dim,
        "qk_pos_emb_head_dim": found.qk_rope_head_dim,
        "v_head_dim": found.v_head_dim,
    }


def attention_facts(found: Any) -> dict[str, Any]:
    layers, kind = found.num_hidden_layers, found.model_type
    types = getattr(found, "layer_types", None)
    if types is None:
        types = ["full_attention" if getattr(found, "sliding_window", None) is None else "sliding_attention"] * layers
    windows = PerLayer(found.sliding_window if each == "sliding_attention" else None for each in types)
    linear = {}
    if kind in GATED_DELTA:
        names = ("key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads", "conv_kernel_dim")
        linear = {f"linear_{name}": getattr(found, f"linear_{name}") for name in names}
    bias = first(found, ("attention_bias", "use_bias", "enable_bias", "bias"), kind in WITH_BIASES)
    if kind in FILLED:
        bias = bias or first(found, ("mlp_bias",), kind in WITH_MLP_BIASES)
    # The norms of OLMo's attention have the size of all heads.
    with_norms = ("qwen3", "qwen3_moe", *GATED_DELTA, "dots1", "hy_v3", "exaone4", "exaone_moe", "gemma3_text")
    over_heads = ("olmoe", "olmo2", "olmo3", "minimax_m2")
    norms = {**dict.fromkeys(with_norms, EACH_HEAD), **dict.fromkeys(over_heads, ALL_HEADS)}
    own_norms = EACH_HEAD if first(found, ("use_qk_norm", "qk_layernorm"), False) else ""
    return {
        "mixer": one_or_per_layer(
            PerLayer("gated delta" if each == "linear_attention" else "attention" for each in types)
        ),
        "num_attention_heads": found.num_attention_heads,
        "num_query_groups": 1
        if kind == "falcon"
        else getattr(found, "num_key_value_heads", None) or found.num_attention_heads,
        "kv_channels": getattr(found, "head_dim", None) or found.hidden_size // found.num_attention_heads,
        "qkv_bias": kind == "qwen2" or bias or first(found, ("qkv_bias", "use_qkv_bias"), False),
        # The classes of some have none there, and one has a key of its own.
        "proj_bias": getattr(found, "attention_out_bias", bias and kind not in WITHOUT_OUTPUT_BIAS),
        "qk_norm": norms.get(kind, own_norms),
        "sliding_window": one_or_per_layer(windows),
        "attention_output_gate": kind in GATED_DELTA,
        "sinks": kind == "gpt_oss",
        "attn_logit_softcapping": getattr(found, "attn_logit_softcapping", None),
        **linear,
    }


def one_or_per_layer(values: PerLayer) -> Any:
    """A single value where layers do not differ."""
    return values[0] if len({*values}) == 1 else values


def expert_facts(found: Any) -> dict[str, Any]:
    """The same of experts; which layers have them is the condition in each decoder layer's `__init__`."""
    kind = found.model_type
    keys = ("n_routed_experts", "num_experts", "num_local_experts")
    count = next((value for key in keys if (value := getattr(found, key, None))), None)
    if not count:
        return {"feed": "mlp"}
    step, listed = getattr(found, "decoder_sparse_step", 1), getattr(found, "mlp_only_layers", [])
    first = getattr(found, "first_k_dense_replace", 0)
    layers = range(found.num_hidden_layers)
    sparse = [layer for layer in layers if layer >= first and layer not in listed and (layer + 1) % step == 0]
    if types := getattr(found, "mlp_layer_types", None):
        sparse = [layer for layer in layers if types[layer] == "sparse"]
    sigmoid = kind in CHOSEN_BY_SIGMOID
    grouped = sigmoid and getattr(found, "n_group", 1) > 1
    number = getattr(found, "n_shared_experts", getattr(found, "num_shared_experts", 0)) or 0
    shared = getattr(found, "shared_intermediate_size", number * getattr(found, "moe_intermediate_size", 0))
    return {
        "feed": one_or_per_layer(PerLayer("moe" if layer in sparse else "mlp" for layer in layers)),
        "num_experts": count,
        "moe_ffn_hidden_size": getattr(found, "moe_intermediate_size", None) or found.intermediate_size,
        "moe_router_topk": found.num_experts_per_tok,
        "moe_router_pre_softmax": not sigmoid and kind not in CHOSEN_FIRST and not found.norm_topk_prob,
        "moe_router_score_function": "sigmoid" if sigmoid else "softmax",
        "moe_router_enable_expert_bias": sigmoid,
        "moe_router_topk_scaling_factor": getattr(
            found, "router_scaling_factor", getattr(found, "routed_scaling_factor", 1.0)
        ),
        "moe_router_num_groups": found.n_group if grouped else None,
        "moe_router_group_topk": found.topk_group if grouped else None,
        "moe_aux_loss_coeff": getattr(found, "router_aux_loss_coef", 0.0),
        "shared_ffn_hidden_size": getattr(found, "shared_expert_intermediate_size", shared),
        "shared_gate": kind in ("qwen2_moe", "qwen3_next", "qwen3_5_moe_text"),
    }


def ours(spec: ModelSpec) -> dict[str, Any]:
    return {name: value for name, value in spec.values.items() if name not in ("family", "dtype", "mtp_num_layers")}


@pytest.mark.parametrize("model_type", NATIVE)
def test_absent_keys_mean_what_they_mean_to_transformers(model_type: str) -> None:
    assert ours(spec_of(model_type)) == facts(theirs(config(model_type)))


@pytest.mark.parametrize("model_type", NATIVE)
def test_the_class_s_own_default_config_is_read(model_type: str) -> None:
    # transformers' own default number of chosen experts is none for DeepSeek-V2 and dots.llm1.
    own = {key: value for key, value in OWN_SIZES.get(model_type, {}).items() if key not in SIZES}
    default = theirs({"model_type": model_type, **(own if "num_experts_per_tok" in own else {})})
    written = {**default.to_dict(), "architectures": [FAMILIES[model_type].architecture]}
    assert ours(spec_from_config(written)) == facts(default)


MINISTRAL3 = {
    **{
        "type": "yarn",
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "rope_theta": 1e6,
    },
    **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.2},
}
TYPES = ["full_attention", "sliding_attention", "sliding_attention"]
CASES: dict[str, dict[str, Any]] = {
    "llama 2": {"num_key_value_heads": None, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "llama 3.2": {
        "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", **LLAMA3_TABLE},
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
        "head_dim": 64,
    },
    "linear, old spelling": {"rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": 1e6},
    "linear, new spelling": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 7e4}},
    "default, new spelling": {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
    "both spellings": {
        "rope_theta": 5e5,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "theta in both": {"rope_theta": 9.0, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
    "empty rope": {"rope_theta": 1e6, "rope_scaling": None, "rope_parameters": {}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "attention bias": {"attention_bias": True},
    "groups": {"num_key_value_heads": 4, "head_dim": 24},
    "longrope": {"max_position_embeddings": 1024, "rope_scaling": {"type": "longrope", **LONGROPE_TABLE}},
    "longrope, more positions": {
        "max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", **LONGROPE_TABLE},
    },
    "longrope, its factors said": {
        "max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", **LONGROPE_TABLE, "factor": 3.0, "attention_factor": 1.25},
    },
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "yarn": {"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, **YARN_ORIGINAL}},
    "yarn of all positions": {"max_position_embeddings": 512, "rope_scaling": {"type": "yarn", "factor": 2}},
    "yarn, all said": {
        "rope_parameters": {
            **{"rope_type": "yarn", "factor": 4.0, **YARN_ORIGINAL, "rope_theta": 1e6, "truncate": False},
            **{"beta_fast": 16, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 0.5, "attention_factor": 1.5},
        }
    },
    "is_causal": {"is_causal": True},
}
QWEN_CASES: dict[str, dict[str, Any]] = {
    "window off": {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1},
    "window on": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "window everywhere": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
    "window nowhere": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
    "window by default": {"use_sliding_window": True, "max_window_layers": 2},
    "window null": {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    "layer types": {
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 0,
        "layer_types": TYPES,
    },
    "all full": {
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 0,
        "layer_types": ["full_attention"] * 3,
    },
}
MIXTRAL_CASES: dict[str, dict[str, Any]] = {
    "8x7B": {"num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 8, "sliding_window": None},
    "sizes": {"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 24, "sliding_window": 16},
    "aux loss": {"router_aux_loss_coef": 0.02, "output_router_logits": True, "router_jitter_noise": 0.0},
}
QWEN_MOE_CASES: dict[str, dict[str, Any]] = {
    "normed choice": {"norm_topk_prob": True, "num_experts_per_tok": 3},
    "plain choice": {"norm_topk_prob": False, "moe_intermediate_size": 24, "router_aux_loss_coef": 0.02},
    "dense layers": {"mlp_only_layers": [0, 2]},
    "every second": {"decoder_sparse_step": 2},
    "every second but": {"decoder_sparse_step": 2, "num_hidden_layers": 8, "mlp_only_layers": [3]},
    "all dense": {"mlp_only_layers": [0, 1, 2]},
    "window off": {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1},
}
ALL_CASES = [
    *(("llama", name, fields) for name, fields in CASES.items()),
    *(("mistral", f"window {window}", {"sliding_window": window}) for window in (None, 1, 4096)),
    *((family, name, fields) for family in ("qwen2", "qwen3") for name, fields in QWEN_CASES.items()),
    ("qwen3", "biases", {"attention_bias": True}),
    *(("mixtral", name, fields) for name, fields in MIXTRAL_CASES.items()),
    *((family, name, fields) for family in ("qwen2_moe", "qwen3_moe") for name, fields in QWEN_MOE_CASES.items()),
    ("qwen2_moe", "sizes", {"num_experts": 6, "shared_expert_intermediate_size": 40}),
    ("qwen2_moe", "no bias", {"qkv_bias": False}),
    ("qwen3_moe", "older spelling", {"num_experts": 16}),
    ("qwen3_moe", "newer spelling", {"num_local_experts": 16}),
    ("qwen3_moe", "both spellings", {"num_experts": 16, "num_local_experts": 16}),
    ("qwen3_moe", "biases", {"attention_bias": True, "head_dim": 24}),
    ("smollm3", "3B", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4}),
    ("smollm3", "interval", {"no_rope_layer_interval": 2, "attention_bias": True, "mlp_bias": True}),
    ("smollm3", "list of more", {"no_rope_layers": [0, 1, 1, 0, 1], "num_key_value_heads": None}),
    ("smollm3", "window off", {"use_sliding_window": False, "sliding_window": 16, "no_rope_layers": [1, 0, 1]}),
    ("smollm3", "window", {"use_sliding_window": True, "sliding_window": 16, "no_rope_layers": [1, 0, 1]}),
    (
        *("smollm3", "layer types"),
        {"use_sliding_window": True, "sliding_window": 16, "no_rope_layers": [1, 0, 1], "layer_types": TYPES},
    ),
    (
        "seed_oss",
        "36B",
        {"attention_bias": True, "attention_out_bias": False, "rope_scaling": {"rope_type": "default"}},
    ),
    (
        "seed_oss",
        "other biases",
        {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True, "head_dim": None},
    ),
    ("internlm3", "8B", {"qkv_bias": False, "bias": False, "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"}}),
    ("internlm3", "biases", {"qkv_bias": True, "bias": True, "head_dim": None, "num_key_value_heads": None}),
    ("internlm3", "biases by newer names", {"attention_bias": True, "mlp_bias": True}),
    ("iquestcoder", "nulls", {"head_dim": None, "num_key_value_heads": None, "mlp_bias": True}),
    ("ernie4_5", "biases", {"use_bias": True, "head_dim": None, "num_key_value_heads": None}),
    ("ernie4_5", "untied", {"tie_word_embeddings": False, "rope_theta": 1e4}),
    ("helium", "2B", {"num_key_value_heads": 8, "rope_theta": 2e4, "rms_norm_eps": 1e-8}),
    ("helium", "biases", {"num_key_value_heads": 8, "attention_bias": True, "mlp_bias": True}),
    ("starcoder2", "no bias", {"use_bias": False, "sliding_window": 16, "rope_theta": 1e5}),
    ("phi", "part rotated", {"partial_rotary_factor": 0.4, "num_key_value_heads": 8, "attention_dropout": 0.1}),
    ("phi", "null groups", {"num_key_value_heads": None, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("phi", "yarn", {"rope_scaling": {"type": "yarn", "factor": 2.0, **YARN_ORIGINAL}}),
    (
        *("phi3", "longrope of 4k"),
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [4.0]},
        },
    ),
    (
        *("phi3", "longrope, its positions said twice"),
        {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 1024,
            "rope_scaling": {**LONGROPE_TABLE, "type": "longrope", "original_max_position_embeddings": 7},
        },
    ),
    ("phi3", "part rotated", {"partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
    ("glm", "no bias", {"attention_bias": False, "head_dim": 24}),
    ("gpt2", "untied", {"tie_word_embeddings": False, "n_inner": None, "layer_norm_epsilon": 1e-6}),
    ("gpt_bigcode", "a key for each head", {"multi_query": False, "n_inner": None, "activation_function": "gelu"}),
    ("olmo2", "13B", {"num_key_value_heads": 8, "rope_theta": 5e5, "attention_bias": True}),
    (
        "exaone4",
        "1.2B",
        {"sliding_window": None, "sliding_window_pattern": None, "layer_types": ["full_attention"] * 3},
    ),
    ("exaone4", "32B", {"layer_types": TYPES, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "head_dim": 4}),
    ("olmo3", "all layers full", {"layer_types": ["full_attention"] * 3}),
    ("olmo", "biases", {"attention_bias": True, "num_key_value_heads": 8, "rope_theta": 5e5}),
    ("stablelm", "2 1.6B", {"use_qkv_bias": True, "partial_rotary_factor": 0.25, "num_key_value_heads": 32}),
    ("nemotron", "Minitron 4B", {"num_key_value_heads": 8, "head_dim": 128, "norm_eps": 1e-6, "rope_percent": 0.5}),
    ("arcee", "biases of the MLP", {"mlp_bias": True}),
    ("nemotron", "biases of attention", {"attention_bias": True}),
    ("arcee", "4.5B", {"num_key_value_heads": 4, "head_dim": 128, "mlp_bias": False}),
    ("jais2", "no biases", {"attention_bias": False, "mlp_bias": False, "layer_norm_eps": 1e-6}),
    ("persimmon", "no norms", {"qk_layernorm": False, "partial_rotary_factor": 0.25, "rope_theta": 25000.0}),
    ("gpt_neox", "RedPajama", {"use_parallel_residual": False, "rotary_pct": 1.0, "rotary_emb_base": 20000}),
    (
        "gpt_neox",
        "4.4x",
        {"rotary_pct": 0.5, "partial_rotary_factor": 0.5, "rope_theta": 10000, "hidden_act": "gelu_fast"},
    ),
    ("gpt_neox", "attention without biases", {"attention_bias": False, "use_parallel_residual": False}),
    ("opt", "Galactica", {"activation_function": "gelu", "enable_bias": False, "tie_word_embeddings": False}),
    (
        *("granite", "multipliers"),
        {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22, "attention_multiplier": 0.5},
    ),
    ("minicpm3", "multipliers", {"scale_emb": 3, "scale_depth": 0.7, "dim_model_base": 16, "q_lora_rank": 24}),
    ("minicpm3", "none of them", {"scale_emb": 1, "scale_depth": None, "dim_model_base": None, "v_head_dim": 4}),
    ("glm4_moe", "groups and norms", {"n_group": 4, "topk_group": 2, "use_qk_norm": True, "n_shared_experts": 2}),
    ("deepseek_v2", "whole queries", {"q_lora_rank": None, "n_shared_experts": 2, "first_k_dense_replace": 1}),
    ("deepseek_v3", "small", {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 3}),
    ("glm4_moe_lite", "whole queries", {"q_lora_rank": None, "mlp_layer_types": ["sparse", "dense", "sparse"]}),
    ("dots1", "window", {"sliding_window": 16, "max_window_layers": 1, "n_shared_experts": 2, "attention_bias": True}),
    ("dots1", "layer types", {"sliding_window": 16, "layer_types": TYPES, "first_k_dense_replace": 2}),
    ("dots1", "a switch that the class does not read", {"sliding_window": 16, "use_sliding_window": True}),
    ("solar_open", "groups", {"n_group": 4, "topk_group": 2, "attention_bias": True, "head_dim": 24}),
    ("hy_v3", "own order", {"mlp_layer_types": ["sparse", "dense", "sparse"], "num_shared_experts": 2}),
    ("hy_v3", "biases", {"attention_bias": True, "router_scaling_factor": 1.0}),
    ("exaone_moe", "interval", {"sliding_window_pattern": 2, "sliding_window": 16, "first_k_dense_replace": 2}),
    ("exaone_moe", "layer types", {"layer_types": TYPES, "num_shared_experts": 2, "head_dim": 24}),
    ("granitemoe", "multipliers", {"embedding_multiplier": 12.0, "logits_scaling": 6.0, "residual_multiplier": 0.22}),
    ("granitemoeshared", "sizes", {"shared_intermediate_size": 40, "attention_bias": True, "num_local_experts": 16}),
    ("gpt_oss", "layer types", {"layer_types": TYPES, "sliding_window": 16, "swiglu_limit": 5.0, "head_dim": 24}),
    ("gpt_oss", "attention without biases", {"attention_bias": False, "rope_scaling": None, "num_local_experts": 8}),
    ("gpt_oss", "plain rotation", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ("qwen3_next", "own order", {"layer_types": ["full_attention", *["linear_attention"] * 2, "full_attention"]}),
    ("olmoe", "1B-7B", {"clip_qkv": None, "norm_topk_prob": False, "rope_theta": 10000.0, "rope_scaling": None}),
    ("olmoe", "normed choice", {"norm_topk_prob": True, "num_experts": 16, "num_experts_per_tok": 3}),
    ("olmoe", "biases and groups", {"attention_bias": True, "num_key_value_heads": 4, "router_aux_loss_coef": 0.02}),
]


@pytest.mark.parametrize(
    ("model_type", "name", "fields"), ALL_CASES, ids=[f"{case[0]} {case[1]}" for case in ALL_CASES]
)
def test_configs_mean_what_they_mean_to_transformers_and_so_do_ours(
    model_type: str, name: str, fields: dict[str, Any]
) -> None:
    values = config(model_type, **fields)
    spec = spec_from_config(values)
    assert ours(spec) == facts(theirs(values))
    written = config_from_spec(spec)
    assert ours(spec) == facts(theirs(written))
    assert spec_from_config(written) == spec
    again = {**theirs(written).to_dict(), "architectures": written["architectures"]}
    assert spec_from_config(again) == spec  # what transformers 5 saves of it


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_both_spellings_of_rope_are_one_spec(kind: str) -> None:
    table = {"default": {}, "linear": {"factor": 3.0}, "llama3": LLAMA3_TABLE}[kind]
    old = {"rope_theta": 5e5, "rope_scaling": {"rope_type": kind, **table}}
    older = {"rope_theta": 5e5, "rope_scaling": {"type": kind, **table}}
    new = {"rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **table}}
    specs = [spec_of(**fields) for fields in (old, older, new)]
    assert specs[0] == specs[1] == specs[2]
    expected = {"default": None, "linear": RopeScaling("linear", 3.0), "llama3": LLAMA3}[kind]
    assert (specs[0].values["rope_scaling"], specs[0].values["rotary_base"]) == (expected, 5e5)


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        (
            "minicpm3",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            r"type 'yarn'; supported are default, linear",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "xdrope", "factor": 4.0}},
            "type 'xdrope'; supported are default, lin",
        ),
        ("llama", {"rope_scaling": {"rope_type": "yarn"}}, "type 'yarn' without factor"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": 0, **YARN_ORIGINAL}}, "truncate=0"),
        ("qwen2", {"is_causal": None}, "is_causal=None, which some programs take for true and others for false"),
        ("qwen2", {"is_causal": "no"}, "is_causal='no'"),
        ("qwen3_moe", {"use_qk_norm": False}, "use_qk_norm=False; the architecture has True"),
        ("qwen2", {"qkv_bias": False}, "qkv_bias=False; the architecture has True"),
        ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob=False; the architecture has True"),
        ("starcoder2", {"norm_type": "rms_norm"}, "norm_type='rms_norm'; the architecture has 'layer_norm'"),
        ("llama", {"rope_scaling": {"type": "dynamic"}}, "type 'dynamic' without factor"),
        (
            "llama",
            {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1e3}},
            "dynamic RoPE scaling with alpha",
        ),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "'longrope' without short_factor"),
        (
            "llama",
            {"rope_scaling": {**LONGROPE_TABLE, "type": "longrope", "factor": 1, "short_factor": 2}},
            "short_factor is 2; it must be a list of numbers",
        ),
        (
            "llama",
            {"rope_scaling": {**LONGROPE_TABLE, "type": "longrope"}},
            "'longrope' without factor or max_position_embeddings",
        ),
        ("minicpm", {"scale_depth": "1.4"}, "scale_depth is '1.4'; it must be a number"),
        ("minicpm", {"dim_model_base": 0}, "logits_multiplier is 0"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "type 'linear' without factor"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' without low_freq_factor"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "rotates only a part of each head"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            "llama",
            {"query_multiplier": 2.0, "attn_clip": 8},
            "attn_clip, query_multiplier; .*--ignore-config-fields attn_clip,q",
        ),
        ("llama", {"sliding_window": 8}, "does not know: sliding_window"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "does not know: layer_types"),
        ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\] .* for each of 3 layers"),
        ("smollm3", {"no_rope_layers": [1, 2, 0]}, r"no_rope_layers=\[1, 2, 0\]"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval=0"),
        ("smollm3", {"no_rope_layers": [0, 0, 0]}, "without rotary embeddings in any layer"),
        ("smollm3", {"layer_types": TYPES}, "sliding_attention in layer_types, but no sliding_window"),
        (
            *("internlm3", {"qkv_bias": True}),
            "qkv_bias=True; qkv_bias and bias must agree",
        ),
        ("internlm3", {"qkv_bias": True, "attention_bias": False, "bias": True}, "must agree"),
        ("helium", {"num_key_value_heads": 8, "use_bias": True}, "does not know: use_bias"),
        ("ministral", {"sliding_window": None, "layer_types": TYPES}, "in layer_types, but its sliding_window is null"),
        ("ministral3", {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default"}}, "without YaRN or llama_4"),
        (
            "ministral3",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, **YARN_ORIGINAL}},
            "without YaRN or llama",
        ),
        ("ministral3", {"rope_scaling": {**MINISTRAL3, "alpha": 2}}, "does not know: rope_parameters.alpha"),
        ("llama", {"rope_scaling": MINISTRAL3}, "does not know: rope_scaling.llama_4_scaling_beta"),
        ("ministral", {"layer_types": TYPES[:2]}, "for each of 3 layers"),
        ("mistral", {"attention_bias": True}, "does not know: attention_bias"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
        ("qwen2", {"attention_bias": True}, "does not know: attention_bias"),
        (
            "qwen2",
            {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2},
            "must name full_attention or sliding_attention for each of 3 layers",
        ),
        ("llama", {"num_attention_heads": None}, "no num_attention_heads"),
        ("llama", {"vocab_size": 0}, "vocab_size is 0"),
        ("llama", {"hidden_size": 64.0}, "hidden_size is 64.0"),
        ("llama", {"num_hidden_layers": "3"}, "num_layers is '3'"),
        ("llama", {"num_key_value_heads": 5}, "32 attention heads cannot share 5 query groups"),
        ("llama", {"rms_norm_eps": "1e-5"}, "norm_epsilon is '1e-5'; it must be a number"),
        ("llama", {"tie_word_embeddings": "false"}, "tied is 'false'; it must be true or false"),
        ("llama", {"torch_dtype": "float7"}, "unknown dtype 'float7'"),
        ("llama", {"torch_dtype": 7}, "unknown dtype 7"),
        ("llama", {"hidden_size": "64", "head_dim": None}, "hidden_size is '64'"),
        ("llama", {"num_attention_heads": 0, "head_dim": None}, "num_attention_heads is 0"),
        ("llama", {"rope_theta": float("inf")}, "rope_theta is inf; it must be a number"),
        ("llama", {"rms_norm_eps": float("nan")}, "norm_epsilon is nan; it must be a number"),
        ("llama", {"layer_types": 3}, "layer_types=3; it must be a list of names"),
        ("qwen3_moe", {"layer_types": 3}, "layer_types=3; it must be a list of names"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": "2"}, "max_window_layers='2' of 3 layers"),
        ("llama", {"torch_dtype": ["bfloat16"]}, r"unknown dtype \['bfloat16'\]"),
        ("llama", {"vocab_size": 10**30}, "vocab_size is 1000000000000000000000000000000, which no model has"),
        ("llama", {"head_dim": 1 << 25}, "attention heads of 33554432 are more than any model has"),
        ("llama", {"rms_norm_eps": 10**400}, "0{39}…; it must be a number"),
        ("qwen2_moe", {"num_experts": ""}, "num_experts is ''; it must be a whole number, 0 for none"),
        ("llama", {"hidden_size": "64"}, "hidden_size is '64'; it must be a whole number above 0"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads is 0; it must be a whole number above 0"),
        ("llama", {"layer_types": True}, "layer_types=True; it must be a list of names"),
        ("qwen2_moe", {"layer_types": [["full_attention"]]}, "it must be a list of names"),
        ("llama", {"num_local_experts": 8}, "does not know: num_local_experts"),
        ("mixtral", {"num_local_experts": "8"}, "num_experts is '8'"),
        ("mixtral", {"num_local_experts": 1}, "moe_router_topk is 2, but there are 1 experts"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0; only None can be converted"),
        ("olmo", {"clip_qkv": 8.0}, "clip_qkv=8.0; only None can be converted"),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual=True; only False can be converted"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm=True; only False can be converted"),
        (
            "nemotron",
            {"partial_rotary_factor": 0.5, "rope_percent": 0.25},
            "=0.5 and rope_percent=0.25, which mean the",
        ),
        ("persimmon", {"partial_rotary_factor": None}, "partial_rotary_factor is None; it must be a number"),
        ("gpt_neox", {"rope_theta": 5e5}, "rope_theta=500000.0, which repeats rotary_emb_base, and that is 10000"),
        ("gpt_bigcode", {"multi_query": 1}, "multi_query=1; it must be true or false"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False; only True can be converted"),
        ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim=32; only 64 can be converted"),
        ("opt", {"activation_function": "silu"}, "activation_function='silu'; only 'relu'"),
        ("mixtral", {"num_experts_per_tok": 0}, "moe_router_topk is 0"),
        ("mixtral", {"router_aux_loss_coef": "0.1"}, "moe_aux_loss_coeff is '0.1'; it must be a number"),
        ("qwen3_moe", {"num_experts": 8, "num_local_experts": 4}, r"they differ: \[8, 4\]"),
        ("qwen3_moe", {"num_experts": [8]}, r"num_experts is \[8\]"),
        ("qwen3_moe", {"norm_topk_prob": "false"}, "norm_topk_prob is 'false'; it must be true or false"),
        ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers=3"),
        ("qwen3_moe", {"decoder_sparse_step": "2"}, "decoder_sparse_step='2'"),
        ("qwen3_moe", {"num_hidden_layers": "3"}, "num_layers is '3'"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 16}, "switches on a sliding window"),
        ("qwen2_moe", {"use_sliding_window": True}, "switches on a sliding window"),
        ("qwen2_moe", {"layer_types": ["sliding_attention", "full_attention"]}, "switches on a sliding window"),
    ],
)
def test_what_cannot_be_converted_is_refused(model_type: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        spec_of(model_type, **fields)


@pytest.mark.parametrize(
    ("model_type", "table", "names"),
    [
        ("qwen2", {"rope_type": "default", "mrope_section": [1, 2, 2]}, "rope_scaling.mrope_section"),
        ("llama", {"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0}, "rope_scaling.low_freq_factor"),
        ("qwen3", {"type": "yarn", "factor": 2.0, **YARN_ORIGINAL, "b": 0, "a": 1}, "rope_scaling.b,rope_scaling.a"),
    ],
)
def test_unknown_fields_of_a_scaling_are_refused_like_others(
    model_type: str, table: dict[str, Any], names: str
) -> None:
    with pytest.raises(ConversionError, match=f"--ignore-config-fields {names}$"):
        spec_of(model_type, rope_scaling=table)
    known = {name: value for name, value in table.items() if f"rope_scaling.{name}" not in names.split(",")}
    for accepted in (names.split(","), ["rope_scaling"]):
        found = spec_from_config(config(model_type, rope_scaling=table), accepted)
        assert found == spec_of(model_type, rope_scaling=known)


@pytest.mark.parametrize("beside", [{"finetuned": True}, {"original_max_position_embeddings": 9}, {"b": None}])
def test_fields_of_a_scaling_that_no_program_reads_are_passed_over(beside: dict[str, Any]) -> None:
    table = {"rope_type": "linear", "factor": 2.0}
    assert spec_of(rope_scaling={**table, **beside}) == spec_of(rope_scaling=table)


def test_the_factor_that_vllm_alone_reads_makes_another_model() -> None:
    """DeepSeek-R1-0528-Qwen3-8B, whose factor makes vLLM scale rotated queries and keys by 1."""
    table = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    factor = 0.8782488562869419
    spec = spec_of("qwen3", rope_scaling={**table, "attn_factor": factor})
    scaling = spec.values["rope_scaling"]
    assert scaling.attention_factor == pytest.approx(1.0)
    assert spec != spec_of("qwen3", rope_scaling=table)
    base = config("qwen3", rope_scaling={**table, "attn_factor": factor}, dtype="float32")
    assert config_for(spec_from_config(base), base) == (base, [])


def test_a_field_that_the_user_vouches_for_is_ignored() -> None:
    values = config(query_multiplier=2.0, attn_clip=8)
    assert spec_from_config(values, ["query_multiplier", "attn_clip"]) == spec_of()
    with pytest.raises(ConversionError, match="does not know: attn_clip;"):
        spec_from_config(values, ["query_multiplier"])


def test_fields_that_say_nothing_are_no_obstacle() -> None:
    assert spec_of(query_multiplier=None, use_qk_clip=None, layer_types=["full_attention"] * 3) == spec_of()


@pytest.mark.parametrize("value", [False, 0, 0.0, "", [], {}])
def test_a_falsy_value_of_an_unknown_field_may_change_the_model(value: Any) -> None:
    with pytest.raises(ConversionError, match="does not know: normalize_queries;"):
        spec_of(normalize_queries=value)


#: Fields beyond those of the class, in published models.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2-135M": ("llama", {"is_llama_config": True, "pretraining_tp": 1, "rope_interleaved": False}),
    "Qwen2.5-1.5B": ("qwen2", {"use_mrope": False, "use_sliding_window": False, "max_window_layers": 28}),
    "Qwen2.5-7B-Instruct-1M": (
        "qwen2",
        {"dual_chunk_attention_config": {"chunk_size": 262144, "original_max_position_embeddings": 262144}},
    ),
    "Qwen3-Coder-30B-A3B": (
        "qwen3_moe",
        {
            **{"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0, "mlp_only_layers": []},
            **{"max_window_layers": 28, "sliding_window": None, "use_sliding_window": False, "rope_scaling": None},
        },
    ),
    "Qwen3-Next": ("qwen3_next", {"use_sliding_window": False, "num_hidden_layers": 4}),
    "Phi-4-mini": (
        "phi3",
        {
            **{"attention_bias": False, "mlp_bias": False, "lm_head_bias": False, "full_attn_mod": 1},
            **{"interpolate_factor": 1, "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}},
        },
    ),
    "starcoder2-15b": (
        "starcoder2",
        {"mlp_type": "default", "norm_type": "layer_norm", "rms_norm_eps": 1e-5, "embedding_dropout": 0.0},
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        {"moe_layer_freq": 1, "ep_size": 1, "seq_aux": True, "aux_loss_alpha": 0.001, "pretraining_tp": 1},
    ),
    "of trainers": (
        "llama",
        {
            **{"_flash_attn_2_enabled": True, "attn_implementation": "sdpa", "_attn_implementation_internal": None},
            **{"loss_type": "ForCausalLM", "gradient_checkpointing": True, "seq_length": 2048, "_num_labels": 1},
            **{"model_max_length": 4096, "tokenizer_model_max_length": 4096, "quantization_config": {}},
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_as_without_what_decides_nothing(name: str) -> None:
    model_type, fields = PUBLISHED[name]
    own = {key: value for key, value in fields.items() if key in OWN_SIZES.get(model_type, SIZES)}
    assert spec_of(model_type, **fields) == spec_of(model_type, **own)


def test_dual_chunk_attention_is_warned_of() -> None:
    (warning,) = config_notes(config("qwen2", dual_chunk_attention_config={"chunk_size": 7}))
    assert warning.startswith("warning: config.json has dual_chunk_attention_config={'chunk_size': 7}: vLLM then")
    assert config_notes(config("qwen2", dual_chunk_attention_config=None)) == []


def test_code_of_the_model_s_own_is_said_not_to_be_looked_at() -> None:
    code = {"AutoModelForCausalLM": "modeling_x.X", "AutoModel": "modeling_x.X", "AutoConfig": "configuration_x.C"}
    (note,) = config_notes(config(auto_map=code))
    assert "(modeling_x.X), which was not looked at: it is taken for a llama model" in note
    for harmless in ({"AutoTokenizer": ["tokenization_x.T", None]}, {"AutoConfig": "configuration_x.C"}, None, []):
        assert config_notes(config(auto_map=harmless)) == []


def test_transformers_attends_to_later_tokens_where_config_json_is_not_causal() -> None:
    """And where it is null, that depends on the kernel: so null is no absence here."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def hides_later(kernel: str, **change: Any) -> bool:
        torch.manual_seed(0)
        built = AutoConfig.for_model("qwen2", **sizes, **change)
        model = AutoModelForCausalLM.from_config(built, attn_implementation=kernel).eval()
        with torch.no_grad():
            one, other = (model(torch.tensor([[1, 2, last]])).logits[0, 0] for last in (3, 4))
        return torch.equal(one, other)

    sizes = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    assert [hides_later(kernel) for kernel in ("eager", "sdpa")] == [True, True]
    assert [hides_later(kernel, is_causal=False) for kernel in ("eager", "sdpa")] == [False, False]
    assert [hides_later(kernel, is_causal=None) for kernel in ("eager", "sdpa")] == [False, True]


def test_a_bidirectional_model_is_another_one_and_stays_it() -> None:
    spec = spec_of("qwen2", is_causal=False)
    assert not spec.causal
    assert spec_of("qwen2", is_causal=True) == spec_of("qwen2") == dataclasses.replace(spec, causal=True)
    assert spec_from_config(config_from_spec(spec)) == spec
    base = config("qwen2", is_causal=False, dtype="float32")
    assert config_for(spec, base) == (base, [])


def test_dtypes_are_read_in_both_spellings() -> None:
    assert spec_of().dtype.name == "float32"
    assert spec_of(torch_dtype="bfloat16").dtype.name == "bfloat16"
    assert spec_of(dtype="float16").dtype.name == "float16"


def test_families_are_found_by_architecture_then_by_model_type() -> None:
    assert family_from_config({"architectures": ["Qwen3ForCausalLM"]}).name == "qwen3"
    assert (
        family_from_config({"architectures": ["Qwen3Model", "Qwen3ForCausalLM"], "model_type": "qwen3"}).name == "qwen3"
    )
    both = ["LlamaForCausalLM", "MistralForCausalLM"]
    assert family_from_config({"architectures": both, "model_type": "mistral"}).name == "mistral"
    # transformers saves these two under the name of the class that computes them.
    for model_type in ("llama", "internlm3", "iquestcoder"):
        both_names = ["LlamaForCausalLM", FAMILIES[model_type].architecture]
        for named in (both_names, both_names[:1], both_names[1:], []):
            assert family_from_config({"architectures": named, "model_type": model_type}).name == model_type
    assert family_from_config({"architectures": ["LlamaForCausalLM"]}).name == "llama"
    assert family_from_config({"architectures": ["Ernie4_5_ForCausalLM"]}).name == "ernie4_5"
    assert family_from_config({"model_type": "mistral"}).name == "mistral"
    assert family_from_config({"model_type": "qwen2", "architectures": []}).name == "qwen2"
    for unknown in ({"architectures": ["BertLMHeadModel"], "model_type": "llama"}, {"model_type": "bert"}, {}):
        with pytest.raises(ConversionError, match="not supported; supported are LlamaForCausalLM, MistralForCausalLM"):
            family_from_config(unknown)
    kimi = {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}
    assert family_from_config(kimi).name == family_from_config({"model_type": "kimi_k2"}).name == "deepseek_v3"
    for torn in ({"architectures": ["Qwen3ForCausalLM"], "model_type": "llama"}, {"architectures": both}):
        with pytest.raises(ConversionError, match="which name different models"):
            family_from_config(torn)


@pytest.mark.parametrize(
    "names",
    [
        ["FSDPQwen2ForCausalLM"],
        ["OptimizedModule"],
        ["PeftModelForCausalLM"],
        ["DistributedDataParallel", "Qwen2ForCausalLM"],
        ["FSDPPeftModelForCausalLM"],
    ],
)
def test_a_wrapper_s_name_does_not_beat_the_model_s(names: list[str]) -> None:
    values = {**config("qwen2"), "architectures": names, "dtype": "float32"}
    assert spec_from_config(values) == spec_of("qwen2")
    written, _ = config_for(spec_of("qwen2"), values)
    assert written["architectures"] == ["Qwen2ForCausalLM"]


def test_a_head_s_name_is_no_wrapper_s() -> None:
    with pytest.raises(ConversionError, match="not supported"):
        family_from_config({"architectures": ["PeftModelForSequenceClassification"], "model_type": "qwen2"})
    with pytest.raises(ConversionError, match="whose head says labels for each token"):
        family_from_config({"architectures": ["FSDPQwen2ForTokenClassification"], "model_type": "qwen2"})
    with pytest.raises(ConversionError, match="not supported"):
        family_from_config({"architectures": ["OptimizedModule"]})


MARKS = ("_attn_implementation_autoset", "is_llama_config", "max_sequence_length", "transformers.js_config")


@pytest.mark.parametrize("name", MARKS)
def test_marks_that_programs_leave_are_no_obstacle(name: str) -> None:
    assert spec_of(**{name: True}) == spec_of()


def test_what_a_family_cannot_say_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"the llama architecture cannot express qk_norm: each head, not none$"):
        config_from_spec(tiny_spec(qk_norm=EACH_HEAD))
    with pytest.raises(
        ConversionError, match=r"the llama architecture cannot express feed: moe, not mlp; num_experts: 4"
    ):
        config_from_spec(tiny_spec(**EXPERTS))
    with pytest.raises(
        ConversionError, match=r"the mixtral architecture cannot express .*feed: moe, mlp in the layers, not moe"
    ):
        config_from_spec(tiny_spec(family="mixtral", **EXPERTS, feed=DENSE_LAST))
    with pytest.raises(ConversionError, match=r"mistral .* sliding_window: None, 8 in the layers"):
        config_from_spec(tiny_spec(family="mistral", sliding_window=PerLayer([None, 8])))


@pytest.mark.parametrize(
    ("fields", "family"),
    [
        ({}, "llama"),
        ({"tied": True, "kv_channels": 6, "rope_scaling": LLAMA3}, "llama"),
        ({"qkv_bias": True, "proj_bias": True, "mlp_bias": True}, "llama"),
        ({"qkv_bias": True, "proj_bias": True}, "llama"),
        ({"sliding_window": 16}, "mistral"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qkv_bias": True, "sliding_window": PerLayer([None, 16])}, "qwen2"),
        ({"qkv_bias": True, "sliding_window": PerLayer([16, None])}, "qwen2"),
        ({"qk_norm": EACH_HEAD}, "qwen3"),
        ({"qk_norm": EACH_HEAD, "qkv_bias": True, "proj_bias": True}, "qwen3"),
        ({**EXPERTS, "moe_ffn_hidden_size": 4}, "mixtral"),
        ({**EXPERTS, "moe_ffn_hidden_size": 4, "sliding_window": 16}, "mixtral"),
        ({**EXPERTS, "qkv_bias": True, "shared_ffn_hidden_size": 12, "shared_gate": True}, "qwen2_moe"),
        ({**EXPERTS, "shared_ffn_hidden_size": 12, "shared_gate": True, "feed": DENSE_LAST}, "qwen2_moe"),
        ({**EXPERTS, "qk_norm": EACH_HEAD, "moe_router_pre_softmax": True}, "qwen3_moe"),
        ({**EXPERTS, "qk_norm": EACH_HEAD, "feed": DENSE_FIRST}, "qwen3_moe"),
        ({**EXPERTS, "moe_ffn_hidden_size": 4, "qk_norm": ALL_HEADS}, "olmoe"),
    ],
)
def test_the_first_family_that_can_express_a_model_is_inferred(fields: dict[str, Any], family: str) -> None:
    spec = tiny_spec(**fields)
    without_family = {name: value for name, value in spec.values.items() if name != "family"}
    assert infer_family(without_family) == dataclasses.replace(spec, family=family)


def test_a_model_of_no_family_is_refused_with_every_reason() -> None:
    fields = {
        name: value for name, value in tiny_spec(qk_norm=EACH_HEAD, mlp_bias=True).values.items() if name != "family"
    }
    with pytest.raises(ConversionError, match=r"llama .* qk_norm.*mistral .*qwen2 .*qwen3 .* mlp_bias"):
        infer_family(fields)


@pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS)
def test_any_kind_of_model_is_expressed_whole_or_refused(spec: ModelSpec) -> None:
    """A value for each layer, or none, must not go into config.json where the family has one for all."""
    for name in FAMILIES:
        of_family = dataclasses.replace(spec, family=name)
        try:
            written = config_from_spec(of_family)
        except ConversionError as refusal:
            assert str(refusal)
        else:
            assert spec_from_config(json.loads(json.dumps(written))) == of_family


def test_differences_are_named() -> None:
    one, other = tiny_spec(), tiny_spec(tied=True, dtype=dtype_named("bf16"))
    assert differences(one, other) == ["dtype: float32, not bfloat16", "tied: False, not True"]
    assert differences(one, one) == []


def test_config_for_keeps_what_a_base_says_and_lists_what_changes() -> None:
    base = config(
        num_key_value_heads=4,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_TABLE},
        eos_token_id=[1, 2],
        custom=None,
        dtype="float32",
        head_dim=2,
    )
    spec = spec_from_config(base)
    assert config_for(spec, base) == (base, [])
    changed, changes = config_for(dataclasses.replace(spec, vocab_size=30, dtype=dtype_named("bf16"), tied=True), base)
    assert changed == {**base, "vocab_size": 30, "dtype": "bfloat16", "tie_word_embeddings": True}
    assert changes == ["dtype: float32 -> bfloat16", "tie_word_embeddings: absent -> True", "vocab_size: 32 -> 30"]
    assert "torch_dtype" not in changed
    other_rope = spec.replaced(rotary_base=1e4, rope_scaling=None)
    changed, _ = config_for(other_rope, base)
    assert "rope_parameters" not in changed  # a stale table would win over rope_theta
    assert spec_from_config(changed) == other_rope
    assert facts(theirs(changed))["rotary_base"] == 1e4


def test_code_that_stays_behind_is_not_named() -> None:
    """Else loading with trust_remote_code looks for a file that is not there."""
    base = config(auto_map={"AutoModelForCausalLM": "modeling_x.X"}, dtype="float32")
    written, changes = config_for(spec_from_config(base), base)
    assert "auto_map" not in written
    assert changes == ["auto_map: {'AutoModelForCausalLM': 'modeling_x.X'} -> absent"]


def test_config_for_changes_a_window_that_is_only_a_default() -> None:
    base = config("mistral")
    spec = spec_from_config(base).replaced(sliding_window=None)
    changed, _ = config_for(spec, base)
    assert changed["sliding_window"] is None
    assert spec_from_config(changed) == spec


def test_config_for_without_a_base_is_the_whole_config() -> None:
    spec = tiny_spec()
    assert config_for(spec, None) == (config_from_spec(spec), [])
    assert config_from_spec(spec)["torch_dtype"] == "float32"


def test_specs_survive_json() -> None:
    rope = tiny_spec(rope_scaling=LLAMA3, sliding_window=3, dtype=dtype_named("bf16"))
    for spec in (rope, *KINDS.values()):
        assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        ("{", "cannot read"),
        ("[1]", "holds a list"),
        ('"x"', "holds a str"),
        (b"\xff\xfe", "cannot read"),
    ],
)
def test_broken_json_is_named(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConversionError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)

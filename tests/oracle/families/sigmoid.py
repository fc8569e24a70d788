"""Models whose routers score experts by a sigmoid. All factors, groups and windows are such that leaving one out changes logits."""

from __future__ import annotations

from typing import Any

import torch

from ..hf_kinds import KINDS
from .model import WITH_EXPERTS, Config, Model, Tensors

_GLM = KINDS["glm4-moe"]
_OWN = ("model_type", "use_qk_norm", "attention_bias", "num_nextn_predict_layers")
_BASE: dict[str, Any] = {key: value for key, value in _GLM.items() if key not in _OWN} | dict(
    rope_parameters={"rope_type": "default", "rope_theta": 5e4}
)


def _without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in _BASE.items() if key not in keys}


_DOTS1 = _BASE | dict(model_type="dots1", n_shared_experts=2, sliding_window=None)
_SOLAR_OPEN = _without("first_k_dense_replace", "intermediate_size") | dict(
    model_type="solar_open", attention_bias=True, n_group=4, topk_group=1, num_experts_per_tok=2
)
_HY_V3 = _without(
    "first_k_dense_replace", "n_routed_experts", "n_shared_experts", "norm_topk_prob", "routed_scaling_factor"
) | dict(model_type="hy_v3", num_experts=8, num_shared_experts=2, router_scaling_factor=2.826)
_HY_V3["mlp_layer_types"] = ["dense", "dense", "sparse", "sparse"]
_EXAONE_MOE = _without("n_routed_experts", "n_shared_experts") | dict(
    model_type="exaone_moe", num_experts=8, num_shared_experts=2, sliding_window=7, sliding_window_pattern=3
)

_BAILING_NAMES = (
    ("model.embed_tokens.", "model.word_embeddings."),
    (".self_attn.o_proj.", ".attention.dense."),
    (".self_attn.q_norm.", ".attention.query_layernorm."),
    (".self_attn.k_norm.", ".attention.key_layernorm."),
    (".gate.e_score_correction_bias", ".gate.expert_bias"),
)
_BAILING_KEYS = {
    "n_routed_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
    "attention_bias": "use_qkv_bias",
}


def bailing(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """A model of GLM-4.5's class under the names of Ling 2: queries, keys and values one after the other, and new names."""
    result = {}
    for name, tensor in tensors.items():
        if ".self_attn.q_proj." in name:
            parts = [tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            result[name.replace(".self_attn.q_proj.", ".attention.query_key_value.")] = torch.cat(parts)
        elif not any(f".self_attn.{part}_proj." in name for part in "kv"):
            for old, new in _BAILING_NAMES:
                name = name.replace(old, new)
            result[name] = tensor
    rope = config.pop("rope_parameters")
    config = {_BAILING_KEYS.get(key, key): value for key, value in config.items() if key != "num_local_experts"}
    config |= {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope["partial_rotary_factor"]}
    own = {"architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe", "score_function": "sigmoid"}
    return result, config | own


MODELS = {
    "dots1": Model(_DOTS1, cut=WITH_EXPERTS),
    "dots1-window": Model(_DOTS1 | dict(sliding_window=7, max_window_layers=2), cut=WITH_EXPERTS),
    "solar-open": Model(_SOLAR_OPEN, cut=WITH_EXPERTS),
    "exaone-moe": Model(_EXAONE_MOE, cut=WITH_EXPERTS),
    "hy-v3": Model(_HY_V3, cut=WITH_EXPERTS),
    "bailing-moe-v2": Model(
        _GLM | dict(n_group=4, topk_group=1, num_experts_per_tok=2), publish=bailing, cut=WITH_EXPERTS
    ),
}

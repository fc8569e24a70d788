"""MindFormers' YAML as properties of a model, and the orders of rows that it states.

Keys and their synonyms: mindformers 1.8.0, parallel_core/transformer_config_utils.py (`COMMON_CONFIG_MAPPING`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...basics.errors import ConversionError
from ...families.rules_attention import LINEAR, LLAMA3, YARN, Rope
from ...model.layers import SIGMOID, SOFTMAX, RopeScaling, is_whole, number
from ...model.spec import PerLayer

_SECTIONS = ("model", "model_config")
#: Keys of properties whose values are the same on both sides, the usual one first.
_PLAIN: Mapping[str, tuple[str, ...]] = {
    "num_layers": ("num_layers", "num_hidden_layers", "n_layer"),
    "hidden_size": ("hidden_size",),
    "num_attention_heads": ("num_attention_heads", "num_heads", "n_head"),
    "num_query_groups": ("num_query_groups", "num_key_value_heads", "n_kv_heads"),
    "kv_channels": ("kv_channels", "head_dim"),
    "ffn_hidden_size": ("ffn_hidden_size", "intermediate_size"),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embeddings", "seq_length"),
    "norm_epsilon": ("layernorm_epsilon", "rms_norm_eps", "layer_norm_epsilon"),
    "rotary_base": ("rotary_base", "rope_theta", "theta"),
    "num_experts": ("num_moe_experts", "num_experts", "n_routed_experts", "expert_num"),
    "moe_router_topk": ("moe_router_topk", "num_experts_per_tok", "num_experts_chosen"),
    "moe_ffn_hidden_size": ("moe_ffn_hidden_size", "moe_intermediate_size"),
    "moe_router_num_groups": ("moe_router_num_groups", "n_group"),
    "moe_router_group_topk": ("moe_router_group_topk", "topk_group"),
    "moe_router_topk_scaling_factor": ("moe_router_topk_scaling_factor", "routed_scaling_factor"),
    "mtp_num_layers": ("mtp_num_layers", "num_nextn_predict_layers", "mtp_depth"),
    "q_lora_rank": ("q_lora_rank",),
    "kv_lora_rank": ("kv_lora_rank",),
    "qk_head_dim": ("qk_head_dim", "qk_nope_head_dim"),
    "qk_pos_emb_head_dim": ("qk_pos_emb_head_dim", "qk_rope_head_dim"),
    "v_head_dim": ("v_head_dim",),
}
_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
#: Constants of YaRN, and the positions of the original model, which no key states (parallel_core, MLATransformerConfig).
_YARN, _ORIGINAL = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"), 4096
_INTERLEAVED = "use_interleaved_weight_layout_mlp"
#: Newer and older key of the order of queries, keys and values.
_CONTIGUOUS = ("use_contiguous_weight_layout_attention", "use_contiguous_weight_layout")


def properties_of(yaml: Mapping[str, Any]) -> dict[str, Any]:
    """Properties of a model that the YAML states. Raises `ConversionError` where two synonyms disagree."""
    config = _model_config(yaml)
    found = {name: value for name, keys in _PLAIN.items() if (value := _first(config, keys)) is not None}
    if not _is_latent(config):
        found = {name: value for name, value in found.items() if name not in _LATENT}
    found |= _experts(config, found)
    return found | _rope(config, found)


def flags_of(yaml: Mapping[str, Any]) -> dict[str, bool]:
    """Orders of rows that the YAML states: whether MLPs are "interleaved", and attention "contiguous"."""
    config = _model_config(yaml)
    flags = {"interleaved": config.get(_INTERLEAVED), "contiguous": _first(config, _CONTIGUOUS)}
    for name, value in flags.items():
        if value not in (None, True, False):
            raise ConversionError(f"the YAML has {value!r} for the {name} order of rows; it must be true or false")
    return {name: value for name, value in flags.items() if value is not None}


def _model_config(yaml: Mapping[str, Any]) -> Mapping[str, Any]:
    """Section of the model: `model.model_config`, or `model` itself in later releases."""
    section: Mapping[str, Any] = yaml
    for name in _SECTIONS:
        inner = section.get(name)
        section = inner if isinstance(inner, dict) else section
    return section


def _first(config: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """Value of a key or one of its synonyms."""
    found = {key: config[key] for key in keys if config.get(key) is not None}
    if len({repr(value) for value in found.values()}) > 1 and keys[0] != "max_position_embeddings":
        raise ConversionError(f"the YAML has {found}, which mean the same; leave all but one out")
    return next(iter(found.values()), None)


def _is_latent(config: Mapping[str, Any]) -> bool:
    return bool(config.get("multi_latent_attention")) or config.get("kv_lora_rank") is not None


def _experts(config: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """How experts are chosen, and which layers have them."""
    layers, count = found.get("num_layers"), found.get("num_experts")
    if not count or not is_whole(layers):
        return {}
    score = _first(config, ("moe_router_score_function", "scoring_func")) or SOFTMAX
    if config.get("use_gating_sigmoid"):
        score = SIGMOID
    dense = _first(config, ("first_k_dense_replace",)) or 0
    feeds = PerLayer("mlp" if layer < dense else "moe" for layer in range(layers))
    shared = _first(config, ("shared_expert_num", "n_shared_experts")) or 0
    size = found.get("moe_ffn_hidden_size")
    chosen: dict[str, Any] = {
        "moe_router_score_function": score,
        "moe_router_pre_softmax": score == SOFTMAX and not config.get("norm_topk_prob"),
        "feed": feeds if dense else "moe",
    }
    if shared and is_whole(size):
        chosen["shared_ffn_hidden_size"] = config.get("moe_shared_expert_intermediate_size") or shared * size
    groups = found.get("moe_router_num_groups"), found.get("moe_router_group_topk")
    if groups[0] == groups[1]:  # all groups are eligible
        chosen |= {"moe_router_num_groups": None, "moe_router_group_topk": None}
    return chosen


def _rope(config: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Scaling of rotary embeddings: as in config.json, or multi-latent attention's own."""
    table = config.get("rope_scaling")
    kind = config.get("position_embedding_type")
    if isinstance(table, dict) and table:
        scalings = (LINEAR, LLAMA3, YARN)
        return {"rope_scaling": Rope(scalings=scalings, partial=1.0).read({"rope_scaling": table})["rope_scaling"]}
    factor = number(_first(config, ("rotary_scaling_factor", "scaling_factor")) or 1.0, "rotary_scaling_factor")
    if not _is_latent(config) or kind not in (None, "yarn") or factor == 1.0:
        return {"rope_scaling": None}
    numbers: dict[str, Any] = {name: number(config[name], name) for name in _YARN if config.get(name) is not None}
    return {"rope_scaling": RopeScaling("yarn", factor, original_max_position_embeddings=_ORIGINAL, **numbers)}

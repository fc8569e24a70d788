"""MindFormers' YAML as properties of the model whose weights lie beside it, and the orders of rows that it states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...basics.errors import ConversionError
from .row import canonical, properties
from .shapes import Shapes
from .yaml_rows import LAYOUTS, ROWS

_WHERE = "the YAML of MindSpore Transformers"
#: Keys of sizes that shapes tell, where they are not called as the property.
_KEYS = {"num_experts": "num_moe_experts", "shared_ffn_hidden_size": "moe_shared_expert_intermediate_size"}
_SECTIONS = ("model", "model_config")
#: What classes of models preset, where a YAML leaves it out: by its `model_type` (mindformers 2.1.0, models/*/configuration_*.py).
_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "qwen3": {"layernorm_epsilon": 1e-6, "rotary_base": 1e4},
    "deepseek_v3": {
        "layernorm_epsilon": 1e-6,
        "moe_router_num_groups": 8,
        "moe_router_group_topk": 4,
        "moe_router_topk": 8,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_score_function": "sigmoid",
        "norm_topk_prob": True,
    },
}


def properties_of(yaml: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Properties of the model that the YAML states or leaves to defaults; what shapes tell goes before.

    Raises `ConversionError` where synonyms disagree, and for values that cannot be converted.
    """
    config = canonical(ROWS, _with_presets(_section(yaml)), _WHERE)
    config["multi_latent_attention"] = shapes.is_latent
    for name, size in shapes.sizes().items():
        key = _KEYS.get(name, name)
        config[key] = size if config[key] is None else config[key]
    said = properties(ROWS, config)
    return {name: value for name, value in said.items() if value is not None}


def layouts_of(yaml: Mapping[str, Any]) -> dict[str, str]:
    """Orders of rows that the YAML states, by `mlp_layout` and `qkv_layout`."""
    config = canonical(LAYOUTS, _section(yaml), _WHERE)
    wrong = {key: value for key, value in config.items() if value not in (None, True, False)}
    if wrong:
        raise ConversionError(f"{_WHERE} has {wrong}; each must be true or false")
    return properties(LAYOUTS, config)


def _section(yaml: Mapping[str, Any]) -> Mapping[str, Any]:
    """Section of the model: `model.model_config`, or `model` itself in later releases."""
    section: Mapping[str, Any] = yaml
    for name in _SECTIONS:
        inner = section.get(name)
        section = inner if isinstance(inner, dict) else section
    return section


def _with_presets(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Configuration with what the model's class presets for keys that it does not have, by whichever synonym."""
    preset = _PRESETS.get(str(config.get("model_type")), {})
    synonyms = {row.key: row.keys for row in ROWS}
    missing = {
        key: value for key, value in preset.items() if not any(config.get(name) is not None for name in synonyms[key])
    }
    return {**config, **missing}

"""Typical models of families: the required keys of config.json with small sizes, and defaults for all others."""

from __future__ import annotations

from typing import Any

from ..basics.errors import ConversionError
from .rules import Fixed, Multiple, Named, Row, Rule
from .table import Family

#: Values of properties that decide shapes, so that families have no defaults for them. Heads are a multiple of every family's
#: default of query groups.
_SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 3840,
    "ffn_hidden_size": 128,
    "num_attention_heads": 480,
    "num_query_groups": 480,
    "kv_channels": 8,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "moe_ffn_hidden_size": 128,
    "num_experts": 8,
    "moe_router_topk": 2,
}


def required_config(family: Family) -> dict[str, Any]:
    """config.json with the keys alone that the family's rules require, in small sizes.

    A required key of another property is left out, so that reading the result names it.
    """
    required = [rule for rule in family.rules if isinstance(rule, (Row, Named, Fixed, Multiple)) and _is_required(rule)]
    values = {rule.key: _value(rule) for rule in required}
    known = {key: value for key, value in values.items() if value is not None}
    for rule in family.rules:
        known |= getattr(rule, "required", {})
    return {"architectures": [family.architecture], "model_type": family.model_type, **known}


def _is_required(rule: Rule) -> bool:
    """Whether a rule refuses a config.json without its key."""
    try:
        rule.read({})
    except ConversionError:
        return True
    return False


def _value(rule: Row | Named | Fixed | Multiple) -> Any:
    if isinstance(rule, Multiple):
        return _SIZES[rule.field] * rule.factor
    if isinstance(rule, Fixed):
        return rule.value
    return next(iter(rule.names)) if isinstance(rule, Named) else _SIZES.get(rule.field)

"""Typical models of families: the required keys of config.json with small sizes, and defaults for all others."""

from __future__ import annotations

from typing import Any

from .rules import REQUIRED, Named, Row
from .table import Family

#: Values of properties that decide shapes, so that families have no defaults for them. Each divides what it must.
_SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 128,
    "ffn_hidden_size": 128,
    "num_attention_heads": 32,
    "num_query_groups": 32,
    "kv_channels": 8,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "moe_ffn_hidden_size": 128,
    "moe_router_topk": 2,
}


def required_config(family: Family) -> dict[str, Any]:
    """config.json with the keys alone that the family's rules require, in small sizes.

    A required key of another property is left out, so that reading the result names it.
    """
    rules = [rule for rule in family.rules if isinstance(rule, (Row, Named)) and rule.default is REQUIRED]
    sizes = {rule.key: _value(rule) for rule in rules if isinstance(rule, Named) or rule.field in _SIZES}
    return {"architectures": [family.architecture], "model_type": family.model_type, **sizes}


def _value(rule: Row | Named) -> Any:
    return next(iter(rule.names)) if isinstance(rule, Named) else _SIZES[rule.field]

"""Rules for constants that scale activations, where config.json states them relative to a size of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..basics.errors import ConversionError
from ..basics.quantities import shortest
from ..model.checks import is_whole, number
from ..model.spec import ModelSpec
from .rules import Config, Rule


@dataclass(frozen=True)
class DepthScale:
    """Residual multiplier, as the numerator of a fraction by the root of the number of layers; null means no scaling."""

    default: float
    key: str = "scale_depth"

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, config: Config) -> dict[str, Any]:
        depth = config.get(self.key, self.default)
        root = _root(config.get("num_hidden_layers"))
        return {"residual_multiplier": 1.0 if depth is None else number(depth, self.key) / root}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        root = _root(spec.num_layers)
        multiplier = spec.multipliers.residual_multiplier
        return {self.key: shortest(multiplier * root, lambda depth: depth / root == multiplier)}


@dataclass(frozen=True)
class WidthScale:
    """Multiplier of logits, as the numerator of a fraction by the hidden size; null means no scaling."""

    default: float
    key: str = "dim_model_base"

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, config: Config) -> dict[str, Any]:
        base, size = config.get(self.key, self.default), _size(config.get("hidden_size"))
        return {"logits_multiplier": 1.0 if base is None else number(base, self.key) / size}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        size, multiplier = spec.hidden_size, spec.multipliers.logits_multiplier
        return {self.key: shortest(multiplier * size, lambda base: base / size == multiplier)}


@dataclass(frozen=True)
class QueryScalar:
    """Number whose reciprocal root scales attention scores (Gemma 2 and 3): usually the size of a head, which `size` reads."""

    default: int
    size: Rule
    key: str = "query_pre_attn_scalar"

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, config: Config) -> dict[str, Any]:
        scalar, (size,) = number(config.get(self.key, self.default), self.key), self.size.read(config).values()
        if scalar <= 0:
            raise ConversionError(f"config.json has {self.key}={scalar!r}; it must be above 0")
        return {"attention_multiplier": None if scalar == size else scalar**-0.5}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        scale = spec.multipliers.attention_multiplier
        if scale is None:
            return {self.key: spec.values.get("kv_channels")}
        return {self.key: shortest(scale**-2, lambda scalar: scalar**-0.5 == scale)}


def _size(value: Any) -> int:
    """A size that config.json states; 1 where it is none, which `ModelSpec` refuses."""
    return value if is_whole(value) and value > 0 else 1


def _root(layers: Any) -> float:
    return math.sqrt(_size(layers))

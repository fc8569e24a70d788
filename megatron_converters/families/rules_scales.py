"""Rules for constants that scale activations, where config.json states them relative to a size of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..basics.quantities import shortest
from ..model.checks import is_whole, number
from ..model.spec import ModelSpec
from .rules import Config


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


def _size(value: Any) -> int:
    """A size that config.json states; 1 where it is none, which `ModelSpec` refuses."""
    return value if is_whole(value) and value > 0 else 1


def _root(layers: Any) -> float:
    return math.sqrt(_size(layers))

"""Functions of a config.json that give defaults. They are records, so that tables can be compared and sent to other processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..model.checks import is_whole
from .rules import Config, layer_count


@dataclass(frozen=True)
class SameAs:
    """Value of another key; None, which `ModelSpec` refuses, where that is absent."""

    key: str

    def __call__(self, config: Config) -> Any:
        return config.get(self.key)


@dataclass(frozen=True)
class Quotient:
    """Whole quotient of two keys; None where they are no numbers."""

    dividend: str
    divisor: str

    def __call__(self, config: Config) -> int | None:
        one, other = config.get(self.dividend), config.get(self.divisor)
        return one // other if is_whole(one) and is_whole(other) and other > 0 else None


@dataclass(frozen=True)
class Product:
    """Multiple of a key; None where that is no whole number."""

    factor: int
    key: str

    def __call__(self, config: Config) -> int | None:
        size = config.get(self.key)
        return self.factor * size if is_whole(size) else None


@dataclass(frozen=True)
class Root:
    """Square root of a key; 1 where it is no size, which `ModelSpec` refuses."""

    key: str

    def __call__(self, config: Config) -> float:
        size = config.get(self.key)
        return math.sqrt(size) if is_whole(size) and size > 0 else 1.0


@dataclass(frozen=True)
class IfAbsent:
    """Value `absent` where a key is absent; where it is null, the value of `null`, a key or a function, or None without one."""

    key: str
    absent: Any
    null: str | Quotient = ""

    def __call__(self, config: Config) -> Any:
        if self.key not in config:
            return self.absent
        return config.get(self.null) if isinstance(self.null, str) else self.null(config)


@dataclass(frozen=True)
class EachLayer:
    """List of one value for each layer, in the default of `Fixed`."""

    value: int

    def __call__(self, config: Config) -> list[int]:
        return [self.value] * layer_count(config)

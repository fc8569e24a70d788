"""Placeholder until the branch of values lands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Affine:
    """Linear function of a tensor's values: scale × value + shift."""

    scale: float = 1.0
    shift: float = 0.0

"""Transformer Engine's modules, as megatron-core wraps them; imported where it is installed alone."""

from __future__ import annotations

from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm, TERowParallelLinear

from .after_blocks import Normed

__all__ = ["NormedTERowParallelLinear", "TEColumnParallelLinear", "TENorm"]


class NormedTERowParallelLinear(Normed, TERowParallelLinear):  # type: ignore[misc] # megatron is untyped
    """Transformer Engine's linear with a norm after it."""

    norm = TENorm

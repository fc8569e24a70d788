"""Layer of megatron-core with norms of queries and of keys over all heads together (OLMoE, MiniMax-M2)."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec

from .over_heads import norm_over_heads
from .stock import StockLayer


class NormOverHeadsLayer(StockLayer):
    """Layer whose attention norms queries, and keys, over all heads."""

    @classmethod
    def change(cls, layer: Any, config: TransformerConfig) -> None:
        """Replace the norms of heads."""
        norm_over_heads(layer, config)


spec = ModuleSpec(module=NormOverHeadsLayer)

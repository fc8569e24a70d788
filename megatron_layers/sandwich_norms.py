"""Layer that computes x + norm(attention(norm(x))), then x + norm(mlp(norm(x))), each norm another (GLM-4-0414, Gemma 2 and 3)."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec

from .after_blocks import norm_after_blocks
from .stock import StockLayer


class SandwichNormLayer(StockLayer):
    """Layer with a norm before and another after each of its blocks."""

    @classmethod
    def change(cls, layer: Any, config: TransformerConfig) -> None:
        """Add the norms after blocks."""
        norm_after_blocks(layer, config)


spec = ModuleSpec(module=SandwichNormLayer)

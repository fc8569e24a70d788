"""Layer that computes x + norm(attention(x)), then x + norm(mlp(x)), such as that of EXAONE 4."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec

from .after_blocks import no_norm_before_blocks, norm_after_blocks
from .stock import StockLayer


class PostNormLayer(StockLayer):
    """Layer with a norm after both of its blocks, and none before."""

    @classmethod
    def change(cls, layer: Any, config: TransformerConfig) -> None:
        """Move the norms."""
        no_norm_before_blocks(layer, config)
        norm_after_blocks(layer, config)


spec = ModuleSpec(module=PostNormLayer)

"""Layer with norms after attention and MLP alone, and with norms of queries and keys over all heads (OLMo 2 and 3)."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec

from .over_heads import norm_over_heads
from .post_norms import PostNormLayer


class PostNormOverHeadsLayer(PostNormLayer):
    """Layer with norms after both of its blocks, and over all heads of queries and of keys."""

    @classmethod
    def change(cls, layer: Any, config: TransformerConfig) -> None:
        """Move the norms of blocks, and replace those of heads."""
        super().change(layer, config)
        norm_over_heads(layer, config)


spec = ModuleSpec(module=PostNormOverHeadsLayer)

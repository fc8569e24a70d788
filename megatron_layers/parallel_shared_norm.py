"""Layer that computes x + attention(norm(x)) + mlp(norm(x)), with the same norm (Phi, Falcon-7B, Cohere)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec

from .after_blocks import no_norm_before_blocks
from .parallel import ParallelLayer
from .stock import has_engine


class ParallelSharedNormLayer(ParallelLayer):
    """Layer whose blocks both read its normed input; the norm is a module of its own, since two linears read it."""

    @classmethod
    def change(cls, layer: Any, config: TransformerConfig) -> None:
        """Leave one norm, and name it as it is: megatron-core's own layers rename theirs to parts of linears."""
        super().change(layer, config)
        norm = layer.input_layernorm
        no_norm_before_blocks(layer, config)
        if has_engine(config):
            from .engine import TENorm as norm
        layer.input_layernorm, layer.pre_mlp_layernorm = norm, IdentityOp
        layer.sharded_state_dict_keys_map = {}

    def for_mlp(self, hidden_states: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """What attention reads."""
        return normed


spec = ModuleSpec(module=ParallelSharedNormLayer)

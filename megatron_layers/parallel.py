"""Layer that computes x + attention(norm(x)) + mlp(other norm(x)) (GPT-NeoX, Pythia, Falcon-40B)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.utils import make_viewless_tensor

from .stock import StockLayer, mlp_submodules
from .unheeded import check

#: Arguments of a layer's forward that its attention does not take.
_NOT_FOR_ATTENTION = ("context", "context_mask", "padding_mask", "dynamic_inference_decode_only")


class ParallelLayer(StockLayer):
    """Layer whose blocks both read its input, and are added to it, each with its bias, and dropped out on its own."""

    @classmethod
    def change(cls, layer: Any, config: TransformerConfig) -> None:
        """Refuse what would run its blocks one after the other, and experts."""
        check(config)
        mlp_submodules(layer)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output for hidden states [S, B, H], and the context, which is passed on; `options` are those of megatron-core's layer."""
        for_attention = {name: value for name, value in options.items() if name not in _NOT_FOR_ATTENTION}
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attention(normed, attention_mask=attention_mask, **for_attention)
        transformed = self.mlp(self.for_mlp(hidden_states, normed))
        out = self._added(self.self_attn_bda, attended, hidden_states)
        out = self._added(self.mlp_bda, transformed, out)
        # As in megatron-core's layer: a view may not be saved for recomputing.
        out = make_viewless_tensor(inp=out, requires_grad=out.requires_grad, keep_graph=True)
        return out, options.get("context")

    def for_mlp(self, hidden_states: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """Input of the MLP, by that of the layer and by what its attention reads."""
        own: torch.Tensor = self.pre_mlp_layernorm(hidden_states)
        return own

    def _added(self, bda: Any, output: Any, residual: torch.Tensor) -> torch.Tensor:
        """Sum of what came before and a block's output, with its bias and dropped out."""
        with self.bias_dropout_add_exec_handler():
            add = bda(self.training, self.config.bias_dropout_fusion)
            added: torch.Tensor = add(output, residual, self.hidden_dropout)
        return added


spec = ModuleSpec(module=ParallelLayer)

"""Layers of megatron-core whose attention and MLP both read the layer's input, and a GPTModel whose output layer has a bias.

Phi-2 has both, with one norm for both blocks; in GPT-NeoX and Pythia each block has a norm of its own.

Written for megatron-core 0.16.1 (core/transformer/transformer_layer.py, core/models/gpt/gpt_model.py), which has neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor

from ..basics.errors import raise_all

#: Arguments of a layer's forward that its attention does not take.
_NOT_FOR_ATTENTION = ("context", "context_mask", "padding_mask", "dynamic_inference_decode_only")
#: Part of a layer that may be recomputed alone; others belong to one of two blocks that run one after the other.
_RECOMPUTED = "core_attn"
#: Options under which megatron-core runs parts of a layer by itself, one after the other, and the value that leaves them off.
_LEFT_OFF = {
    "cuda_graph_impl": "none",
    "fine_grained_activation_offloading": False,
    "inference_fuse_tp_communication": False,
}


class ParallelBlockLayer(TransformerLayer):  # type: ignore[misc] # megatron is untyped
    """Layer that computes x + attention(norm(x)) + mlp(norm(x)), each with its bias, and dropped out on its own.

    The norm is the same for both blocks, unless the config has `parallel_norms`.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **options: Any) -> None:
        """As megatron-core's layer; raises `ConversionError` for options that would compute its blocks one after the other."""
        raise_all("a layer whose attention and MLP are parallel cannot have", _refused(config))
        super().__init__(config, *args, **options)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output for hidden states [S, B, H], and the context, which is passed on; `options` are those of megatron-core's layer."""
        for_attention = {name: value for name, value in options.items() if name not in _NOT_FOR_ATTENTION}
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attention(normed, attention_mask=attention_mask, **for_attention)
        transformed = self.mlp(self.pre_mlp_layernorm(hidden_states) if _has_own_norms(self.config) else normed)
        out = self._added(self.self_attn_bda, attended, hidden_states)
        out = self._added(self.mlp_bda, transformed, out)
        # As in megatron-core's layer: a view may not be saved for recomputing.
        out = make_viewless_tensor(inp=out, requires_grad=out.requires_grad, keep_graph=True)
        return out, options.get("context")

    def _added(
        self, bda: Any, output: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor
    ) -> torch.Tensor:
        """Sum of what came before and a block's output, with its bias and dropped out."""
        with self.bias_dropout_add_exec_handler():
            added: torch.Tensor = bda(self.training, self.config.bias_dropout_fusion)(
                output, residual, self.hidden_dropout
            )
        return added


class GPTModelWithHeadBias(GPTModel):  # type: ignore[misc] # megatron is untyped
    """GPTModel whose output layer has a bias, cut like the vocabulary."""

    output_layer: torch.nn.Module

    def setup_embeddings_and_output_layer(self) -> None:
        """Replace the output layer, which has just been built, by one with a bias; then mark parameters as megatron-core does."""
        if self.post_process:
            config, tied = self.config, self.pre_process and self.share_embeddings_and_output_weights
            del self.output_layer  # so that there are not two at a time
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                self.vocab_size,
                config=config,
                init_method=config.init_method,
                bias=True,
                skip_bias_add=False,
                gather_output=not self.parallel_output,
                skip_weight_param_allocation=tied,
                embedding_activation_buffer=self.embedding_activation_buffer,
                grad_output_buffer=self.grad_output_buffer,
                tp_group=self.pg_collection.tp,
            )
        super().setup_embeddings_and_output_layer()


def parallel_layer_spec(config: TransformerConfig, engine: bool) -> ModuleSpec:
    """Spec of a parallel block, of Transformer Engine's modules if `engine`, else of megatron-core's own.

    A norm that the blocks share is a module of its own in both, since two linears read it. Raises `ConversionError` for layers of
    another kind.
    """
    raise_all("a layer whose attention and MLP are parallel cannot have", _other_kinds(config))
    if engine:
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    spec.module = ParallelBlockLayer
    if not _has_own_norms(config):
        _share_norm(spec.submodules, engine)
    return spec


def _has_own_norms(config: TransformerConfig) -> bool:
    """Whether each block has a norm of its own; a config that is no provider of this project does not say so."""
    return bool(getattr(config, "parallel_norms", False))


def _share_norm(submodules: Any, engine: bool) -> None:
    """Replace the two norms of a layer by one."""
    if engine:
        _unfuse_norms(submodules)
    submodules.pre_mlp_layernorm = IdentityOp
    submodules.sharded_state_dict_keys_map = {}  # they rename norms to parts of linears


def _unfuse_norms(submodules: Any) -> None:
    """Replace Transformer Engine's linears that begin with a norm by plain ones, and add the norm."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    submodules.input_layernorm = TENorm
    submodules.self_attention.submodules.linear_qkv = TEColumnParallelLinear
    submodules.mlp.submodules.linear_fc1 = TEColumnParallelLinear


def _other_kinds(config: TransformerConfig) -> Iterator[str]:
    """Kinds of layers for which there is no parallel block here."""
    if config.num_moe_experts:
        yield f"num_moe_experts={config.num_moe_experts}: only dense MLPs are supported; set it to None"
    if config.multi_latent_attention:
        yield "multi_latent_attention=True: only attention with query groups is supported; set it to False"


def _refused(config: TransformerConfig) -> Iterator[str]:
    """Options that a parallel block does not have."""
    for name, off in _LEFT_OFF.items():
        value = getattr(config, name, off)
        if value != off:
            yield f"{name}={value!r}; set it to {off!r}"
    others = {*(config.recompute_modules or ())} - {_RECOMPUTED}
    if config.recompute_granularity == "selective" and others:
        yield f"recompute_modules={sorted(others)}; use {[_RECOMPUTED]}, or recompute_granularity='full'"

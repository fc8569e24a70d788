"""Multi-latent attention from megatron-core's local layers, which 0.16 builds with Transformer Engine alone.

Its spec of local layers gives an attention the sizes of keys and values that it does not take, and cuts the down projections over
tensor-parallel ranks, which Transformer Engine's layers, and so checkpoints of 0.14 and later, do not.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer import TransformerConfig, multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

_LOCK = threading.Lock()
Spec = TypeVar("Spec", ModuleSpec, TransformerBlockSubmodules)

#: Keys of distributed checkpoints, which are Transformer Engine's whatever the layers, and for the norm before the MLP those of
#: megatron's local layers; source: `get_gpt_layer_local_spec` of core/models/gpt/gpt_layer_specs.py.
_DISTRIBUTED_KEYS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


class LatentDotProductAttention(DotProductAttention):  # type: ignore[misc]
    """megatron's attention in plain torch, for heads whose values [.., v_channels] are not as wide as keys [.., k_channels]."""

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **options: Any,
    ) -> None:
        """`args` and `options` are those of the base class. Without channels, as that of keys and values it takes the config's."""
        keys = k_channels or config.kv_channels
        scale = 1 / math.sqrt(keys) if softmax_scale is None else softmax_scale
        super().__init__(config, *args, softmax_scale=scale, **options)
        # The base class has one size for all heads, of which it uses that of the output alone.
        self.hidden_size_per_attention_head = v_channels or config.kv_channels
        self.hidden_size_per_partition = self.hidden_size_per_attention_head * self.num_attention_heads_per_partition


class LatentSelfAttention(MLASelfAttention):  # type: ignore[misc]
    """megatron's multi-latent attention, whose whole down projections start and load as megatron's own linear layers do."""

    def __init__(self, config: TransformerConfig, *args: Any, **options: Any) -> None:
        """`args` and `options` are those of the base class."""
        with _engine_known():
            super().__init__(config, *args, **options)
        for linear in self.children():
            if isinstance(linear, Linear):
                linear.register_load_state_dict_pre_hook(_without_extra_state)
                if config.perform_initialization:
                    config.init_method(linear.weight)  # in place of torch's own
        if isinstance(self.linear_kv_down_proj, Linear):
            self.linear_kv_down_proj.register_forward_hook(self._share_gradients)

    def _share_gradients(self, _: torch.nn.Module, __: Any, out: tuple[torch.Tensor, Any]) -> None:
        """Have gradients of the down projection's output summed over tensor-parallel ranks where megatron forgets it."""
        if out[0].requires_grad and self.tp_group.size() > 1 and not self.config.sequence_parallel:
            out[0].register_hook(self._shared)  # type: ignore[no-untyped-call]

    def _shared(self, gradient: torch.Tensor) -> torch.Tensor:
        """Gradients [s, b, latent | rotary part of keys], the rotary part's summed: each rank has those of its own heads.

        megatron sums them with sequence parallelism alone. Without it, copies of the weights would drift apart in training.
        """
        latent, key = torch.split(gradient, [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1)
        total = key.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=self.tp_group)
        return torch.cat([latent, total], dim=-1)


@contextmanager
def _engine_known() -> Iterator[None]:
    """Context in which megatron knows whether there is Transformer Engine; it takes its own wrappers of it for a sign."""
    with _LOCK:
        before = multi_latent_attention.HAVE_TE
        multi_latent_attention.HAVE_TE = isinstance(multi_latent_attention.TELinear, type)
        try:
            yield
        finally:
            multi_latent_attention.HAVE_TE = before


def _without_extra_state(_: torch.nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    """Drop the empty `_extra_state` that files have for each of megatron's linear layers, from a layer that has none."""
    state.pop(f"{prefix}_extra_state", None)


def latent_layer_spec(spec: Spec, cut_down_projections: bool = False) -> Spec:
    """megatron's spec of local layers, one layer or a block, with multi-latent attention that can be built and run.

    Modules have the names of local layers. `cut_down_projections` leaves the down projections cut over tensor-parallel ranks, as
    rank files before 0.14 have them. The spec is changed, and returned.
    """
    for layer in [spec] if isinstance(spec, ModuleSpec) else spec.layer_specs:
        attention = layer.submodules.self_attention
        if attention.module not in (MLASelfAttention, LatentSelfAttention):
            continue
        attention.module = LatentSelfAttention
        attention.submodules.core_attention = LatentDotProductAttention
        if not cut_down_projections:
            attention.submodules.linear_q_down_proj = attention.submodules.linear_kv_down_proj = Linear
        layer.submodules.sharded_state_dict_keys_map = _DISTRIBUTED_KEYS
    return spec

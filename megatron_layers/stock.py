"""megatron-core's own layer, made for a config, that the layers of this package change."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer


def has_engine(config: TransformerConfig) -> bool:
    """Whether layers are of Transformer Engine's modules: as the config says (0.15 on), and otherwise if it is installed."""
    return bool(HAVE_TE) and getattr(config, "transformer_impl", "") != "local"


def submodules(config: TransformerConfig) -> Any:
    """Submodules of megatron-core's layer for this config; raises `ValueError` for one that cannot have all layers alike."""
    frequency = config.moe_layer_freq if config.num_moe_experts else 1
    if frequency not in (1, [1] * config.num_layers):
        raise ValueError(f"moe_layer_freq={frequency}: layers of megatron_layers are all of one kind; set it to 1")
    if config.multi_latent_attention:
        raise ValueError("multi_latent_attention=True: layers of megatron_layers have attention with query groups")
    options = dict(num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm)
    options |= dict(moe_grouped_gemm=bool(config.num_moe_experts and config.moe_grouped_gemm))
    if getattr(config, "moe_use_legacy_grouped_gemm", False):
        options |= dict(moe_use_legacy_grouped_gemm=True)  # up to 0.18
    if has_engine(config):
        return get_gpt_layer_with_transformer_engine_spec(**options).submodules
    return get_gpt_layer_local_spec(**options, normalization=config.normalization).submodules


def mlp_submodules(layer: Any) -> Any:
    """Submodules of the MLP of a layer's `submodules`; raises `ValueError` for experts, which have none of their own."""
    mlp = layer.mlp
    found = (
        mlp.submodules if hasattr(mlp, "submodules") else mlp.keywords["submodules"]
    )  # from 0.19 on it is a `partial`
    if not hasattr(found, "linear_fc2"):
        raise ValueError("num_moe_experts: this layer of megatron_layers has an MLP, and no experts")
    return found


class StockLayer(TransformerLayer):  # type: ignore[misc] # megatron is untyped
    """Layer whose submodules are megatron-core's for its config, changed by `change`."""

    def __init__(self, config: TransformerConfig, **options: Any) -> None:
        """As megatron-core's layer, but that its submodules are made here."""
        layer = submodules(config)
        self.change(layer, config)
        super().__init__(config, layer, **options)

    @classmethod
    def change(cls, layer: Any, config: TransformerConfig) -> None:
        """Change the submodules of megatron-core's layer."""

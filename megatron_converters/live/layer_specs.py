"""Specs of megatron-core's layers for a config, as Megatron-LM's `gpt_builder` chooses them (core_v0.16.1)."""

from __future__ import annotations

import importlib
from typing import Any

from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_transformer_block_with_experimental_attention_variant_spec,
)
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from ..basics.errors import ConversionError
from ..formats.megatron.rows_layers import KINDS, PACKAGE
from .latent_attention import latent_layer_spec

LOCAL, ENGINE = "local", "transformer_engine"


def layer_spec(config: TransformerConfig, stage: int | None) -> ModuleSpec | TransformerBlockSubmodules:
    """Spec of the layers of a virtual pipeline stage of this rank; None is the only one."""
    impl = config.transformer_impl
    if impl not in (LOCAL, ENGINE):
        raise ConversionError(f"transformer_impl {impl!r} is neither {LOCAL!r} nor {ENGINE!r}")
    if config.own_layer:
        return own_spec(config.own_layer)
    if config.experimental_attention_variant is not None:
        return get_transformer_block_with_experimental_attention_variant_spec(config, vp_stage=stage)
    if config.num_moe_experts:
        engine = impl == ENGINE
        block = get_gpt_decoder_block_spec(config, engine, normalization=config.normalization, vp_stage=stage)
        return block if engine else latent_layer_spec(block, config.cut_down_projections)
    options = dict(qk_layernorm=config.qk_layernorm, multi_latent_attention=config.multi_latent_attention)
    if impl == LOCAL:
        layer = get_gpt_layer_local_spec(**options, normalization=config.normalization)
        return latent_layer_spec(layer, config.cut_down_projections)
    return get_gpt_layer_with_transformer_engine_spec(**options)


def own_spec(name: str) -> ModuleSpec:
    """Spec of a layer of `megatron_layers`, as `pretrain_gpt.py --spec` takes it."""
    if name not in KINDS:
        raise ConversionError(f"own_layer {name!r} is none of {', '.join(map(repr, KINDS))}")
    spec: ModuleSpec = importlib.import_module(f"{PACKAGE}.{name}").spec
    return spec


def prediction_spec(config: TransformerConfig, stage: int | None) -> Any:
    """Spec of the layers of multi-token prediction, or None if this stage has none."""
    if not config.mtp_num_layers:
        return None
    engine = config.transformer_impl == ENGINE
    layer = get_gpt_decoder_layer_specs(config, engine, normalization=config.normalization, vp_stage=stage)[-1]
    layer = layer if engine else latent_layer_spec(layer, config.cut_down_projections)
    return get_gpt_mtp_block_spec(config, layer, use_transformer_engine=engine, vp_stage=stage)

"""Indexer of sparse attention as megatron-core builds it, only in the pool's processes.

0.16.1 has the module, and builds no model with it (`get_experimental_attention_variant_module_spec`).
"""

from __future__ import annotations

from typing import Any

from .checkpoint import Grid
from .jobs import _parallel

Shapes = dict[str, tuple[int, ...]]


def indexer_shapes(tp: int, sizes: dict[str, Any]) -> Shapes:
    """Names and shapes of the tensors of an indexer on this rank, of `tp`; `sizes` are fields of the config."""
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
    from megatron.core.models.gpt.experimental_attention_variant_module_specs import get_dsa_module_spec_for_backend
    from megatron.core.transformer import MLATransformerConfig
    from megatron.core.transformer.spec_utils import build_module

    _parallel(Grid(tp, 2))
    config = MLATransformerConfig(
        **{**sizes, "num_layers": 2, "num_attention_heads": 4, "transformer_impl": "transformer_engine"},
        **{
            "add_bias_linear": False,
            "use_cpu_initialization": True,
            "tensor_model_parallel_size": tp,
            "rope_type": "rope",
        },
        **{"experimental_attention_variant": "dsa", "pipeline_model_parallel_size": 2, "pipeline_dtype": "float32"},
    )
    spec = get_dsa_module_spec_for_backend(config, TESpecProvider())
    indexer = build_module(spec.submodules.core_attention.submodules.indexer, config=config)
    return {name: tuple(value.shape) for name, value in indexer.state_dict().items() if value is not None}

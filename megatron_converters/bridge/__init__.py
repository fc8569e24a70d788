"""AutoBridge: models of Hugging Face as live models of megatron-core and back, by the names of Megatron-Bridge."""

from __future__ import annotations

from ..live.export import WeightDistributionMode
from ..live.shard_map import MappedTensor, Part, ShardMap
from .auto import AutoBridge
from .pretrained import UnsupportedModel
from .weights import HFSourcedWeightTuple, HFWeightTuple

#: Name of the same in the first releases.
CausalLMBridge = AutoBridge

__all__ = [
    "AutoBridge",
    "CausalLMBridge",
    "HFSourcedWeightTuple",
    "HFWeightTuple",
    "MappedTensor",
    "Part",
    "ShardMap",
    "UnsupportedModel",
    "WeightDistributionMode",
]

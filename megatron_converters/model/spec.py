"""Model description: the sizes and switches that decide a model's tensors and its arithmetic.

Field names are Megatron-LM's argument names where it has one.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any, TypeGuard

from ..basics.dtypes import DType, dtype_named
from ..basics.errors import ConversionError

#: More rows or columns than any model's tensor has, so that a damaged size allocates no memory.
_TOO_LARGE = 1 << 27


def number(value: Any, name: str) -> float:
    """Value of the field `name`, which must be a finite number; a hand-written configuration may hold anything."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        shown = repr(value)
        raise ConversionError(f"{name} is {shown if len(shown) < 80 else shown[:40] + '…'}; it must be a number")
    return float(value)


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies. `kind` is "llama3" or "linear"; the last three fields apply to llama3 only."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only model. Sizes count elements; `vocab_size` excludes Megatron's padding rows."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    rotary_base: float
    dtype: DType
    rope_scaling: RopeScaling | None = None
    tied: bool = False
    qkv_bias: bool = False
    proj_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    #: The query and key norms span all heads together (OLMoE) instead of each head by itself.
    qk_norm_over_heads: bool = False
    sliding_window: int | None = None
    #: First layer with the sliding window (Qwen's `max_window_layers`); 0 means every layer.
    sliding_window_from: int = 0
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    #: 0 for a dense model. The fields from here on describe a mixture of experts.
    num_experts: int = 0
    moe_ffn_hidden_size: int = 0
    moe_router_topk: int = 0
    #: Softmax over all experts before the top-k choice, instead of over the chosen experts after it.
    moe_router_pre_softmax: bool = False
    moe_aux_loss_coeff: float = 0.0
    shared_ffn_hidden_size: int = 0
    shared_gate: bool = False
    #: Layers with a dense MLP, in order.
    dense_layers: tuple[int, ...] = ()

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has experts instead of a dense MLP."""
        return self.num_experts > 0 and layer not in self.dense_layers

    def __post_init__(self) -> None:
        """Refuse sizes that no model can have, so that later code need not check them."""
        positive: tuple[str, ...] = (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
        )
        if not is_whole(self.num_experts) or self.num_experts < 0:
            raise ConversionError(f"num_experts is {self.num_experts!r}; it must be a whole number, 0 for none")
        if self.num_experts:
            positive += ("num_experts", "moe_ffn_hidden_size", "moe_router_topk")
        for name in (*positive, "kv_channels", "vocab_size", "max_position_embeddings"):
            value = getattr(self, name)
            if not is_whole(value) or value < 1:
                raise ConversionError(f"{name} is {value!r}; it must be a whole number above 0")
        for name in (*positive, "kv_channels", "vocab_size"):
            if getattr(self, name) >= _TOO_LARGE:
                raise ConversionError(f"{name} is {getattr(self, name)!r:.40}, which no model has")
        if self.num_attention_heads * self.kv_channels >= _TOO_LARGE:
            raise ConversionError(
                f"{self.num_attention_heads} attention heads of {self.kv_channels} are more than any model has"
            )
        for name in ("norm_epsilon", "rotary_base", "initializer_range", "attention_dropout", "moe_aux_loss_coeff"):
            number(getattr(self, name), name)
        norms = ("qk_norm", "qk_norm_over_heads")
        for name in ("tied", "qkv_bias", "proj_bias", "mlp_bias", *norms, "moe_router_pre_softmax", "shared_gate"):
            if not isinstance(getattr(self, name), bool):
                raise ConversionError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        window = self.sliding_window
        if window is not None and (not is_whole(window) or window < 1):
            raise ConversionError(f"sliding_window is {window!r}; it must be a whole number above 0, or null for none")
        if self.num_attention_heads % self.num_query_groups:
            raise ConversionError(
                f"{self.num_attention_heads} attention heads cannot share {self.num_query_groups} query groups evenly"
            )
        self._check_experts()

    def _check_experts(self) -> None:
        shared, dense = self.shared_ffn_hidden_size, self.dense_layers
        if not is_whole(shared) or shared < 0:
            raise ConversionError(
                f"shared_ffn_hidden_size is {shared!r}; it must be a whole number above 0, or 0 for none"
            )
        if self.num_experts and self.moe_router_topk > self.num_experts:
            raise ConversionError(
                f"moe_router_topk is {self.moe_router_topk}, but there are {self.num_experts} experts"
            )
        if not all(is_whole(layer) and 0 <= layer < self.num_layers for layer in dense):
            raise ConversionError(f"dense_layers is {list(dense)}; they must be layers from 0 to {self.num_layers - 1}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for JSON and for the queue's metadata."""
        return {**dataclasses.asdict(self), "dtype": self.dtype.name}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelSpec:
        """The inverse of `to_dict`."""
        scaling = values["rope_scaling"]
        return cls(
            **{
                **values,
                "dtype": dtype_named(values["dtype"]),
                "dense_layers": tuple(values["dense_layers"]),
                "rope_scaling": RopeScaling(**scaling) if scaling else None,
            }
        )

"""Stand-in for Transformer Engine in plain torch, so that megatron-core's Transformer Engine spec runs on a CPU.

megatron-core's own wrapper classes (`megatron/core/extensions/transformer_engine.py`, 0.16) are used unchanged; they
subclass the ones here. Constructor arguments and state-dict names (`weight`, `bias`, `layer_norm_weight`,
`layer_norm_bias`, `weight0` … of grouped experts, `_extra_state`) are those of Transformer Engine 2. Arguments for
fp8, overlap and random state are accepted and ignored.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

_VERSION = "2.8.0"  # megatron-core chooses arguments and names by it

Group = dist.ProcessGroup | None


class _ExtraState(torch.nn.Module):
    """Base class: every module of Transformer Engine 2 has an `_extra_state`, an empty byte tensor where fp8 is off."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        if state is not None and state.numel():
            raise ValueError("fp8 state in a checkpoint that is not fp8")


class _Norm(_ExtraState):
    """Layer or RMS norm over the last dimension, in float32."""

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        zero_centered_gamma: bool = False,
        params_dtype: torch.dtype = torch.float32,
        **_: Any,
    ):
        super().__init__()
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=params_dtype))


class RMSNorm(_Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _normalise(x, self.weight, None, "RMSNorm", self.eps, self.zero_centered_gamma)


class LayerNorm(_Norm):
    def __init__(self, hidden_size: int, eps: float, **kwargs: Any):
        super().__init__(hidden_size, eps, **kwargs)
        self.bias = torch.nn.Parameter(torch.zeros_like(self.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _normalise(x, self.weight, self.bias, "LayerNorm", self.eps, self.zero_centered_gamma)


class Linear(_ExtraState):
    """Linear layer cut over a tensor-parallel group by rows or columns, or not at all (`parallel_mode` None).

    Feature counts are those of the whole layer. Returns the output, or with `return_bias` (output, bias not yet added), as TE does.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        return_bias: bool = False,
        parallel_mode: str | None = None,
        tp_group: Group = None,
        tp_size: int = 1,
        sequence_parallel: bool = False,
        init_method: Callable[[torch.Tensor], Any] | None = None,
        params_dtype: torch.dtype = torch.float32,
        **_: Any,
    ):
        super().__init__()
        if sequence_parallel:
            raise NotImplementedError("the stand-in has no sequence parallelism")
        self.in_features = in_features // tp_size if parallel_mode == "row" else in_features
        self.out_features = out_features // tp_size if parallel_mode == "column" else out_features
        self.use_bias, self.return_bias, self.parallel_mode = bias, return_bias, parallel_mode
        self.tp_group, self.tp_size = tp_group, tp_size
        self.weight = torch.nn.Parameter(torch.zeros(self.out_features, self.in_features, dtype=params_dtype))
        if init_method is not None:
            init_method(self.weight)
        # None must be assigned, too: megatron's wrappers assign a Parameter to `bias` afterwards.
        self.bias = torch.nn.Parameter(torch.zeros(self.out_features, dtype=params_dtype)) if bias else None
        self._mark_shards()

    def _mark_shards(self) -> None:
        """Set the attributes by which megatron recognises a parameter that differs between tensor-parallel ranks."""
        if self.parallel_mode is None:
            return
        dim = 0 if self.parallel_mode == "column" else 1
        self.weight.tensor_model_parallel, self.weight.partition_dim = True, dim  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        out = F.linear(x, self.weight)
        if self.parallel_mode == "row" and self.tp_size > 1:
            dist.all_reduce(out, group=self.tp_group)
        if self.return_bias:
            return out, self.bias
        return out if self.bias is None else out + self.bias


class LayerNormLinear(Linear):
    """Norm and the linear layer after it, as one module."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        zero_centered_gamma: bool = False,
        **kwargs: Any,
    ):
        super().__init__(in_features, out_features, **kwargs)
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        dtype = self.weight.dtype
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, dtype=dtype))
        with_bias = normalization == "LayerNorm"
        self.layer_norm_bias = torch.nn.Parameter(torch.zeros(in_features, dtype=dtype)) if with_bias else None

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        gain, bias = self.layer_norm_weight, self.layer_norm_bias
        return super().forward(_normalise(x, gain, bias, self.normalization, self.eps, self.zero_centered_gamma))


class DotProductAttention(_ExtraState):
    """Causal attention over [s, b, heads, d], with query groups, a sliding window, and sinks (`softmax_type` "learnable").

    `window_size` is TE's (left, right), where -1 is unlimited: position i sees i - left to i; later ones are masked.
    """

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        *,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] | None = None,
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        tp_size: int = 1,
        **_: Any,
    ):
        super().__init__()
        learnable = softmax_type == "learnable"
        if not learnable and softmax_type != "vanilla":
            raise NotImplementedError(f"the stand-in has no softmax of the type {softmax_type}")
        self.softmax_offset = torch.nn.Parameter(torch.zeros(num_attention_heads // tp_size)) if learnable else None
        self.attention_dropout = attention_dropout
        key_channels = kv_channels if isinstance(kv_channels, int) else kv_channels[0]
        self.scale = softmax_scale or 1 / math.sqrt(key_channels)
        self.window_size = window_size or (-1, -1)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, *, attn_mask_type: str, **_: Any
    ) -> torch.Tensor:
        if attn_mask_type != "causal" or mask is not None:
            raise NotImplementedError(f"the stand-in has only causal attention, not {attn_mask_type!r}")
        if self.training and self.attention_dropout:
            raise NotImplementedError("the stand-in has no attention dropout")
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads or groups, s, d]
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = self.scores(q, k)
        scores = scores.masked_fill(~self._visible(scores.shape[-1]), float("-inf"))
        if self.softmax_offset is not None:
            sinks = self.softmax_offset.float()[None, :, None, None].expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sinks], -1)
        context = scores.softmax(-1)[..., : v.shape[-2]].to(v.dtype) @ v
        return context.permute(2, 0, 1, 3).flatten(2)  # [s, b, heads * d]

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Scaled products of queries and keys, in float32."""
        return (q @ k.transpose(-1, -2)).float() * self.scale

    def _visible(self, length: int) -> torch.Tensor:
        position = torch.arange(length)
        distance = position[:, None] - position[None, :]
        left = self.window_size[0]
        return (distance >= 0) & (distance <= (length if left < 0 else left))


class GroupedLinear(_ExtraState):
    """Linear layers of `num_gemms` experts, `weight0`, `weight1`, …, each applied to its own rows, and `bias0`, … if there are any.

    megatron-core passes feature counts already divided by the tensor-parallel size, unless the group is this rank alone.
    """

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        return_bias: bool = False,
        tp_size: int = 1,
        params_dtype: torch.dtype = torch.float32,
        **_: Any,
    ):
        super().__init__()
        if tp_size > 1:
            raise NotImplementedError("the stand-in's grouped linear has no tensor parallelism of its own")
        self.num_gemms, self.use_bias, self.return_bias = num_gemms, bias, return_bias
        self.fp8_meta, self.fp8, self.fp8_calibration = {"fp8_checkpoint": False}, False, False
        for gemm in range(num_gemms):
            weight = torch.zeros(out_features, in_features, dtype=params_dtype)
            self.register_parameter(f"weight{gemm}", torch.nn.Parameter(weight))
            if bias:
                self.register_parameter(
                    f"bias{gemm}", torch.nn.Parameter(torch.zeros(out_features, dtype=params_dtype))
                )

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Do nothing: megatron-core calls it before a load, and fp8 is off."""

    def forward(self, x: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Any:
        biases = [getattr(self, f"bias{gemm}", None) for gemm in range(self.num_gemms)]
        added = [None] * self.num_gemms if self.return_bias else biases
        weights = [getattr(self, f"weight{gemm}") for gemm in range(self.num_gemms)]
        out = torch.cat(list(map(F.linear, x.split(m_splits), weights, added)))
        return (out, biases) if self.return_bias else out


def _normalise(
    x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor | None, kind: str, eps: float, zero_centered: bool
) -> torch.Tensor:
    weight = gain.float() + 1 if zero_centered else gain.float()
    if kind == "RMSNorm":
        return F.rms_norm(x.float(), x.shape[-1:], weight, eps).to(x.dtype)
    return F.layer_norm(x.float(), x.shape[-1:], weight, None if bias is None else bias.float(), eps).to(x.dtype)


class FP8GlobalStateManager:
    """Stand-in that reports fp8 as off."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def _placeholder(name: str) -> type:
    """Placeholder class: megatron-core needs the name at import, but no model here uses it."""
    return type(name, (), {})


_PYTORCH: dict[str, Any] = {
    cls.__name__: cls for cls in (Linear, LayerNormLinear, LayerNorm, RMSNorm, DotProductAttention, GroupedLinear)
}
_MODULES: dict[str, dict[str, Any]] = {
    "transformer_engine": {"__version__": _VERSION},
    "transformer_engine.common": {},
    "transformer_engine.common.recipe": {"DelayedScaling": _placeholder("DelayedScaling")},
    "transformer_engine.pytorch": _PYTORCH,
    "transformer_engine.pytorch.distributed": {
        "CudaRNGStatesTracker": _placeholder("CudaRNGStatesTracker"),
        "activation_recompute_forward": _placeholder("activation_recompute_forward"),
    },
    "transformer_engine.pytorch.fp8": {
        "FP8GlobalStateManager": FP8GlobalStateManager,
        "fp8_autocast": lambda **_: nullcontext(),
    },
    "transformer_engine.pytorch.router": {
        name: _placeholder(name)
        for name in (
            *("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss"),
            "fused_topk_with_score_function",
        )
    },
    "transformer_engine.pytorch.tensor": {"QuantizedTensor": _placeholder("QuantizedTensor")},
    "transformer_engine.pytorch.ops": {name: _placeholder(name) for name in ("Sequential", "FusibleOperation")},
}


def install() -> None:
    """Make `import transformer_engine` find the stand-in in this process."""
    for name, content in _MODULES.items():
        module = ModuleType(name)
        module.__path__ = []  # makes it a package: missing modules in it raise ImportError, which megatron-core handles
        vars(module).update(content)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)

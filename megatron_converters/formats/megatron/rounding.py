"""Rounding that Megatron-LM does to weights whose dtype is not the model's."""

from __future__ import annotations

from collections.abc import Callable

from ...basics.dtypes import DType
from ...model.slots import Precision, Ref, refs
from ...model.spec import ModelSpec


def rounding_warnings(spec: ModelSpec, dtype_of: Callable[[Ref], DType]) -> list[str]:
    """Warning that Megatron-LM rounds weights whose dtype is not the model's; `router_warnings` covers routers."""
    stored = ((ref.slot, dtype_of(ref)) for ref in refs(spec))
    lossy = {
        slot.name: dtype
        for slot, dtype in stored
        if dtype != spec.dtype and dtype.itemsize >= spec.dtype.itemsize and slot.precision is Precision.MODEL
    }
    if not lossy:
        return []
    named = ", ".join(f"{name} ({dtype})" for name, dtype in lossy.items())
    return [f"warning: {named} differ from the model's dtype, {spec.dtype}: Megatron-LM rounds them to it when loading"]

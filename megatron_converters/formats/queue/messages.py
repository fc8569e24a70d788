"""Messages of Megatron-LM's loader/saver protocol: which slot is sent in which message, under which keys.

Source: Megatron-LM core_v0.17.1, tools/checkpoint/{convert,loader_base,saver_base}.py. The protocol has no keys for many slots,
such as query and key norms or shared experts; the keys of these are this project's, so such models need its loader and its saver.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from ...model.layouts import GATED, SAME, Layout
from ...model.slots import MTP, SLOTS, Ref, Scope
from ...model.spec import ModelSpec
from ...model.tables import Entry

_EMBEDDINGS, _LAYER, _MTP, _FINAL, _OUTPUT = (
    *("embeddings", "transformer layer {layer}", "mtp layer {layer}"),
    *("final norm", "output layer"),
)
#: Message of a slot by where the slot belongs; that of a layer of multi-token prediction is this project's own.
_MESSAGES = {Scope.FIRST: _EMBEDDINGS, Scope.LAYER: _LAYER, Scope.MTP: _MTP, Scope.LAST: _FINAL}


def _gated(key: str, kind: str) -> Entry:
    """Entry of gate and up, or of up alone. Loaders may send gate above up as one tensor, and Habana's does without CUDA (1.24.0,
    tools/checkpoint/loader_mixtral_hf.py)."""
    return Entry(GATED, (f"{key} {kind} W", f"{key} {kind} V"), fused=f"{key} {kind}")


#: Entries of the protocol's own keys, and of keys that this project chose before it named them after their slots.
_ENTRIES = {
    "word_embeddings": Entry(SAME, ("word embeddings",)),
    "position_embeddings": Entry(SAME, ("position embeddings",)),
    "input_norm": Entry(SAME, ("input norm weight",)),
    "input_norm_bias": Entry(SAME, ("input norm bias",)),
    "qkv": Entry(SAME, ("qkv weight",)),
    "qkv_bias": Entry(SAME, ("qkv bias",)),
    "q_norm": Entry(SAME, ("q norm weight",)),
    "k_norm": Entry(SAME, ("k norm weight",)),
    "proj": Entry(SAME, ("dense weight",)),
    "proj_bias": Entry(SAME, ("dense bias",)),
    "mlp_norm": Entry(SAME, ("post norm weight",)),
    "mlp_norm_bias": Entry(SAME, ("post norm bias",)),
    "fc1": _gated("mlp l0", "weight"),
    "fc1_bias": _gated("mlp l0", "bias"),
    "fc2": Entry(SAME, ("mlp l1 weight",)),
    "fc2_bias": Entry(SAME, ("mlp l1 bias",)),
    "router": Entry(SAME, ("router weight",)),
    "expert_fc1": dataclasses.replace(_gated("mlp l0", "weight"), stacked=True),
    "expert_fc2": Entry(SAME, ("mlp l1 weight",), stacked=True),
    "expert_fc1_bias": dataclasses.replace(_gated("mlp l0", "bias"), stacked=True),
    "expert_fc2_bias": Entry(SAME, ("mlp l1 bias",), stacked=True),
    "shared_fc1": _gated("shared mlp l0", "weight"),
    "shared_fc2": Entry(SAME, ("shared mlp l1 weight",)),
    "shared_gate": Entry(SAME, ("shared gate weight",)),
    "final_norm": Entry(SAME, ("weight",)),
    "final_norm_bias": Entry(SAME, ("bias",)),
    "output_layer": Entry(SAME, ("weight",)),
    "output_layer_bias": Entry(SAME, ("bias",)),
}
ENTRIES = {name: _ENTRIES.get(name, Entry(SAME, (name.replace("_", " "),))) for name in SLOTS}
#: Slots of the message of the output layer.
_OUTPUT_SLOTS = ("output_layer", "output_layer_bias", "score")


class Sent(NamedTuple):
    """Layout of a slot in its message, and the keys of its parts."""

    layout: Layout
    keys: tuple[str, ...]


def sent(ref: Ref, spec: ModelSpec) -> Sent:
    """Layout and keys under which a ref is sent."""
    entry = ENTRIES[ref.slot.name]
    single = len(ref.slot.size(spec, ref.kind(spec)).blocks) == 1
    return Sent(SAME, (entry.fused,)) if single and entry.fused is not None else Sent(entry.layout, entry.names)


def received(ref: Ref, spec: ModelSpec, message: Mapping[str, Any]) -> Sent:
    """Layout and keys that a received message uses for a ref: those of `sent`, or one tensor for all its parts."""
    fused = ENTRIES[ref.slot.name].fused
    return Sent(SAME, (fused,)) if fused is not None and fused in message else sent(ref, spec)


def message_name(ref: Ref) -> str:
    """Name of the message that carries a ref."""
    if ref.slot.name in _OUTPUT_SLOTS:
        return _OUTPUT
    return (_MTP if ref.stack == MTP else _MESSAGES[ref.slot.scope]).format(layer=ref.layer)

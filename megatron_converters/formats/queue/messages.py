"""Messages of Megatron-LM's loader/saver protocol: which slot is sent in which message, under which keys.

Source: Megatron-LM core_v0.17.1, tools/checkpoint/{convert,loader_base,saver_base}.py. The protocol has no keys for query
and key norms or shared experts; the keys here are this project's, so such models need its loader and its saver.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...model.layouts import GATED, SAME, Layout
from ...model.slots import Ref


@dataclass(frozen=True)
class QueueEntry:
    """Message of a slot (`{layer}` stands for the layer number), its layout there, and the keys of its parts."""

    message: str
    layout: Layout
    keys: tuple[str, ...]
    #: Whether a key holds the parts of all experts, stacked along a first axis.
    stacked: bool = False
    #: Single key that a loader may send instead, with the slot in layout `SAME`; only read, never sent.
    fused: str | None = None

    def received(self, message: Mapping[str, Any]) -> tuple[Layout, tuple[str, ...]]:
        """Layout and keys that a received message uses for the slot."""
        return (SAME, (self.fused,)) if self.fused is not None and self.fused in message else (self.layout, self.keys)


_LAYER = "transformer layer {layer}"
ENTRIES = {
    "word_embeddings": QueueEntry("embeddings", SAME, ("word embeddings",)),
    "input_norm": QueueEntry(_LAYER, SAME, ("input norm weight",)),
    "qkv": QueueEntry(_LAYER, SAME, ("qkv weight",)),
    "qkv_bias": QueueEntry(_LAYER, SAME, ("qkv bias",)),
    "q_norm": QueueEntry(_LAYER, SAME, ("q norm weight",)),
    "k_norm": QueueEntry(_LAYER, SAME, ("k norm weight",)),
    "proj": QueueEntry(_LAYER, SAME, ("dense weight",)),
    "proj_bias": QueueEntry(_LAYER, SAME, ("dense bias",)),
    "mlp_norm": QueueEntry(_LAYER, SAME, ("post norm weight",)),
    "fc1": QueueEntry(_LAYER, GATED, ("mlp l0 weight W", "mlp l0 weight V")),
    "fc1_bias": QueueEntry(_LAYER, GATED, ("mlp l0 bias W", "mlp l0 bias V")),
    "fc2": QueueEntry(_LAYER, SAME, ("mlp l1 weight",)),
    "fc2_bias": QueueEntry(_LAYER, SAME, ("mlp l1 bias",)),
    "moe_norm": QueueEntry(_LAYER, SAME, ("post norm weight",)),
    "router": QueueEntry(_LAYER, SAME, ("router weight",)),
    # Habana's loader sends gate above up as one tensor where there is no CUDA (1.24.0, tools/checkpoint/loader_mixtral_hf.py).
    "expert_fc1": QueueEntry(
        _LAYER, GATED, ("mlp l0 weight W", "mlp l0 weight V"), stacked=True, fused="mlp l0 weight"
    ),
    "expert_fc2": QueueEntry(_LAYER, SAME, ("mlp l1 weight",), stacked=True),
    "shared_fc1": QueueEntry(_LAYER, GATED, ("shared mlp l0 weight W", "shared mlp l0 weight V")),
    "shared_fc2": QueueEntry(_LAYER, SAME, ("shared mlp l1 weight",)),
    "shared_gate": QueueEntry(_LAYER, SAME, ("shared gate weight",)),
    "final_norm": QueueEntry("final norm", SAME, ("weight",)),
    "output_layer": QueueEntry("output layer", SAME, ("weight",)),
}
DONE, EXIT = "done", "exit"


def message_name(ref: Ref) -> str:
    """Name of the message that carries a ref."""
    return ENTRIES[ref.slot.name].message.format(layer=ref.layer)

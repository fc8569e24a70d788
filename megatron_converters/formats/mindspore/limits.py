"""What MindSpore Transformers has no place for: tensors without a name, and those whose values mean something else there.

Source: mindformers 1.6.0 to 2.1.0, parallel_core/training_graph.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...model.layers import ALL_HEADS
from ...model.slots import refs
from ...model.spec import ModelSpec, PerLayer
from .names import EXPERTS, MCORE

#: Kinds of layers whose tensors have no name, by the beginning of their slots' names.
_KINDS = {"delta": "gated DeltaNet", "block": "block experts (BlockFFN)", "indexer": "sparse attention"}


def without_place(spec: ModelSpec) -> Iterator[str]:
    """Parts of a model that cannot be stored."""
    nameless = dict.fromkeys(
        ref.slot.name for ref in refs(spec) if ref.slot.name not in MCORE and ref.slot.name not in EXPERTS
    )
    kinds: dict[str, list[str]] = {}
    for name in nameless:
        kinds.setdefault(_KINDS.get(name.partition("_")[0], "tensors without a name"), []).append(name)
    yield from (f"{kind}: {', '.join(names)}" for kind, names in kinds.items())
    if spec.num_labels == 0:
        yield "a base model without a head: its models have one, so that this would come back as another class"
    if not spec.causal:
        yield "attention to later tokens (is_causal false): its mask hides them"
    if spec.norm.zero_centred:
        yield "norms whose weights are stored minus 1: its norms multiply by the weights themselves"
    if _has(spec, "qk_norm", ALL_HEADS):
        yield "norms of queries and keys over all heads together: its qk_layernorm normalises each head by itself"
    if _has(spec, "parallel_block", True):
        yield "attention and MLP in parallel: its layers run one after the other, with a norm before each"
    if spec.final_logit_softcapping is not None or spec.values.get("attn_logit_softcapping") is not None:
        yield "soft caps of attention scores or logits"
    if _has(spec, "attention_output_gate", True):
        yield "gates of attention's output among the queries"


def _has(spec: ModelSpec, name: str, value: object) -> bool:
    """Whether any layer has this value of a property."""
    found = spec.values.get(name)
    return value in found if isinstance(found, PerLayer) else found == value

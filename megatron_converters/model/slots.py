"""The hub's vocabulary: every kind of tensor a GPT can have, its shape, and how tensor parallelism cuts it.

A slot's tensor is Megatron's whole tensor: unsharded, without vocabulary padding, query groups packed, gate above up.
Shapes and cuts: Megatron-LM core_v0.16.1, megatron/core/transformer/{attention,mlp}.py and core/tensor_parallel/layers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from .spec import ModelSpec


class Shard(Enum):
    """The dimension that tensor parallelism cuts."""

    COLUMN = "dim 0"
    ROW = "dim 1"
    REPLICATED = "not cut"

    @property
    def cuts(self) -> bool:
        """Whether each rank holds a share of its own; otherwise all hold the same."""
        return self is not Shard.REPLICATED


class Scope(Enum):
    """Which pipeline stage holds a slot: the first, its layer's, or the last."""

    FIRST = "first"
    LAYER = "layer"
    LAST = "last"


class Layers(Enum):
    """The layers that have a slot."""

    ALL = "all"
    DENSE = "dense"
    MOE = "mixture of experts"


def _always(_: ModelSpec) -> bool:
    return True


@dataclass(frozen=True, eq=False)
class Slot:
    """One kind of tensor; each kind is one object per process.

    `cols` is None for vectors. `blocks` are stacked along dim 0 and are cut separately.
    """

    name: str
    scope: Scope
    shard: Shard
    rows: Callable[[ModelSpec], int]
    cols: Callable[[ModelSpec], int] | None = None
    present: Callable[[ModelSpec], bool] = _always
    blocks: int = 1
    vocab: bool = False
    layers: Layers = Layers.ALL
    #: Never rounded below the source's precision, since small differences change which expert is chosen.
    keeps_precision: bool = False
    #: One tensor per expert; cut by expert-tensor parallelism instead of tensor parallelism.
    expert: bool = False

    def shape(self, spec: ModelSpec) -> tuple[int, ...]:
        """The whole tensor's shape in elements."""
        return (self.rows(spec),) if self.cols is None else (self.rows(spec), self.cols(spec))

    def matrix(self, spec: ModelSpec) -> tuple[int, int]:
        """The shape as rows and columns; a vector has one column."""
        return self.rows(spec), 1 if self.cols is None else self.cols(spec)


class Ref(NamedTuple):
    """Address of one tensor of a model: the only address that endpoints exchange.

    `layer` counts from 0 over all stages, `expert` over all ranks.
    """

    slot: Slot
    layer: int | None = None
    expert: int | None = None

    def __str__(self) -> str:
        where = "" if self.layer is None else f"layer {self.layer} "
        return where + ("" if self.expert is None else f"expert {self.expert} ") + self.slot.name


def _hidden(spec: ModelSpec) -> int:
    return spec.hidden_size


def _vocab(spec: ModelSpec) -> int:
    return spec.vocab_size


def _query_norm(spec: ModelSpec) -> int:
    return _query(spec) if spec.qk_norm_over_heads else spec.kv_channels


def _key_norm(spec: ModelSpec) -> int:
    return spec.num_query_groups * spec.kv_channels if spec.qk_norm_over_heads else spec.kv_channels


def _query(spec: ModelSpec) -> int:
    return spec.num_attention_heads * spec.kv_channels


def _qkv(spec: ModelSpec) -> int:
    return (spec.num_attention_heads + 2 * spec.num_query_groups) * spec.kv_channels


def _ffn(spec: ModelSpec) -> int:
    return spec.ffn_hidden_size


def _gate_and_up(spec: ModelSpec) -> int:
    return 2 * spec.ffn_hidden_size


def _experts(spec: ModelSpec) -> int:
    return spec.num_experts


def _expert_ffn(spec: ModelSpec) -> int:
    return spec.moe_ffn_hidden_size


def _expert_gate_and_up(spec: ModelSpec) -> int:
    return 2 * spec.moe_ffn_hidden_size


def _shared_ffn(spec: ModelSpec) -> int:
    return spec.shared_ffn_hidden_size


def _shared_gate_and_up(spec: ModelSpec) -> int:
    return 2 * spec.shared_ffn_hidden_size


def _one(_: ModelSpec) -> int:
    return 1


def _has_shared(spec: ModelSpec) -> bool:
    return spec.shared_ffn_hidden_size > 0


_FIRST, _LAYER, _LAST = Scope.FIRST, Scope.LAYER, Scope.LAST
_COLUMN, _ROW, _REPLICATED = Shard.COLUMN, Shard.ROW, Shard.REPLICATED

_DENSE, _MOE = Layers.DENSE, Layers.MOE

_ALL = (
    Slot("word_embeddings", _FIRST, _COLUMN, _vocab, _hidden, vocab=True),
    Slot("input_norm", _LAYER, _REPLICATED, _hidden),
    Slot("qkv", _LAYER, _COLUMN, _qkv, _hidden),
    Slot("qkv_bias", _LAYER, _COLUMN, _qkv, present=lambda spec: spec.qkv_bias),
    Slot("q_norm", _LAYER, _REPLICATED, _query_norm, present=lambda spec: spec.qk_norm),
    Slot("k_norm", _LAYER, _REPLICATED, _key_norm, present=lambda spec: spec.qk_norm),
    Slot("proj", _LAYER, _ROW, _hidden, _query),
    Slot("proj_bias", _LAYER, _REPLICATED, _hidden, present=lambda spec: spec.proj_bias),
    Slot("mlp_norm", _LAYER, _REPLICATED, _hidden, layers=_DENSE),
    Slot("fc1", _LAYER, _COLUMN, _gate_and_up, _hidden, blocks=2, layers=_DENSE),
    Slot("fc1_bias", _LAYER, _COLUMN, _gate_and_up, present=lambda spec: spec.mlp_bias, blocks=2, layers=_DENSE),
    Slot("fc2", _LAYER, _ROW, _hidden, _ffn, layers=_DENSE),
    Slot("fc2_bias", _LAYER, _REPLICATED, _hidden, present=lambda spec: spec.mlp_bias, layers=_DENSE),
    Slot("moe_norm", _LAYER, _REPLICATED, _hidden, layers=_MOE),
    Slot("router", _LAYER, _REPLICATED, _experts, _hidden, layers=_MOE, keeps_precision=True),
    Slot("expert_fc1", _LAYER, _COLUMN, _expert_gate_and_up, _hidden, blocks=2, layers=_MOE, expert=True),
    Slot("expert_fc2", _LAYER, _ROW, _hidden, _expert_ffn, layers=_MOE, expert=True),
    Slot("shared_fc1", _LAYER, _COLUMN, _shared_gate_and_up, _hidden, present=_has_shared, blocks=2, layers=_MOE),
    Slot("shared_fc2", _LAYER, _ROW, _hidden, _shared_ffn, present=_has_shared, layers=_MOE),
    Slot("shared_gate", _LAYER, _REPLICATED, _one, _hidden, present=lambda spec: spec.shared_gate, layers=_MOE),
    Slot("final_norm", _LAST, _REPLICATED, _hidden),
    Slot("output_layer", _LAST, _COLUMN, _vocab, _hidden, present=lambda spec: not spec.tied, vocab=True),
)
SLOTS = {slot.name: slot for slot in _ALL}


def refs(spec: ModelSpec) -> Iterator[Ref]:
    """Every tensor of the model, in the order of Megatron-LM's queue protocol: embeddings, layers, final norm, output."""
    present = [slot for slot in _ALL if slot.present(spec)]
    yield from (Ref(slot) for slot in present if slot.scope is Scope.FIRST)
    for layer in range(spec.num_layers):
        absent = Layers.DENSE if spec.is_moe(layer) else Layers.MOE
        for slot in present:
            if slot.scope is Scope.LAYER and slot.layers is not absent:
                yield from (
                    Ref(slot, layer, expert) for expert in (range(spec.num_experts) if slot.expert else (None,))
                )
    yield from (Ref(slot) for slot in present if slot.scope is Scope.LAST)

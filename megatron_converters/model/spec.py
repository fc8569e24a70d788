"""Model description: kinds of layers, their order, and what all layers share. Also as plain values under Megatron-LM's names.

A property of a layer is named as the field of its record (`model/layers.py`); its value is a `PerLayer` where layers differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..basics.dtypes import DType, dtype_named
from ..basics.errors import ConversionError
from .checks import TOO_MANY_LAYERS, check_cap, check_choice, check_size, check_sizes, check_switches, is_whole, number
from .layers import (
    OF_ATTENTION,
    OF_MLP,
    Attention,
    BlockExperts,
    Feed,
    GatedDelta,
    Latent,
    Layer,
    Mixer,
    Mixture,
    Mlp,
    Norm,
    Rope,
)
from .rotary import RopeScaling
from .sparse_latent import SparseLatent


class PerLayer(tuple[Any, ...]):
    """Values of one property in each layer; None where a layer lacks what has it."""


@dataclass(frozen=True)
class Multipliers:
    """Constants that scale activations: embeddings, the outputs of both blocks, attention scores, and logits.

    `attention_multiplier` None is the usual scale of scores, 1 / sqrt(head dimension).
    """

    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logits_multiplier: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values that are no finite numbers, or 0."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and number(value, field.name) == 0:
                raise ConversionError(f"{field.name} is 0, which would erase the model's activations")


#: Records that a layer can have, by the value of the properties "mixer" and "feed".
MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "latent": Latent,
    "sparse latent": SparseLatent,
    "gated delta": GatedDelta,
}
FEEDS: dict[str, type[Feed]] = {"mlp": Mlp, "moe": Mixture, "block experts": BlockExperts}
_TAGS = {record: name for name, record in (*MIXERS.items(), *FEEDS.items())}


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only model. Layer i is of kind `kinds[order[i]]`, multi-token prediction layer i of kind `kinds[mtp[i]]`.

    A kind may have no layer: it then carries sizes that configurations state although no layer uses them (the dense MLP of
    Mixtral). Sizes count elements; `vocab_size` excludes Megatron's padding rows.
    """

    family: str
    dtype: DType
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    norm: Norm
    kinds: tuple[Layer, ...]
    order: tuple[int, ...]
    mtp: tuple[int, ...] = ()
    multipliers: Multipliers = Multipliers()
    #: Embeddings of absolute positions, added to those of tokens.
    learned_positions: bool = False
    #: Whether attention sees earlier tokens alone, and not later ones.
    causal: bool = True
    tied: bool = False
    #: Bias of the output layer, also where its weight is that of the embeddings.
    head_bias: bool = False
    #: Value at which logits are capped softly, by a tanh; None for none.
    final_logit_softcapping: float | None = None
    #: Linears whose biases are 0, since the family's files have none: of attention, or of the MLP. Megatron-LM has all or none.
    absent_biases: str = ""
    #: Rows of a classifier's head, which takes the place of the output layer; 0 for a base model without any; None for neither.
    num_labels: int | None = None
    initializer_range: float = 0.02
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse sizes that no model can have, so that later code need not check them."""
        check_sizes(self, ("hidden_size", "vocab_size"))
        if not is_whole(self.max_position_embeddings) or self.max_position_embeddings < 1:
            raise ConversionError(
                f"max_position_embeddings is {self.max_position_embeddings!r}; it must be a whole number above 0"
            )
        for name in ("initializer_range", "attention_dropout"):
            number(getattr(self, name), name)
        if self.num_labels not in (None, 0):
            check_sizes(self, ("num_labels",))
        check_switches(self, ("tied", "learned_positions", "causal", "head_bias"))
        check_cap(self, "final_logit_softcapping")
        check_choice(self, "absent_biases", ("", OF_ATTENTION, OF_MLP))
        counts = {kind.feed.num_experts for kind in self.kinds if isinstance(kind.feed, Mixture)}
        if len(counts) > 1:
            raise ConversionError(f"num_experts differs between layers ({sorted(counts)}); that is not supported")
        for names in (("parallel_block", "parallel_norms"), ("block_norms",)):
            if len({tuple(getattr(kind, name) for name in names) for kind in self.used}) > 1:
                raise ConversionError(f"{names[0]} differs between layers; that is not supported")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in dataclasses.fields(self)))

    def __getstate__(self) -> dict[str, Any]:
        """Fields alone: hashes differ between processes."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def num_layers(self) -> int:
        """Number of layers, without those of multi-token prediction."""
        return len(self.order)

    def layer(self, number: int) -> Layer:
        """Kind of a layer."""
        return self.kinds[self.order[number]]

    @cached_property
    def num_experts(self) -> int:
        """Number of experts in each layer that has any; 0 for a dense model."""
        return max((kind.feed.num_experts for kind in self.used if isinstance(kind.feed, Mixture)), default=0)

    @cached_property
    def shapes(self) -> dict[Any, tuple[tuple[int, ...], tuple[int, int]]]:
        """Shapes of slots, and as matrices, by slot and kind of layer, as far as they were asked for; they are asked for often."""
        return {}

    @cached_property
    def addresses(self) -> list[Any]:
        """All refs of the model, once `slots.refs` has made them; they are gone through a dozen times."""
        return []

    @cached_property
    def used(self) -> tuple[Layer, ...]:
        """Kinds that layers have, those of multi-token prediction among them."""
        return tuple(self.kinds[number] for number in dict.fromkeys((*self.order, *self.mtp)))

    @cached_property
    def values(self) -> Mapping[str, Any]:
        """All properties by name, from which `of` makes the spec again."""
        return dict(_model_values(self)) | dict(_layer_values(self))

    def in_layers(self, name: str) -> list[Any]:
        """Values of a property, one for each layer; None where a layer lacks it."""
        value = self.values.get(name)
        return list(value) if isinstance(value, PerLayer) else [value] * self.num_layers

    @classmethod
    def of(cls, **values: Any) -> ModelSpec:
        """Spec with these properties. Layers are attention and an MLP, unless the properties of others are given."""
        return _spec_of(values)

    def replaced(self, **changes: Any) -> ModelSpec:
        """Spec with other values of these properties."""
        return _spec_of({**self.values, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for JSON and for the queue's metadata."""
        return {name: _plain(value) for name, value in self.values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSpec:
        """The inverse of `to_dict`."""
        restored = {name: _restored(value) for name, value in values.items()}
        return _spec_of({**restored, "dtype": dtype_named(values["dtype"])})


_SHARED = ("family", "dtype", "hidden_size", "vocab_size", "max_position_embeddings")
#: Properties of how the blocks of a layer are joined.
_BLOCKS = ("parallel_block", "parallel_norms", "block_norms")
_OPTIONAL = (
    *("learned_positions", "causal", "tied", "head_bias", "final_logit_softcapping"),
    *("absent_biases", "num_labels"),
    *("initializer_range", "attention_dropout"),
)


def names(record: type[Any]) -> list[str]:
    """Names of a record's properties, those of a rotary embedding within it replaced by that one's."""
    fields = [field.name for field in dataclasses.fields(record)]
    return [name for field in fields for name in (["rope", *names(Rope)] if field == "rope" else [field])]


def _model_values(spec: ModelSpec) -> Iterator[tuple[str, Any]]:
    yield from ((name, getattr(spec, name)) for name in _SHARED)
    yield "num_layers", spec.num_layers
    for record in (spec.norm, spec.multipliers):
        yield from ((field.name, getattr(record, field.name)) for field in dataclasses.fields(record))
    yield from ((name, getattr(spec, name)) for name in _OPTIONAL)
    yield "mtp_num_layers", len(spec.mtp)


def _kind_values(kind: Layer) -> dict[str, Any]:
    """Properties of one kind of layer."""
    found: dict[str, Any] = {"mixer": _TAGS[type(kind.mixer)], "feed": _TAGS[type(kind.feed)]}
    rope: Rope | None = getattr(kind.mixer, "rope", None)
    for record in (kind.mixer, kind.feed, *([rope] if rope is not None else [])):
        found |= {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    if "rope" in found:
        found["rope"] = rope is not None
    return found | {name: getattr(kind, name) for name in _BLOCKS}


def _layer_values(spec: ModelSpec) -> Iterator[tuple[str, Any]]:
    """Properties of layers: one value where all layers that have the property agree."""
    kinds = [_kind_values(kind) for kind in spec.kinds]
    ordered = [*(kinds[number] for number in dict.fromkeys(spec.order)), *kinds]
    for name in dict.fromkeys(name for values in ordered for name in values):
        having = [kinds[number][name] for number in dict.fromkeys(spec.order) if name in kinds[number]]
        # Only a kind without layers, or one of multi-token prediction, may have it.
        having = having or [values[name] for values in kinds if name in values][:1]
        if all(value == having[0] for value in having):
            yield name, having[0]
        else:
            yield name, PerLayer(kinds[number].get(name) for number in spec.order)


def _spec_of(values: Mapping[str, Any]) -> ModelSpec:
    unknown = values.keys() - _KNOWN
    if unknown:
        raise TypeError(f"no properties of a model: {sorted(unknown)}")
    # Before all others, since sizes of layers may follow from these.
    count = check_size(values.get("num_layers"), "num_layers", TOO_MANY_LAYERS)
    check_size(values.get("hidden_size"), "hidden_size")
    further = (
        check_size(values["mtp_num_layers"], "mtp_num_layers", TOO_MANY_LAYERS) if values.get("mtp_num_layers") else 0
    )
    kinds: dict[Layer, int] = {}
    by_values: dict[tuple[Any, ...], int] = {}
    per_layer = {name: value for name, value in values.items() if isinstance(value, PerLayer)}
    order = []
    for layer in range(count):
        key = tuple(value[layer] for value in per_layer.values())
        if key not in by_values:
            kind = _kind({**values, **dict(zip(per_layer, key, strict=True))})
            by_values[key] = kinds.setdefault(kind, len(kinds))
        order.append(by_values[key])
    predicting = kinds.setdefault(_predicting([*kinds][order[-1]]), len(kinds)) if further else order[-1]
    for kind in _spare_kinds(values, list(kinds)):
        kinds.setdefault(kind, len(kinds))
    given = {name: values[name] for name in (*_SHARED, *_OPTIONAL) if name in values}
    return ModelSpec(
        **given,
        norm=_record(Norm, values),
        multipliers=_record(Multipliers, values),
        kinds=tuple(kinds),
        order=tuple(order),
        mtp=(predicting,) * further,
    )


def _predicting(last: Layer) -> Layer:
    """Kind of layers of multi-token prediction: that of the last layer, but they share no indexer (Megatron-LM 0.19, GLM-5.2)."""
    if not isinstance(last.mixer, SparseLatent):
        return last
    return dataclasses.replace(last, mixer=dataclasses.replace(last.mixer, shared_indexer=False))


def _kind(values: Mapping[str, Any]) -> Layer:
    """Kind of layer with these properties, none of which is a `PerLayer`."""
    latent = values.get("kv_lora_rank") is not None
    mixer = MIXERS[values.get("mixer") or ("latent" if latent else "attention")]
    feed = FEEDS[values.get("feed") or ("moe" if values.get("num_experts") else "mlp")]
    rope = values.get("rope", values.get("rotary_base") is not None)
    with_rope = {**values, "rope": _record(Rope, values) if rope else None}
    blocks = {name: values[name] for name in _BLOCKS if name in values}
    return Layer(_record(mixer, with_rope), _record(feed, values), **blocks)


def _spare_kinds(values: Mapping[str, Any], kinds: list[Layer]) -> Iterator[Layer]:
    """Kinds without layers, for sizes that are given although no layer uses them."""
    used = {type(kind.feed) for kind in kinds}
    whole = {name: value for name, value in values.items() if not isinstance(value, PerLayer)}
    for record, size in ((Mlp, "ffn_hidden_size"), (Mixture, "num_experts")):
        if record not in used and whole.get(size):
            yield Layer(kinds[0].mixer, _record(record, whole))


def _record(record: type[Any], values: Mapping[str, Any]) -> Any:
    """Record with those of its fields that are given; raises `ConversionError` where a required one is not."""
    fields = dataclasses.fields(record)
    given = {field.name: values[field.name] for field in fields if field.name in values}
    missing = [field.name for field in fields if field.default is dataclasses.MISSING and field.name not in given]
    if missing:
        raise ConversionError(f"{missing[0]} is None; it must be a whole number above 0")
    return record(**given)


_RECORDS = (*MIXERS.values(), *FEEDS.values(), Norm, Multipliers)
_KNOWN = {
    *_SHARED,
    *_OPTIONAL,
    "num_layers",
    "mtp_num_layers",
    "mixer",
    "feed",
    *_BLOCKS,
    *(n for r in _RECORDS for n in names(r)),
}
#: Names of all properties.
PROPERTIES = frozenset(_KNOWN)


def _plain(value: Any) -> Any:
    if isinstance(value, PerLayer):
        return {"per layer": [_plain(item) for item in value]}
    if isinstance(value, RopeScaling):
        return {"scaling": dataclasses.asdict(value)}
    return value.name if isinstance(value, DType) else value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        if "per layer" in value:
            return PerLayer(map(_restored, value["per layer"]))
        return RopeScaling(**value["scaling"])
    return value

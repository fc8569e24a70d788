"""A model as a format stores it: an equal model whose slots hold other values, and whose rotary pairs may be in another order.

Multipliers: e scales embeddings, r the outputs of both blocks, a attention scores, l logits; d is the size of a head. Blocks and
head read the residual stream through norms only, so that it can be scaled by any c: then embeddings are scaled by c e, outputs of
blocks by c r, and the epsilon of all norms by c². With c = 1 / r the outputs of blocks are as they were. Folded into weights,
embeddings are multiplied by c e, query rows, or the norm of queries, by a * sqrt(d), and the final norm by l, divided by c e if it
reads tied embeddings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..basics.errors import Unclear
from ..model.extents import after_blocks
from ..model.layers import LATENT_EPSILON, Attention, Latent, Layer
from ..model.layouts import GROUPED_GATED_QKV, GROUPED_QKV, RowMap, interleaved, interned, row_maps
from ..model.slots import SLOTS, Ref, Slot
from ..model.spec import ModelSpec, Multipliers
from ..model.values import Affine
from .composing import Mask, Piece
from .outline import Fill

_QUERY_SLOTS = ("qkv", "qkv_bias")
#: Slots whose values a block adds to the residual stream.
_OUTPUTS = ("proj", "proj_bias", "delta_out", "fc2", "fc2_bias", "expert_fc2", "expert_fc2_bias", "shared_fc2")
#: Those that do where norms are after blocks.
_POST_NORMS = ("attention_post_norm", "mlp_post_norm")


@dataclass(frozen=True)
class StoredModel:
    """What a format stores otherwise than the hub, and the equal model `spec` that it describes.

    Stored elements are `values` of a slot's; those of queries are multiplied by `queries`. With `halves`, the two rows of a rotary
    pair are half a rotation apart, though neighbours in the hub.
    """

    spec: ModelSpec
    values: Mapping[str, Affine] = field(default_factory=dict)
    queries: Affine | None = None
    halves: bool = False
    _cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def is_usual(self, slot: Slot) -> bool:
        """Whether a slot is stored as in the hub, in whatever cut."""
        return slot.name not in self.values and (
            slot.name not in _QUERY_SLOTS or (self.queries is None and not self.halves)
        )

    def fill(self, ref: Ref, fill: Fill) -> Fill:
        """Fill as this format stores the ref."""
        name = ref.slot.name
        if self.is_usual(ref.slot):
            return fill
        if name in self.values:
            return fill._replace(value=self.values[name])
        kind = ref.kind(self.spec)
        if self.halves:
            fill = fill._replace(rows=self._stored(ref, kind, fill.rows, _order))
        if self.queries is None:
            return fill
        return fill._replace(value=self.queries, only=self._stored(ref, kind, fill.rows, _is_query))

    def pieces(self, ref: Ref, piece: Piece) -> list[Piece]:
        """Pieces of the hub's slot from one that this format stores."""
        name = ref.slot.name
        if self.is_usual(ref.slot):
            return [piece]
        if name in self.values:
            return [dataclasses.replace(piece, value=self.values[name].inverse())]
        kind = ref.kind(self.spec)
        if self.halves:
            piece = dataclasses.replace(piece, rows=self._stored(ref, kind, piece.rows, _order))
        if self.queries is None:
            return [piece]
        query = self._stored(ref, kind, piece.rows, _is_query)
        rows = [interned(np.where(chosen, piece.rows, -1)) for chosen in (query, ~query)]
        return [
            dataclasses.replace(piece, rows=rows[0], value=self.queries.inverse()),
            dataclasses.replace(piece, rows=rows[1]),
        ]

    def _stored(self, ref: Ref, kind: Layer, rows: RowMap, table_of: Any) -> Any:
        """Entry of a table, which has one for each row of the slot, for each of these rows; -1 stays -1 or is false."""
        key = table_of, ref.kind_number(self.spec), id(rows)
        if key not in self._cache:
            table = table_of(ref, self.spec, kind)
            padded = np.append(table, table.dtype.type(-1 if table.dtype == np.int64 else 0))
            found = padded[rows]
            self._cache[key] = (
                (interned(found) if found.dtype == np.int64 else found),
                rows,
            )  # keeps the id of the rows valid
        return self._cache[key][0]


def _parts(ref: Ref, spec: ModelSpec, kind: Layer, *, halves: bool) -> tuple[RowMap, ...]:
    """Rows of queries, keys and values, with their rotary pairs as the slot has them, or half a rotation apart."""
    mixer = kind.mixer
    gated = isinstance(mixer, Attention) and mixer.attention_output_gate
    layout = GROUPED_GATED_QKV if gated else GROUPED_QKV
    return row_maps(interleaved(layout) if halves else layout, SLOTS["qkv"], spec, kind)


def _order(ref: Ref, spec: ModelSpec, kind: Layer) -> RowMap:
    """Hub's row of each stored row, where rotary pairs are stored half a rotation apart."""
    order = np.empty(ref.slot.size(spec, kind).rows, np.int64)
    for hub, stored in zip(_parts(ref, spec, kind, halves=False), _parts(ref, spec, kind, halves=True), strict=True):
        order[stored] = hub
    return order


def _is_query(ref: Ref, spec: ModelSpec, kind: Layer) -> Mask:
    """Whether each row is a query's."""
    mask = np.zeros(ref.slot.size(spec, kind).rows, np.bool_)
    mask[_parts(ref, spec, kind, halves=False)[0]] = True
    return mask


# -- multipliers


def has_multipliers(spec: ModelSpec) -> bool:
    """Whether any constant scales activations otherwise than in a Llama."""
    usual = dataclasses.replace(spec.multipliers, attention_multiplier=None) == Multipliers()
    return not usual or not math.isclose(query_factor(spec), 1.0, rel_tol=1e-12)


def query_factor(spec: ModelSpec) -> float:
    """Scale of attention scores, divided by the usual one."""
    scale = spec.multipliers.attention_multiplier
    if scale is None:
        return 1.0
    mixers = [kind.mixer for kind in spec.used]
    sizes = {mixer.kv_channels for mixer in mixers if isinstance(mixer, Attention)}
    if len(sizes) != 1 or any(isinstance(mixer, Latent) for mixer in mixers):
        raise Unclear("a scale of attention scores for heads of several sizes is not supported")
    return scale * math.sqrt(sizes.pop())


def stream_is_free(spec: ModelSpec) -> bool:
    """Whether every norm reads the residual stream, so that its epsilon may change with the scale of that."""
    return not spec.values.get("qk_norm") and not any(
        isinstance(kind.mixer, Latent) or after_blocks(kind) for kind in spec.used
    )


def without_residual_multiplier(spec: ModelSpec) -> ModelSpec:
    """Equal model, with the same weights, whose residual multiplier is 1; only for a stream that is free."""
    residual = spec.multipliers.residual_multiplier
    if residual == 1:
        return spec
    return spec.replaced(
        embedding_multiplier=spec.multipliers.embedding_multiplier / residual,
        residual_multiplier=1.0,
        norm_epsilon=spec.norm.norm_epsilon / residual**2,
    )


def folded(model: StoredModel) -> StoredModel:
    """Multipliers as part of weights: of embeddings, queries and final norm, and of blocks' outputs where they must be."""
    spec = without_residual_multiplier(model.spec) if stream_is_free(model.spec) else _with_latents_epsilon(model.spec)
    held = spec.multipliers
    embedding, query = held.embedding_multiplier, query_factor(spec)
    norm = held.logits_multiplier / (embedding if spec.tied else 1.0)
    values = dict(_folds(spec, embedding, norm))
    normed = bool(spec.values.get("qk_norm"))  # a norm of queries undoes a scale of what it reads
    if normed:
        values |= {"q_norm": _of_norm(spec, query), "q_norm_bias": Affine(query)}
    values = {name: value for name, value in values.items() if not value.is_identity}
    plain = {multiplier.name: multiplier.default for multiplier in dataclasses.fields(Multipliers)}
    return dataclasses.replace(
        model, spec=spec.replaced(**plain), values=values, queries=None if query == 1 or normed else Affine(query)
    )


def _with_latents_epsilon(spec: ModelSpec) -> ModelSpec:
    """Equal model, but for the residual stream's scale c, by which all norms have the epsilon that those of latents have."""
    if not any(isinstance(kind.mixer, Latent) for kind in spec.used) or spec.norm.norm_epsilon <= 0:
        return spec
    scale = math.sqrt(LATENT_EPSILON / spec.norm.norm_epsilon)
    return spec.replaced(
        embedding_multiplier=scale * spec.multipliers.embedding_multiplier,
        residual_multiplier=scale * spec.multipliers.residual_multiplier,
        norm_epsilon=LATENT_EPSILON,
    )


def _folds(spec: ModelSpec, embedding: float, norm: float) -> Iterator[tuple[str, Affine]]:
    yield "word_embeddings", Affine(embedding)
    if spec.learned_positions:
        yield "position_embeddings", Affine(embedding)
    if any(map(after_blocks, spec.used)):  # they undo a scale of what they read
        yield from ((name, _of_norm(spec, spec.multipliers.residual_multiplier)) for name in _POST_NORMS)
        yield from ((f"{name}_bias", Affine(spec.multipliers.residual_multiplier)) for name in _POST_NORMS)
    else:
        yield from ((name, Affine(spec.multipliers.residual_multiplier)) for name in _OUTPUTS)
    yield "final_norm", _of_norm(spec, norm)
    yield "final_norm_bias", Affine(norm)
    yield "output_layer_bias", Affine(spec.multipliers.logits_multiplier)


def _of_norm(spec: ModelSpec, scale: float) -> Affine:
    """Scale of the weights of a norm; those that are stored minus 1 are scaled as a whole: (1 + w) s - 1."""
    return Affine(scale, scale - 1 if spec.norm.zero_centred else 0.0)

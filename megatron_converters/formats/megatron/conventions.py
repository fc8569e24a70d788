"""How a checkpoint stores slots otherwise than the hub: by release, and where multipliers are folded into weights.

Multipliers: e scales embeddings, r the outputs of both blocks, a attention scores, l logits; d is the size of a head. The residual
stream is read through norms only, so that it can be scaled by 1 / r: then embeddings are scaled by e / r, outputs of blocks by 1,
and the epsilon of all norms is divided by r². Megatron-LM's muP (0.17 on) has a multiplier for embeddings, scores and logits;
before, embeddings are multiplied by e / r, query rows by a * sqrt(d), and the final norm by l, and by r / e if it reads tied
embeddings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...basics.errors import ConversionError, Unclear, UsageError
from ...conversion.composing import Mask, Piece
from ...conversion.outline import Fill
from ...model.layers import Attention, Latent, Layer
from ...model.layouts import GROUPED_GATED_QKV, GROUPED_QKV, RowMap, interleaved, interned, row_maps
from ...model.slots import SLOTS, Ref, Shard, Slot
from ...model.spec import ModelSpec, Multipliers
from ...model.values import Affine
from .names import MTP_MODULES
from .releases import NEWEST, before

#: Release from which the down projections of multi-latent attention are not cut; earlier ones cut their rows.
WHOLE_DOWN_PROJECTIONS = "0.14"
#: Cuts of slots, by name, in the rank files of earlier releases.
CUT_DOWN_PROJECTIONS = dict.fromkeys(("q_down", "kv_down"), Shard.COLUMN)
#: Release that renamed the module that holds the layer of multi-token prediction.
MTP_MODEL_LAYER = "0.17"
#: Release from which interleaved rotary embeddings work together with the fused kernel, which is on by default.
_INTERLEAVED = "0.14"
#: Release from which muP's multipliers can be set.
_MUP = "0.17"
FLAGS, FOLD = "flags", "fold"
#: Attributes of `args`, this project's own, that record what is stored otherwise than in Hugging Face's files.
FOLDED, HALVES = "multipliers_folded", "rotary_halves"
_QUERY_SLOTS = ("qkv", "qkv_bias")


@dataclass(frozen=True)
class Conventions:
    """What a checkpoint stores otherwise than the hub, and the model `spec` that its args describe.

    `shards` has the cuts of slots that are not the hub's. Stored elements are `values` of a slot's; those of queries are multiplied
    by `queries`. With `halves`, the two rows of a rotary pair are half a rotation apart, though neighbours in the hub. `marks` are
    attributes of args that record this.
    """

    spec: ModelSpec
    shards: Mapping[str, Shard] = field(default_factory=dict)
    mtp_module: str = MTP_MODULES[0]
    values: Mapping[str, Affine] = field(default_factory=dict)
    queries: Affine | None = None
    halves: bool = False
    marks: Mapping[str, Any] = field(default_factory=dict)
    _cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def is_usual(self, slot: Slot) -> bool:
        """Whether a slot is stored as in the hub, in whatever cut."""
        return slot.name not in self.values and (
            slot.name not in _QUERY_SLOTS or (self.queries is None and not self.halves)
        )

    def fill(self, ref: Ref, fill: Fill) -> Fill:
        """Fill as this checkpoint stores the ref."""
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
        """Pieces of the hub's slot from one that this checkpoint stores."""
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


def conventions(spec: ModelSpec, release: str = NEWEST, mup: str | None = None) -> Conventions:
    """Conventions for writing a model for a release. `mup` is FLAGS or FOLD; None takes flags where the release has them."""
    cut = before(release, WHOLE_DOWN_PROJECTIONS)
    found = Conventions(spec, CUT_DOWN_PROJECTIONS if cut else {}, MTP_MODULES[before(release, MTP_MODEL_LAYER)])
    if spec.values.get("rotary_interleaved") and before(release, _INTERLEAVED):
        found = _with_halves(found)
    if not has_multipliers(spec):
        if mup is not None:
            raise UsageError(f"--mup {mup}: this model has no multipliers; leave it out")
        return found
    if mup == FLAGS and before(release, _MUP):
        raise UsageError(f"--mup {FLAGS}: Megatron-LM {release} has no muP; use --mup {FOLD}")
    return _folded(found) if (mup or (FOLD if before(release, _MUP) else FLAGS)) == FOLD else _with_flags(found)


def conventions_of(args: Mapping[str, Any], spec: ModelSpec) -> Conventions:
    """Conventions of a checkpoint with these args that holds this model; raises `Unclear` where they do not tell.

    A training run that started from a conversion has lost the record, but its epsilon tells whether multipliers are folded.
    """
    found = Conventions(spec)
    if args.get(HALVES):
        found = _with_halves(found)
    if not has_multipliers(spec):
        return found
    if args.get("use_mup"):
        return _with_flags(found)
    epsilon = args.get("layernorm_epsilon", args.get("norm_epsilon"))
    folded = _folded(found)
    if args.get(FOLDED) or epsilon == folded.spec.norm.norm_epsilon != spec.norm.norm_epsilon:
        return folded
    raise Unclear(
        "the model has multipliers, and the checkpoint's args say neither that they are set (use_mup) nor that weights hold them "
        f"({FOLDED}); set one of the two in the args"
    )


def has_multipliers(spec: ModelSpec) -> bool:
    """Whether any constant scales activations otherwise than in a Llama."""
    usual = dataclasses.replace(spec.multipliers, attention_multiplier=None) == Multipliers()
    return not usual or not math.isclose(_query_factor(spec), 1.0, rel_tol=1e-12)


def _query_factor(spec: ModelSpec) -> float:
    """Scale of attention scores, divided by the usual one."""
    scale = spec.multipliers.attention_multiplier
    if scale is None:
        return 1.0
    mixers = [kind.mixer for kind in spec.used]
    sizes = {mixer.kv_channels for mixer in mixers if isinstance(mixer, Attention)}
    if len(sizes) != 1 or any(isinstance(mixer, Latent) for mixer in mixers):
        raise Unclear("a scale of attention scores for heads of several sizes is not supported")
    return scale * math.sqrt(sizes.pop())


def _with_halves(found: Conventions) -> Conventions:
    spec = found.spec
    return dataclasses.replace(
        found, spec=spec.replaced(rotary_interleaved=False), halves=True, marks={**found.marks, HALVES: True}
    )


def _with_flags(found: Conventions) -> Conventions:
    """Multipliers as Megatron-LM's arguments say them: the residual one is part of the others."""
    return dataclasses.replace(found, spec=_scaled_stream(found.spec))


def _scaled_stream(spec: ModelSpec) -> ModelSpec:
    """Equal model whose residual multiplier is 1."""
    residual = spec.multipliers.residual_multiplier
    if residual == 1:
        return spec
    if spec.values.get("qk_norm") or any(isinstance(kind.mixer, Latent) for kind in spec.used):
        raise ConversionError(
            f"a residual multiplier of {residual:g} together with norms of queries, keys or latents: Megatron-LM has one epsilon "
            "for all norms; not supported"
        )
    return spec.replaced(
        embedding_multiplier=spec.multipliers.embedding_multiplier / residual,
        residual_multiplier=1.0,
        norm_epsilon=spec.norm.norm_epsilon / residual**2,
    )


def _folded(found: Conventions) -> Conventions:
    """Multipliers as part of embeddings, queries and final norm."""
    stream = _scaled_stream(found.spec)
    held = stream.multipliers
    embedding, query = held.embedding_multiplier, _query_factor(stream)
    norm = held.logits_multiplier / (embedding if stream.tied else 1.0)
    values = {name: value for name, value in _folds(stream, embedding, norm) if not value.is_identity}
    plain = {multiplier.name: multiplier.default for multiplier in dataclasses.fields(Multipliers)}
    return dataclasses.replace(
        found,
        spec=stream.replaced(**plain),
        values=values,
        queries=None if query == 1 else Affine(query),
        marks={**found.marks, FOLDED: True},
    )


def _folds(spec: ModelSpec, embedding: float, norm: float) -> Iterator[tuple[str, Affine]]:
    yield "word_embeddings", Affine(embedding)
    if spec.learned_positions:
        yield "position_embeddings", Affine(embedding)
    # A norm that is stored minus 1 is scaled as a whole: (1 + w) s - 1.
    yield "final_norm", Affine(norm, norm - 1 if spec.norm.zero_centred else 0.0)
    yield "final_norm_bias", Affine(norm)

"""How a checkpoint stores slots otherwise than the hub: by release, and where a model's multipliers are.

Megatron-LM's muP (0.17 on) has a multiplier for embeddings, scores and logits, and the residual one can be part of these: no weight
changes. For earlier releases they are folded into weights. MindSpeed-LLM has arguments of its own for them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...basics.errors import ConversionError, UnclearMultipliers, UsageError
from ...basics.quantities import shortest
from ...conversion.stored_model import (
    StoredModel,
    folded,
    has_multipliers,
    query_factor,
    stream_is_free,
    without_residual_multiplier,
)
from ...model.slots import Shard
from ...model.spec import ModelSpec, Multipliers
from .names import MTP_MODULES
from .options import FLAGS, FOLD, RAW
from .releases import NEWEST, before
from .rows_positions import scaling_of

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
#: Attributes of `args`, this project's own, that record what is stored otherwise than in Hugging Face's files.
FOLDED, HALVES = "multipliers_folded", "rotary_halves"


@dataclass(frozen=True)
class Conventions(StoredModel):
    """What a checkpoint stores otherwise than the hub, and the model `spec` that its args describe.

    `shards` has the cuts of slots that are not the hub's. `marks` are attributes of args that record what is otherwise. `mup` says
    where multipliers are, if the model has any.
    """

    shards: Mapping[str, Shard] = field(default_factory=dict)
    mtp_module: str = MTP_MODULES[0]
    marks: Mapping[str, Any] = field(default_factory=dict)
    mup: str | None = None


def conventions(spec: ModelSpec, release: str = NEWEST, mup: str | None = None) -> Conventions:
    """Conventions for writing a model for a release. `mup` is FLAGS, FOLD or RAW; None takes flags where they can say it."""
    cut = before(release, WHOLE_DOWN_PROJECTIONS)
    found = Conventions(
        spec,
        shards=CUT_DOWN_PROJECTIONS if cut else {},
        mtp_module=MTP_MODULES[before(release, MTP_MODEL_LAYER)],
    )
    if spec.values.get("rotary_interleaved") and before(release, _INTERLEAVED):
        found = _with_halves(found)
    if not has_multipliers(spec):
        if mup is not None:
            raise UsageError(f"--mup {mup}: this model has no multipliers; leave it out")
        return found
    if mup == FLAGS and before(release, _MUP):
        raise UsageError(f"--mup {FLAGS}: Megatron-LM {release} has no muP; use --mup {FOLD}")
    usual = FLAGS if _flags_suffice(spec) and not before(release, _MUP) else FOLD
    return _WAYS[mup or usual](found)


def conventions_of(args: Mapping[str, Any], spec: ModelSpec, mup: str | None = None) -> Conventions:
    """Conventions of a checkpoint with these args that holds this model; raises `UnclearMultipliers` where they do not tell.

    `mup` says where multipliers are if the args do not: those of a training run that started from a conversion have lost the
    record, though its epsilon may tell whether they are folded.
    """
    found = Conventions(spec)
    if args.get(HALVES):
        found = _with_halves(found)
    if not has_multipliers(spec):
        if mup is not None:
            raise UsageError(
                f"--mup {mup}: the checkpoint is described as a model without multipliers, of the {spec.family} family; leave it "
                "out, or give another configuration, of the model that it is, with --hf-config DIR"
            )
        return found
    told = _told(args, found) or mup
    if told is None:
        raise UnclearMultipliers(
            "the model has multipliers, and the checkpoint's args do not say where they are; say it with --mup: flags (muP's, "
            "weights as in Hugging Face's files), raw (the same weights, scaled by MindSpeed-LLM or other code) or fold (weights "
            "hold them)"
        )
    return _WAYS[told](found)


def _told(args: Mapping[str, Any], found: Conventions) -> str | None:
    """Where multipliers are, by the args; None if these do not tell."""
    if args.get("use_mup"):
        return FLAGS
    if args.get("scale_emb") is not None:
        return RAW
    epsilon = args.get("layernorm_epsilon", args.get("norm_epsilon"))
    if args.get(FOLDED) or epsilon == folded(found).spec.norm.norm_epsilon != found.spec.norm.norm_epsilon:
        return FOLD
    return None


def _with_halves(found: Conventions) -> Conventions:
    spec = found.spec
    return dataclasses.replace(
        found, spec=spec.replaced(rotary_interleaved=False), halves=True, marks={**found.marks, HALVES: True}
    )


def _flags_suffice(spec: ModelSpec) -> bool:
    """Whether muP's flags can say all multipliers: the residual one changes the epsilon, which must then be the stream's alone."""
    return spec.multipliers.residual_multiplier == 1 or stream_is_free(spec)


def _with_flags(found: Conventions) -> Conventions:
    """Multipliers as Megatron-LM's arguments say them: the residual one is part of the others."""
    if not _flags_suffice(found.spec):
        raise ConversionError(
            f"--mup {FLAGS}: a residual multiplier of {found.spec.multipliers.residual_multiplier:g} together with norms of "
            f"queries, keys or latents, for which Megatron-LM has the same epsilon as for all norms; use --mup {FOLD}"
        )
    return dataclasses.replace(found, spec=without_residual_multiplier(found.spec), mup=FLAGS)


def _folded(found: Conventions) -> Conventions:
    changed = folded(found)
    return dataclasses.replace(
        found,
        spec=changed.spec,
        values=changed.values,
        queries=changed.queries,
        marks={**found.marks, FOLDED: True},
        mup=FOLD,
    )


def _raw(found: Conventions) -> Conventions:
    """Weights as they are, and MindSpeed-LLM's arguments for what scales activations (its tasks/…/arguments, 2.0 on)."""
    spec, held = found.spec, found.spec.multipliers
    if not math.isclose(query_factor(spec), 1.0, rel_tol=1e-12):
        raise ConversionError(
            f"--mup {RAW}: MindSpeed-LLM has no argument for the scale of attention scores; use another"
        )
    root, hidden = math.sqrt(spec.num_layers), spec.hidden_size
    depth = shortest(held.residual_multiplier * root, lambda depth: depth / root == held.residual_multiplier)
    base = shortest(held.logits_multiplier * hidden, lambda base: base / hidden == held.logits_multiplier)
    marks = {"scale_emb": held.embedding_multiplier, "scale_depth": depth, "dim_model_base": base, **_long_rope(spec)}
    plain: dict[str, Any] = {multiplier.name: multiplier.default for multiplier in dataclasses.fields(Multipliers)}
    if scaling_of(spec, "longrope") is not None:
        plain["rope_scaling"] = None
    return dataclasses.replace(found, spec=spec.replaced(**plain), marks={**found.marks, **marks}, mup=RAW)


def _long_rope(spec: ModelSpec) -> dict[str, Any]:
    scaling = scaling_of(spec, "longrope")
    if scaling is None:
        return {}
    return {
        "rope_scaling_type": scaling.kind,
        "short_factor": ",".join(map(str, scaling.short_factor)),
        "long_factor": ",".join(map(str, scaling.long_factor)),
        "rope_scaling_original_max_position_embeddings": scaling.original_max_position_embeddings,
    }


_WAYS = {FLAGS: _with_flags, FOLD: _folded, RAW: _raw}

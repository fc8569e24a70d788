"""Choice of how a checkpoint stores what releases store differently: experts, and the down projections of latents."""

from __future__ import annotations

from ...basics.errors import UsageError
from ...model.layers import Latent
from ...model.slots import SLOTS
from ...model.spec import ModelSpec
from .names import EXPERTS
from .options import FUSED, GROUPED, SEPARATE, SEQUENTIAL, SINGLE

_ENGINE = "transformer_engine"
_REMEDY = f"leave it out, or write names with --saver-transformer-impl {_ENGINE}"


def expert_layout(asked: str | None, spec: ModelSpec, impl: str) -> str:
    """Layout of experts, by default that which Megatron-LM trains fastest; raises `UsageError` if it cannot hold the model's."""
    layout = asked or (GROUPED if impl == _ENGINE else SEQUENTIAL)
    nameless = [slot for slot in SLOTS.values() if slot.expert and slot.name not in EXPERTS[layout]]
    if any(slot.extent(spec, kind) is not None for kind in spec.used for slot in nameless):
        raise UsageError(
            f"--expert-layout {layout}: experts that are stored so have no biases, and those of this model have; use "
            f"{SEQUENTIAL} or {GROUPED}"
        )
    if layout == SINGLE and impl != _ENGINE:
        raise UsageError(f"--expert-layout {SINGLE}: {_ENGINE} alone stores experts so; {_REMEDY}")
    return layout


def mla_layout(asked: str | None, spec: ModelSpec, impl: str) -> str:
    """Layout of down projections, by default two tensors; raises `UsageError` for a model that has no two of them to join.

    Source: Megatron-LM core_v0.19.0, core/models/gpt/gpt_layer_specs.py; the specs of sparse attention do not join them.
    """
    if asked != FUSED:
        return SEPARATE
    latent = [kind.mixer for kind in spec.used if isinstance(kind.mixer, Latent)]
    if not latent or any(type(mixer) is not Latent or mixer.q_lora_rank is None for mixer in latent):
        raise UsageError(
            f"--mla-layout {FUSED}: it stores the down projections of queries with those of keys and values, and this model has "
            f"no multi-latent attention with both, or has an indexer; use {SEPARATE}"
        )
    if impl != _ENGINE:
        raise UsageError(f"--mla-layout {FUSED}: {_ENGINE} alone stores them so; {_REMEDY}")
    return FUSED

"""A model as another family has it: MiniCPM as a Llama, for example, with multipliers in its weights."""

from __future__ import annotations

import dataclasses

from ...assets.origin import Origin
from ...basics.errors import ConversionError, UsageError
from ...conversion.stored_model import StoredModel, folded, has_multipliers
from ...families import FAMILIES
from ...families.config_json import config_from_spec
from ...model.spec import ModelSpec

#: Keys of config.json that hold for the same model in any family.
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def stored_as(spec: ModelSpec, name: str) -> StoredModel:
    """Model in the family `name`, as it is or with folded multipliers; raises `UsageError` where the family has no such model."""
    if name not in FAMILIES:
        raise UsageError(f"--as {name}: there is no such family; known are {', '.join(FAMILIES)}")
    model = StoredModel(spec)
    reasons = []
    for candidate in (model, *([folded(model)] if has_multipliers(spec) else [])):
        found = dataclasses.replace(candidate, spec=candidate.spec.replaced(family=name))
        try:
            config_from_spec(found.spec)
        except ConversionError as error:
            reasons.append(str(error))
        else:
            return found
    raise UsageError(f"--as {name}: the {spec.family} model cannot be one of that family: {reasons[-1]}; leave it out")


def origin_elsewhere(origin: Origin, stored: StoredModel, family: str) -> Origin:
    """What travels beside the weights of a model whose family changes: its code does not, and of its configuration token ids."""
    config = origin.hf_config or {}
    changes = (
        "; multipliers are folded into weights, which rounds them"
        if stored.values or stored.queries is not None
        else ""
    )
    return dataclasses.replace(
        origin,
        hf_config={key: config[key] for key in _TOKENS if key in config} if origin.hf_config is not None else None,
        code_files={},
        notes=[*origin.notes, f"written as a {stored.spec.family} model, not {family}{changes}"],
    )

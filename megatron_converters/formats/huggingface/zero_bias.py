"""Output biases that a family's config.json has only together with others, as zeros of a model that has none."""

from __future__ import annotations

from ...basics.errors import ConversionError
from ...conversion.zero_bias import SLOT
from ...families import FAMILIES
from ...families.config_json import config_from_spec
from ...model.spec import ModelSpec


def with_zero_bias(spec: ModelSpec) -> ModelSpec:
    """Spec with output biases where the family's config.json can say the model only with them; otherwise as it is."""
    if spec.values.get("qkv_bias") is not True or spec.values.get(SLOT) or SLOT not in FAMILIES[spec.family].tensors:
        return spec
    with_bias = spec.replaced(**{SLOT: True})
    return with_bias if _says(with_bias) and not _says(spec) else spec


def _says(spec: ModelSpec) -> bool:
    """Whether the family's config.json can say a model."""
    try:
        config_from_spec(spec)
    except ConversionError:
        return False
    return True

"""Models that Megatron-LM cannot compute are refused with what it lacks, by the names that transformers has for them."""

from __future__ import annotations

import pytest
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from megatron_converters.basics.errors import ConversionError
from megatron_converters.families import FAMILIES
from megatron_converters.families.config_json import spec_from_config
from megatron_converters.families.refused import _REASONS

#: Names that only code which is published with models has.
REMOTE = {
    *("minicpm_sala", "MiniCPMSALAForCausalLM", "hunyuan", "phi3small", "phi4mm", "nemotron-nas", "openelm", "mpt"),
    *("kimi_linear", "bailing_moe_linear", "bailing_hybrid"),
}


@pytest.mark.parametrize("model_type", sorted(_REASONS.keys() & CONFIG_MAPPING_NAMES.keys()))
def test_classes_of_transformers_are_refused_with_the_reason(model_type: str) -> None:
    config = AutoConfig.for_model(model_type).to_dict()
    with pytest.raises(ConversionError) as raised:
        spec_from_config({**config, "model_type": model_type})
    assert (
        str(raised.value) == f"config.json names {model_type}, {_REASONS[model_type]}, so that it cannot be converted"
    )


def test_every_name_is_one_that_models_have() -> None:
    assert _REASONS.keys() - CONFIG_MAPPING_NAMES.keys() <= REMOTE
    supported = {name for family in FAMILIES.built_in.values() for name in (*family.model_types, *family.architectures)}
    assert _REASONS.keys().isdisjoint(supported)

"""config.json of every family against its class in transformers: defaults of absent keys, and drawn variants of all keys.

A family is covered by being built in, for each of its model types that `AutoConfig` knows; those of remote code it does not.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from megatron_converters.basics.errors import ConversionError
from megatron_converters.families import FAMILIES
from megatron_converters.families.config_json import differences, spec_from_config
from megatron_converters.families.rules_attention import FULL, SLIDING
from megatron_converters.families.table import Family
from megatron_converters.families.typical import required_config
from megatron_converters.model.spec import ModelSpec

Config = dict[str, Any]
#: Stands for the default of a key that is another name of one.
ALIAS = "another name"
#: Variants of all model types together, so that more families take no more time.
VARIANTS = 3000
#: Keys by model type that mean something to us, as published files mean it, and nothing to the class in transformers.
OTHERWISE = {
    "nemotron": ("rope_percent", "rope_percentage"),
    "glm4_moe_lite": ("first_k_dense_replace",),
    "hy_v3": ("first_k_dense_replace",),
}
#: Keys that a variant changes at most.
_CHANGED = 4
_ORIGINAL = {"original_max_position_embeddings": 2048}
#: Scalings of rotary embeddings, without the key that names the kind, which has an older and a newer spelling.
_SCALINGS: dict[str, Config] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_ORIGINAL},
    "yarn": {"factor": 4.0, **_ORIGINAL, "beta_fast": 16},
    "longrope": {"short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0], **_ORIGINAL},
}
_ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2")


def model_types() -> Iterator[tuple[Family, str]]:
    """Families and their model types that transformers has a class for."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    for family in FAMILIES.built_in.values():
        yield from ((family, name) for name in (family.model_type, *family.aliases) if name in CONFIG_MAPPING_NAMES)


TYPES = list(model_types())
IDS = [model_type for _, model_type in TYPES]
EACH = VARIANTS // len(TYPES)


def base(family: Family, model_type: str) -> Config:
    return {**required_config(family), "model_type": model_type}


def by_transformers(config: Config) -> Config | None:
    """What transformers reads of a config.json, with all defaults; None where it refuses."""
    from transformers import AutoConfig

    try:
        found = AutoConfig.for_model(**json.loads(json.dumps(config)))
        return {**json.loads(json.dumps(found.to_dict())), "architectures": config["architectures"]}
    except Exception:  # noqa: BLE001 - each class checks in its own way, or fails in computing
        return None


def by_us(config: Config) -> ModelSpec | None:
    """Our reading; None where it is refused."""
    try:
        return spec_from_config(config)
    except ConversionError:
        return None


@cache
def all_keys(family_name: str, model_type: str) -> Config:
    """Every key of the class with its default, and those of our rules that it does not write."""
    from transformers import CONFIG_MAPPING

    family = FAMILIES[family_name]
    written = by_transformers(base(family, model_type))
    assert written is not None
    claimed = {key: None for rule in family.rules for key in rule.keys}
    ours = {key: value for key, value in written.items() if key in claimed}
    others = dict.fromkeys(CONFIG_MAPPING[model_type].attribute_map, ALIAS)
    known = {**claimed, **ours, "layer_types": None, "is_causal": True, **others}
    return {key: value for key, value in known.items() if key not in OTHERWISE.get(model_type, ())}


@pytest.mark.parametrize(("family", "model_type"), TYPES, ids=IDS)
def test_absent_keys_have_the_defaults_of_the_class(family: Family, model_type: str) -> None:
    required = base(family, model_type)
    written = by_transformers(required)
    assert written is not None
    assert differences(spec_from_config(required), spec_from_config(written)) == []


@pytest.mark.parametrize(("family", "model_type"), TYPES, ids=IDS)
def test_variants_mean_what_they_mean_to_transformers(family: Family, model_type: str) -> None:
    draw, results, faults = random.Random(f"variants of {model_type}"), Counter[str](), []
    for _ in range(EACH):
        config, changed = variant(draw, family, model_type)
        ours, written = by_us(config), by_transformers(config)
        if ours is None or written is None:
            results["refused"] += 1
            continue
        again = by_us(written)
        different = ["refused once written out"] if again is None else differences(ours, again)
        results["read"] += 1
        faults += [(changed, different)] if different else []
    assert faults == []
    assert results["read"] >= EACH / 5, results  # fewer would compare next to nothing


def variant(draw: random.Random, family: Family, model_type: str) -> tuple[Config, Config]:
    """config.json in which some keys have other values, and these keys."""
    known = all_keys(family.name, model_type)
    start = base(family, model_type)
    names = draw.sample(sorted(known), draw.randint(1, min(_CHANGED, len(known))))
    changed = {name: value_of(draw, name, known[name], start) for name in names}
    return {**start, **changed}, changed


def value_of(draw: random.Random, name: str, default: Any, config: Config) -> Any:
    """Another value of a key: null, or one of the kind that the class's default has."""
    if default is ALIAS:  # a null would take the size of the other away
        return draw.choice((1, 2, 4, 8))
    if draw.random() < 0.15:
        return None
    if name in ("rope_scaling", "rope_parameters"):
        return rope(draw, name)
    if name == "layer_types":
        return [draw.choice((FULL, FULL, SLIDING)) for _ in range(config.get("num_hidden_layers", 4))]
    if isinstance(default, bool):
        return draw.choice((True, False))
    if isinstance(default, int):
        return draw.choice((0, 1, 2, 4, 8, 32, default))
    if isinstance(default, float):
        return draw.choice((0.0, 0.25, 0.5, 1.0, 2.0, default))
    if isinstance(default, str):
        return draw.choice((*_ACTIVATIONS, default))
    if isinstance(default, list):
        return draw.choice(([], [0], [1, 2], default))
    return draw.choice((1, 2, 4, 8))


def rope(draw: random.Random, name: str) -> Config:
    kind = draw.choice(sorted(_SCALINGS))
    spelling = draw.choice(("rope_type", "type")) if name == "rope_scaling" else "rope_type"
    base_too = {"rope_theta": draw.choice((1e4, 5e5))} if name == "rope_parameters" and draw.random() < 0.8 else {}
    return {spelling: kind, **_SCALINGS[kind], **base_too}

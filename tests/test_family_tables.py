"""Family tables: complete, unambiguous, and in the names and shapes of transformers' own models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_converters.endpoints.hf_source import part_names, part_shapes
from megatron_converters.endpoints.queue_names import ENTRIES, message_name
from megatron_converters.errors import ConversionError
from megatron_converters.families import FAMILIES
from megatron_converters.families.base import Family, HFEntry
from megatron_converters.hf_config import spec_of_config
from megatron_converters.layouts import GATED, GROUPED_QKV, SAME
from megatron_converters.megatron_names import DIALECTS
from megatron_converters.slots import SLOTS, Ref, Scope, refs
from tests.oracle.hf import FAMILIES as CONFIGS
from tests.tiny import tiny_spec

PARTS = {SAME.name: 1, GATED.name: 2, GROUPED_QKV.name: 3}


def config_of(name: str, **overrides: Any) -> Any:
    from transformers import AutoConfig

    sizes = dict(vocab_size=31, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8)
    return AutoConfig.for_model(**{**sizes, "num_key_value_heads": 4, **CONFIGS[name], **overrides})


def names_and_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """transformers' model, without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("name", [*CONFIGS, "qwen3-bias"])
def test_names_and_shapes_are_those_of_transformers_models(name: str) -> None:
    config = config_of("qwen3", attention_bias=True) if name == "qwen3-bias" else config_of(name)
    expected = names_and_shapes(config)
    values = config.to_dict()
    values["architectures"] = [FAMILIES[config.model_type].architecture]
    spec = spec_of_config(values)
    family = FAMILIES[spec.family]
    found = {
        part: shape
        for ref in refs(spec)
        for part, shape in zip(part_names(family, ref), part_shapes(family, ref, spec), strict=True)
    }
    if spec.tied:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    assert found == expected


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_names_are_unique_and_as_many_as_the_layout_has_parts(family: Family) -> None:
    names = [name for entry in family.tensors.values() for name in entry.names]
    assert len(set(names)) == len(names)
    assert all(len(entry.names) == PARTS[entry.layout.name] for entry in family.tensors.values())


def test_every_slot_that_a_config_can_ask_for_is_named() -> None:
    asked: dict[str, dict[str, bool]] = {
        "llama": dict(qkv_bias=True, proj_bias=True, mlp_bias=True),
        "mistral": {},
        "qwen2": dict(qkv_bias=True),
        "qwen3": dict(qkv_bias=True, proj_bias=True, qk_norm=True),
    }
    assert asked.keys() == FAMILIES.keys()
    for name, fields in asked.items():
        needed = {ref.slot.name for ref in refs(tiny_spec(family=name, **fields))}
        assert FAMILIES[name].tensors.keys() == needed


def test_every_slot_has_a_megatron_name_and_a_message() -> None:
    assert ENTRIES.keys() == SLOTS.keys()
    for names in DIALECTS.values():
        assert names.keys() == SLOTS.keys()
        assert len(set(names.values())) == len(names)
        assert all(("{layer}" in name) == (SLOTS[slot].scope is Scope.LAYER) for slot, name in names.items())
    keys = [(message_name(Ref(SLOTS[slot], 0)), key) for slot, entry in ENTRIES.items() for key in entry.keys]
    assert len(set(keys)) == len(keys)


def test_a_slot_without_a_name_is_refused() -> None:
    with pytest.raises(ConversionError, match="the mistral family has no name for layer 3 qkv_bias"):
        part_names(FAMILIES["mistral"], Ref(SLOTS["qkv_bias"], 3))


@pytest.mark.parametrize(
    ("slot", "name"), [("input_norm", "model.norm.weight"), ("final_norm", "model.layers.{layer}.norm.weight")]
)
def test_a_table_whose_names_and_scopes_disagree_cannot_be_built(slot: str, name: str) -> None:
    with pytest.raises(ValueError, match=rf"the names of {slot} and its scope disagree"):
        Family("x", "x", "X", {slot: HFEntry(SAME, (name,))}, ())


def test_refs_are_in_the_order_of_the_queue_and_name_themselves() -> None:
    spec = tiny_spec(qk_norm=True)
    names = [str(ref) for ref in refs(spec)]
    of_layer = ["input_norm", "qkv", "q_norm", "k_norm", "proj", "mlp_norm", "fc1", "fc2"]
    assert names == [
        "word_embeddings",
        *(f"layer 0 {name}" for name in of_layer),
        *(f"layer 1 {name}" for name in of_layer),
        *("final_norm", "output_layer"),
    ]
    assert "output_layer" not in {ref.slot.name for ref in refs(tiny_spec(tied=True))}


def test_architectures_and_model_types_are_unique() -> None:
    for field in ("architecture", "model_type"):
        values = [getattr(family, field) for family in FAMILIES.values()]
        assert len(set(values)) == len(values)
    assert all(name == family.name for name, family in FAMILIES.items())

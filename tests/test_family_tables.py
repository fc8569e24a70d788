"""Family tables: complete, unambiguous, and in the names and shapes of transformers' own models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_converters.basics.errors import ConversionError
from megatron_converters.basics.json_files import read_json
from megatron_converters.families import FAMILIES
from megatron_converters.families.config_json import spec_from_config
from megatron_converters.families.table import Family, HFEntry
from megatron_converters.formats.huggingface.parts import HFNames
from megatron_converters.formats.megatron.names import DIALECTS, EXPERTS, STACKED
from megatron_converters.formats.queue.messages import ENTRIES, message_name
from megatron_converters.model.layouts import GATED, GROUPED_QKV, SAME
from megatron_converters.model.slots import SLOTS, Layers, Ref, Scope, refs
from megatron_converters.model.spec import ModelSpec
from tests.helpers import hf_tensors
from tests.oracle.hf import FAMILIES as CONFIGS
from tests.oracle.hf import MOE_FAMILIES
from tests.tiny import tiny_spec

PARTS = {SAME.name: 1, GATED.name: 2, GROUPED_QKV.name: 3}
MIXTURES = [name for name, fields in MOE_FAMILIES.items() if fields["model_type"] in FAMILIES]
#: The slots that one layer, or the ends of a model, may have together.
TOGETHER = [
    [name for name, slot in SLOTS.items() if slot.layers is not absent] for absent in (Layers.DENSE, Layers.MOE)
]


EXPERT_FIELDS: dict[str, Any] = dict(num_experts=4, moe_ffn_hidden_size=4, moe_router_topk=2)


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
    found = ours(spec_from_config(values))
    assert found == expected


@pytest.mark.parametrize("name", MIXTURES)
def test_names_and_shapes_are_those_of_the_files_that_transformers_saves(
    name: str, hf_model: Callable[..., Path]
) -> None:
    """In memory transformers 5 fuses the experts of a layer; published files hold each on its own."""
    folder = hf_model(name)
    spec = spec_from_config(read_json(folder / "config.json"))
    assert ours(spec) == {part: tuple(tensor.shape) for part, tensor in hf_tensors(folder).items()}
    fused = hf_tensors(hf_model(name, fused_experts=True))
    sources = {
        entry.fused.format(layer=ref.layer): (spec.num_experts, *ref.slot.shape(spec))
        for ref in refs(spec)
        if (entry := FAMILIES[spec.family].tensors[ref.slot.name]).fused is not None and ref.expert is not None
    }
    assert sources
    assert sources.items() <= {part: tuple(tensor.shape) for part, tensor in fused.items()}.items()


def ours(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The names and shapes that the spec's family gives a model's parts."""
    family = FAMILIES[spec.family]
    found = {part.name: part.shape for ref in refs(spec) for part in HFNames(family, spec).parts(ref, fused=False)}
    if spec.tied:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return found


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_names_are_unique_and_as_many_as_the_layout_has_parts(family: Family) -> None:
    for together in TOGETHER:
        names = [name for slot, entry in family.tensors.items() if slot in together for name in entry.names]
        assert len(set(names)) == len(names)
    assert all(len(entry.names) == PARTS[entry.layout.name] for entry in family.tensors.values())


def test_every_slot_that_a_config_can_ask_for_is_named() -> None:
    asked: dict[str, dict[str, bool]] = {
        "llama": dict(qkv_bias=True, proj_bias=True, mlp_bias=True),
        "mistral": {},
        "qwen2": dict(qkv_bias=True),
        "qwen3": dict(qkv_bias=True, proj_bias=True, qk_norm=True),
        "mixtral": EXPERT_FIELDS,
        "qwen2_moe": dict(
            **EXPERT_FIELDS, qkv_bias=True, shared_ffn_hidden_size=4, shared_gate=True, dense_layers=(1,)
        ),
        "qwen3_moe": dict(**EXPERT_FIELDS, qkv_bias=True, proj_bias=True, qk_norm=True, dense_layers=(1,)),
        "olmoe": dict(**EXPERT_FIELDS, qkv_bias=True, proj_bias=True, qk_norm=True, qk_norm_over_heads=True),
    }
    assert asked.keys() == FAMILIES.keys()
    for name, fields in asked.items():
        needed = {ref.slot.name for ref in refs(tiny_spec(family=name, **fields))}
        assert FAMILIES[name].tensors.keys() == needed


def test_every_slot_has_a_megatron_name_and_a_message() -> None:
    assert ENTRIES.keys() == SLOTS.keys()
    for table in (dialect | experts for dialect in DIALECTS.values() for experts in EXPERTS.values()):
        assert table.keys() == SLOTS.keys()
        assert all(("{layer}" in name) == (SLOTS[slot].scope is Scope.LAYER) for slot, name in table.items())
        stacked = EXPERTS[STACKED].items()
        assert all(
            ("expert}" in name) == (SLOTS[slot].expert and (slot, name) not in stacked) for slot, name in table.items()
        )
        for together in TOGETHER:
            names = [table[slot] for slot in together]
            assert len(set(names)) == len(names)
    assert {slot for slot, entry in ENTRIES.items() if entry.stacked} == {"expert_fc1", "expert_fc2"}
    for together in TOGETHER:
        keys = [(message_name(Ref(SLOTS[slot], 0)), key) for slot in together for key in ENTRIES[slot].keys]
        assert len(set(keys)) == len(keys)


def test_a_slot_without_a_name_is_refused() -> None:
    with pytest.raises(ConversionError, match="the mistral family has no name for layer 3 qkv_bias"):
        HFNames(FAMILIES["mistral"], tiny_spec()).names(Ref(SLOTS["qkv_bias"], 3))


@pytest.mark.parametrize(
    ("slot", "name"), [("input_norm", "model.norm.weight"), ("final_norm", "model.layers.{layer}.norm.weight")]
)
def test_a_table_whose_names_and_scopes_disagree_cannot_be_built(slot: str, name: str) -> None:
    with pytest.raises(ValueError, match=rf"the names of {slot} and its scope disagree about \{{layer"):
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


@pytest.mark.parametrize("name", ["x.{layer}.w", "x.{expert}.w"])
def test_a_table_whose_expert_names_lack_a_number_cannot_be_built(name: str) -> None:
    with pytest.raises(ValueError, match="the names of expert_fc2 and its scope disagree"):
        Family("x", "x", "X", {"expert_fc2": HFEntry(SAME, (name,))}, ())
    with pytest.raises(ValueError, match=r"the names of fc2 and its scope disagree about \{expert"):
        Family("x", "x", "X", {"fc2": HFEntry(SAME, ("x.{layer}.{expert}.w",))}, ())


def test_refs_of_experts_come_expert_by_expert_and_dense_layers_have_none() -> None:
    fields = {**EXPERT_FIELDS, "num_experts": 2}
    spec = tiny_spec(**fields, num_layers=2, dense_layers=(1,), shared_ffn_hidden_size=4, shared_gate=True)
    attention = ["input_norm", "qkv", "proj"]
    experts = [f"expert {number} {slot}" for slot in ("expert_fc1", "expert_fc2") for number in (0, 1)]
    mixture = [*attention, "moe_norm", "router", *experts, "shared_fc1", "shared_fc2", "shared_gate"]
    dense = [*attention, "mlp_norm", "fc1", "fc2"]
    assert [str(ref) for ref in refs(spec)] == [
        "word_embeddings",
        *(f"layer 0 {name}" for name in mixture),
        *(f"layer 1 {name}" for name in dense),
        *("final_norm", "output_layer"),
    ]


def test_architectures_and_model_types_are_unique() -> None:
    for field in ("architecture", "model_type"):
        values = [getattr(family, field) for family in FAMILIES.values()]
        assert len(set(values)) == len(values)
    assert all(name == family.name for name, family in FAMILIES.items())

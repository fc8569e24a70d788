"""Family tables: complete, unambiguous, and in the names and shapes of transformers' own models."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_converters.basics.errors import ConversionError
from megatron_converters.basics.json_files import read_json
from megatron_converters.families import FAMILIES
from megatron_converters.families.config_json import spec_from_config
from megatron_converters.families.registry import _MODULE_OF, families_in
from megatron_converters.families.table import Family
from megatron_converters.formats.huggingface.parts import HFNames, constants
from megatron_converters.formats.megatron.names import DIALECTS, EXPERTS, name_of
from megatron_converters.formats.megatron.options import DYNAMIC, GROUPED, SEQUENTIAL, SINGLE, STACKED
from megatron_converters.formats.queue.messages import ENTRIES, message_name, sent
from megatron_converters.model.layers import (
    AFTER,
    ALL_HEADS,
    AROUND,
    EACH_HEAD,
    GELU,
    LAYER_NORM,
    OF_MLP,
    SQUARED_RELU,
    Layer,
)
from megatron_converters.model.layouts import (
    AFTER_TWO_ROWS,
    ALTERNATING,
    DELTA_BY_KEY_HEAD,
    DELTA_BY_USE,
    GATED,
    GROUPED_GATED_QKV,
    GROUPED_INTERLEAVED_QKV,
    GROUPED_QKV,
    LATENT_KEY_HALVES,
    LATENT_QUERY_HALVES,
    SAME,
    joined,
)
from megatron_converters.model.slots import DECODER, MTP, SLOTS, Ref, Scope, refs
from megatron_converters.model.spec import ModelSpec, PerLayer
from megatron_converters.model.tables import Entry
from tests.helpers import hf_tensors
from tests.oracle.families import MODELS
from tests.oracle.hf import FAMILIES as CONFIGS
from tests.oracle.hf import MOE_FAMILIES
from tests.oracle.hf_kinds import KINDS
from tests.tiny import KINDS as TINY_KINDS
from tests.tiny import tiny_spec

PARTS = {
    **{SAME.name: 1, GATED.name: 2, GROUPED_QKV.name: 3, GROUPED_GATED_QKV.name: 3, DELTA_BY_KEY_HEAD.name: 2},
    **{joined(layout).name: 1 for layout in (GATED, GROUPED_QKV, GROUPED_INTERLEAVED_QKV)},
    **{GROUPED_INTERLEAVED_QKV.name: 3, AFTER_TWO_ROWS.name: 1, ALTERNATING.name: 1},
    **{LATENT_QUERY_HALVES.name: 1, LATENT_KEY_HALVES.name: 1, DELTA_BY_USE.name: 4},
}
HAS_EXPERTS = [name for name, model in MODELS.items() if model.has_experts and model.publish is None]
LATER = {
    name: model.fields
    for name, model in MODELS.items()
    if name not in (*CONFIGS, *MOE_FAMILIES, *KINDS) and model.publish is None and not model.has_experts
}
DENSE = [*CONFIGS, *(name for name in KINDS if name not in HAS_EXPERTS), *LATER]
MIXTURES = [name for name, fields in MOE_FAMILIES.items() if fields["model_type"] in FAMILIES]
EXPERT_FIELDS: dict[str, Any] = dict(num_experts=4, moe_ffn_hidden_size=4, moe_router_topk=2)


def together(spec: ModelSpec) -> Iterator[tuple[Layer, str, list[Ref]]]:
    """Refs of each kind of layer, together with those of no layer: all that may not share a name."""
    whole = [ref for ref in refs(spec) if ref.layer is None]
    for stack, order in ((DECODER, spec.order), (MTP, spec.mtp)):
        for kind in dict.fromkeys(order):
            layer = order.index(kind)
            own = [ref for ref in refs(spec) if (ref.layer, ref.stack) == (layer, stack)]
            yield spec.kinds[kind], stack, [*whole, *own]


def config_of(name: str, **overrides: Any) -> Any:
    from transformers import AutoConfig

    sizes = dict(vocab_size=31, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8)
    fields = KINDS.get(name) or LATER.get(name) or {**sizes, "num_key_value_heads": 4, **CONFIGS[name]}
    return AutoConfig.for_model(**{**fields, **overrides})


def names_and_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """transformers' model, without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("name", [*DENSE, "qwen3-bias"])
def test_names_and_shapes_are_those_of_transformers_models(name: str) -> None:
    config = config_of("qwen3", attention_bias=True) if name == "qwen3-bias" else config_of(name)
    expected = names_and_shapes(config)
    values = config.to_dict()
    values["architectures"] = [FAMILIES[config.model_type].architecture]
    spec = spec_from_config(values)
    found = ours(spec)
    if spec.tied:  # in memory the head is there, too
        (embeddings,) = FAMILIES[spec.family].tensors["word_embeddings"].names
        found["lm_head.weight"] = found[embeddings]
    in_memory = {published: name for name, published in FAMILIES[spec.family].renamed.items()}
    assert {in_memory.get(name, name): shape for name, shape in found.items()} == expected


@pytest.mark.parametrize("name", dict.fromkeys([*MIXTURES, *HAS_EXPERTS]))
def test_names_and_shapes_are_those_of_the_files_that_transformers_saves(
    name: str, hf_model: Callable[..., Path]
) -> None:
    """In memory transformers 5 fuses the experts of a layer; published files hold each on its own."""
    folder = hf_model(name)
    spec = spec_from_config(read_json(folder / "config.json"))
    assert ours(spec) == {part: tuple(tensor.shape) for part, tensor in hf_tensors(folder).items()}
    fused = hf_tensors(hf_model(name, fused_experts=True))
    sources = {
        entry.fused.format(layer=ref.layer): (spec.num_experts, *ref.shape(spec))
        for ref in refs(spec)
        if (entry := FAMILIES[spec.family].tensors[ref.slot.name]).fused is not None and ref.expert is not None
    }
    assert sources or FAMILIES[spec.family].tensors["expert_fc1"].stacked
    assert sources.items() <= {part: tuple(tensor.shape) for part, tensor in fused.items()}.items()


def ours(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The names and shapes that the spec's family gives a model's parts."""
    family = FAMILIES[spec.family]
    return {
        part.name: part.stored_shape for ref in refs(spec) for part in HFNames(family, spec).parts(ref, fused=False)
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_names_are_unique_and_as_many_as_the_layout_has_parts(name: str) -> None:
    family = FAMILIES[name]
    for fields in ASKED[name]:
        spec = tiny_spec(family=name, **fields)
        parts = [part for ref in refs(spec) for part in HFNames(family, spec).parts(ref, fused=False)]
        names = [(part.name, part.number) for part in parts]
        names += [(replica, 0) for ref in refs(spec) for replica in HFNames(family, spec).replica_names(ref)]
        assert len(set(names)) == len(names)
    stored = (entry for entry in family.tensors.values() if entry.constant is None)
    assert all(len(entry.names) == PARTS[entry.layout.name] for entry in stored)


_MIXED = dict(feed=PerLayer(["mlp", "moe"]))
_LATENT: dict[str, Any] = dict(mixer="latent", kv_lora_rank=6, qk_head_dim=4, qk_pos_emb_head_dim=2, v_head_dim=4)
_BIASES = dict(qkv_bias=True, proj_bias=True, mlp_bias=True)
_ROUTED: dict[str, Any] = EXPERT_FIELDS | dict(
    moe_router_enable_expert_bias=True, shared_ffn_hidden_size=4, mtp_num_layers=1
)
_UNGATED: dict[str, Any] = dict(_BIASES, normalization=LAYER_NORM, gated=False, activation=GELU)
_GATED_DELTA: dict[str, Any] = {
    **dict(mixer=PerLayer(["gated delta", "attention"]), attention_output_gate=True, qk_norm=EACH_HEAD),
    **dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_conv_kernel_dim=3),
    **dict(linear_key_head_dim=2, linear_value_head_dim=4, num_layers=2, mtp_num_layers=1),
}
_SPARSE: dict[str, Any] = dict(
    **{**_LATENT, **_ROUTED, **_MIXED, "mixer": "sparse latent", "q_lora_rank": 4},
    **dict(dsa_indexer_n_heads=3, dsa_indexer_head_dim=2, dsa_indexer_topk=8),
)
_SHARED = EXPERT_FIELDS | dict(shared_ffn_hidden_size=4, shared_gate=True)
_PARALLEL: dict[str, Any] = dict(normalization=LAYER_NORM, parallel_block=True)
_POST: dict[str, Any] = dict(block_norms=AFTER)
#: Models of each family that together have all the slots that its config.json can ask for.
ASKED: dict[str, list[dict[str, Any]]] = {
    "llama": [_BIASES],
    "mistral": [{}],
    "ministral": [{}],
    "ministral3": [{}],
    "qwen2": [dict(qkv_bias=True)],
    "qwen3": [dict(qkv_bias=True, proj_bias=True, qk_norm=EACH_HEAD)],
    **{key: [_BIASES] for key in ("smollm3", "seed_oss", "internlm3", "iquestcoder")},
    "cwm": [dict(mlp_bias=True)],
    "ernie4_5": [dict(_BIASES, rotary_interleaved=True)],
    "helium": [dict(qkv_bias=True, mlp_bias=True, rotary_interleaved=True)],
    "mimo": [dict(qkv_bias=True, mtp_num_layers=1)],
    "mixtral": [EXPERT_FIELDS],
    "gpt_oss": [dict(**EXPERT_FIELDS, **_BIASES, sinks=True)],
    "qwen2_moe": [dict(**EXPERT_FIELDS, **_MIXED, qkv_bias=True, shared_ffn_hidden_size=4, shared_gate=True)],
    "qwen3_moe": [dict(**EXPERT_FIELDS, **_MIXED, qkv_bias=True, proj_bias=True, qk_norm=EACH_HEAD)],
    "olmoe": [dict(**EXPERT_FIELDS, qkv_bias=True, proj_bias=True, qk_norm=ALL_HEADS)],
    "gpt2": [dict(_UNGATED, learned_positions=True, rope=False)],
    "starcoder2": [_UNGATED],
    "phi": [dict(_UNGATED, parallel_block=True, head_bias=True)],
    "phi3": [{}],
    "glm": [dict(qkv_bias=True, rotary_interleaved=True)],
    "granite": [_BIASES],
    "glm4_moe": [
        dict(
            **EXPERT_FIELDS,
            **_MIXED,
            **dict(qkv_bias=True, qk_norm=EACH_HEAD, mtp_num_layers=2),
            **dict(moe_router_enable_expert_bias=True, shared_ffn_hidden_size=4),
        )
    ],
    "deepseek_v2": [
        dict(**_LATENT, **EXPERT_FIELDS, **_MIXED, shared_ffn_hidden_size=4, q_lora_rank=rank) for rank in (None, 4)
    ],
    "deepseek_v3": [
        dict(
            **{**_LATENT, **EXPERT_FIELDS, **_MIXED, "q_lora_rank": rank, "mtp_num_layers": 1},
            **dict(moe_router_enable_expert_bias=True, shared_ffn_hidden_size=4),
        )
        for rank in (None, 4)
    ],
    "glm4_moe_lite": [dict(**{**_LATENT, **_ROUTED, **_MIXED, "q_lora_rank": rank}) for rank in (None, 4)],
    "qwen3_next": [_GATED_DELTA | _SHARED | _MIXED],
    "qwen3_5_text": [_GATED_DELTA],
    "qwen3_5_moe_text": [_GATED_DELTA | _SHARED],
    "deepseek_v32": [_SPARSE],
    "glm_moe_dsa": [_SPARSE | dict(shared_indexer=PerLayer([False, True]))],
    "minicpm": [
        dict(qkv_bias=True, proj_bias=True),
        EXPERT_FIELDS,
        dict(feed=PerLayer(["mlp", "block experts"]), block_experts=3, block_expert_size=4),
    ],
    "gpt_bigcode": [dict(_UNGATED, learned_positions=True, rope=False)],
    "olmo": [dict(_BIASES, normalization=LAYER_NORM, absent_biases=OF_MLP)],
    **{key: [dict(_BIASES, absent_biases=OF_MLP, **_POST, qk_norm=ALL_HEADS)] for key in ("olmo2", "olmo3")},
    "exaone4": [dict(_POST, qk_norm=EACH_HEAD)],
    "stablelm": [dict(qkv_bias=True, normalization=LAYER_NORM)],
    "nemotron": [dict(_UNGATED, activation=SQUARED_RELU)],
    "arcee": [dict(_BIASES, gated=False, activation=SQUARED_RELU)],
    "jais2": [dict(_UNGATED, activation=SQUARED_RELU)],
    "persimmon": [dict(_UNGATED, activation=SQUARED_RELU, qk_norm=EACH_HEAD)],
    "gpt_neox": [_UNGATED, dict(_UNGATED, parallel_block=True, parallel_norms=True)],
    "opt": [dict(_UNGATED, learned_positions=True, rope=False)],
    "minicpm3": [dict(**_LATENT, q_lora_rank=rank) for rank in (None, 4)],
    "granitemoe": [dict(**EXPERT_FIELDS, qkv_bias=True, proj_bias=True)],
    "granitemoeshared": [dict(**EXPERT_FIELDS, qkv_bias=True, proj_bias=True, shared_ffn_hidden_size=4)],
    "dots1": [_ROUTED | _MIXED | dict(qkv_bias=True, proj_bias=True, qk_norm=EACH_HEAD, mtp_num_layers=0)],
    "solar_open": [_ROUTED | dict(qkv_bias=True, mtp_num_layers=0)],
    "hy_v3": [dict(**_ROUTED, **_MIXED, qkv_bias=True, proj_bias=True, qk_norm=EACH_HEAD)],
    "exaone_moe": [_ROUTED | _MIXED | dict(qk_norm=EACH_HEAD, mtp_num_layers=0)],
    "bailing_moe": [dict(**_ROUTED, **_MIXED, qkv_bias=True, proj_bias=True, qk_norm=EACH_HEAD)],
    "internlm2": [dict(qkv_bias=True, proj_bias=True)],
    "exaone": [{}],
    "qwen": [dict(qkv_bias=True)],
    "baichuan": [{}],
    "baichuan2": [{}],
    "gemma": [dict(qkv_bias=True, proj_bias=True)],
    "gemma2": [dict(qkv_bias=True, proj_bias=True, block_norms=AROUND)],
    "glm4": [dict(qkv_bias=True, rotary_interleaved=True, block_norms=AROUND)],
    **{key: [dict(_PARALLEL, qkv_bias=True, proj_bias=True)] for key in ("cohere", "cohere2")},
    "falcon": [_UNGATED | _PARALLEL, dict(_UNGATED, **_PARALLEL, parallel_norms=True)],
    "minimax_m2": [dict(**EXPERT_FIELDS, moe_router_enable_expert_bias=True, qk_norm=ALL_HEADS)],
    "gemma3_text": [dict(qkv_bias=True, proj_bias=True, block_norms=AROUND, qk_norm=EACH_HEAD)],
    "chatglm": [dict(qkv_bias=True, rotary_interleaved=True)],
}


def test_every_slot_that_a_config_can_ask_for_is_named() -> None:
    assert ASKED.keys() == FAMILIES.keys()
    for name, models in ASKED.items():
        family, specs = FAMILIES[name], [tiny_spec(family=name, **fields) for fields in models]
        needed = {ref.slot.name for spec in specs for ref in refs(spec)}
        absent = {slot for spec in specs for slot in constants(family, spec)}
        named = {slot for spec in specs for slot in family.tensors_of(spec)}
        assert named == needed - (absent - named)


def test_every_slot_has_a_megatron_name_and_a_message() -> None:
    assert ENTRIES.keys() == SLOTS.keys()
    models = [*TINY_KINDS.values(), *(tiny_spec(family=name, **fields) for name in ASKED for fields in ASKED[name])]
    lacking = {layout: {*EXPERTS[SEQUENTIAL]} - {*experts} for layout, experts in EXPERTS.items()}
    biases = {"expert_fc1_bias", "expert_fc2_bias"}
    assert lacking == {SEQUENTIAL: set(), GROUPED: set(), SINGLE: set(), DYNAMIC: biases, STACKED: biases}
    for dialect, layout in itertools.product(DIALECTS.values(), EXPERTS):
        table = {**dialect, **EXPERTS[layout]}
        assert table.keys() == SLOTS.keys() - lacking[layout]
        in_one = EXPERTS[STACKED].items() | EXPERTS[SINGLE].items()
        for spec in models:
            for kind, stack, held in together(spec):
                stored = [ref.slot for ref in held if ref.slot.name not in lacking[layout]]
                names = {slot: name_of(table, slot.name, kind, stack) for slot in stored}
                assert len({*names.values()}) == len(names)
                for slot, name in names.items():
                    assert ("{layer}" in name) == (slot.scope in (Scope.LAYER, Scope.MTP))
                    assert ("expert}" in name) == (
                        slot.expert and (slot.name, name_of(table, slot.name, kind, DECODER)) not in in_one
                    )
    assert {slot for slot, entry in ENTRIES.items() if entry.stacked} == {*EXPERTS[SEQUENTIAL]}
    for spec in models:
        for _, _, held in together(spec):
            messages = {(ref.slot, key): (message_name(ref), key) for ref in held for key in sent(ref, spec).keys}
            assert len({*messages.values()}) == len(messages)


def test_a_slot_without_a_name_is_refused() -> None:
    with pytest.raises(ConversionError, match="the mistral family has no name for layer 3 qkv_bias"):
        HFNames(FAMILIES["mistral"], tiny_spec()).names(Ref(SLOTS["qkv_bias"], 3))


@pytest.mark.parametrize(
    ("slot", "name"), [("input_norm", "model.norm.weight"), ("final_norm", "model.layers.{layer}.norm.weight")]
)
def test_a_table_whose_names_and_scopes_disagree_cannot_be_built(slot: str, name: str) -> None:
    with pytest.raises(ValueError, match=rf"the names of {slot} and its scope disagree about \{{layer"):
        Family("x", "x", "X", {slot: Entry(SAME, (name,))}, ())


def test_refs_are_in_the_order_of_the_queue_and_name_themselves() -> None:
    spec = tiny_spec(qk_norm=EACH_HEAD)
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
        Family("x", "x", "X", {"expert_fc2": Entry(SAME, (name,))}, ())
    with pytest.raises(ValueError, match=r"the names of fc2 and its scope disagree about \{expert"):
        Family("x", "x", "X", {"fc2": Entry(SAME, ("x.{layer}.{expert}.w",))}, ())


def test_refs_of_experts_come_expert_by_expert_and_dense_layers_have_none() -> None:
    fields = {**EXPERT_FIELDS, "num_experts": 2}
    spec = tiny_spec(**fields, feed=PerLayer(["moe", "mlp"]), shared_ffn_hidden_size=4, shared_gate=True)
    attention = ["input_norm", "qkv", "proj"]
    experts = [f"expert {number} {slot}" for slot in ("expert_fc1", "expert_fc2") for number in (0, 1)]
    mixture = [*attention, "mlp_norm", "router", *experts, "shared_fc1", "shared_fc2", "shared_gate"]
    dense = [*attention, "mlp_norm", "fc1", "fc2"]
    assert [str(ref) for ref in refs(spec)] == [
        "word_embeddings",
        *(f"layer 0 {name}" for name in mixture),
        *(f"layer 1 {name}" for name in dense),
        *("final_norm", "output_layer"),
    ]


def test_architectures_and_model_types_are_unique() -> None:
    """Baichuan-7B and Baichuan2 have one model_type, so that config.json must name the class."""
    for field in ("architectures", "model_types"):
        values = Counter(value for family in FAMILIES.values() for value in getattr(family, field))
        assert [value for value, count in values.items() if count > 1] == [*(["baichuan"] * (field == "model_types"))]
    assert all(name == family.name for name, family in FAMILIES.items())


def test_the_registry_knows_which_module_has_a_family() -> None:
    assert list(FAMILIES.built_in) == list(_MODULE_OF)
    for name, module in _MODULE_OF.items():
        assert FAMILIES[name] in families_in(module)
        assert FAMILIES[name].model_type == name.replace("baichuan2", "baichuan")

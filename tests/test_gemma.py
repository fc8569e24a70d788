"""Gemma: names and values as Megatron-Bridge has them, multipliers folded, live, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_converters.basics.errors import ConversionError
from megatron_converters.families.config_json import config_for, config_from_spec, spec_from_config
from megatron_converters.formats.megatron.arguments import inexpressible, model_args, spec_fields
from megatron_converters.formats.megatron.rank_files_source import MegatronSource
from megatron_converters.model.layers import AROUND, EACH_HEAD, GELU_TANH
from megatron_converters.model.rotary import RopeScaling
from tests.conversions import different, hf_to_megatron, hf_to_torch_dist, megatron_to_hf
from tests.helpers import args_of, edit_rank, hf_tensors, rank_content, refused, verb
from tests.oracle.checkpoint import iteration_directory
from tests.oracle.hf import TOKENS, difference
from tests.oracle.live_jobs import bridged
from tests.oracle.pool import MegatronPool

HFModel = Callable[..., Path]
Logits = Callable[[str], torch.Tensor]
TOLERANCE = 1e-5
ALLOWED: dict[str, Any] = dict(allow_inexpressible=True)
_COMMON: dict[str, Any] = dict(
    **dict(attention_bias=False, attention_dropout=0.0, bos_token_id=2, eos_token_id=1, pad_token_id=0),
    **dict(head_dim=256, initializer_range=0.02, rms_norm_eps=1e-06, torch_dtype="bfloat16", use_cache=True),
)
#: Published files of config.json: google/gemma-2b, gemma-2-27b, gemma-3-1b-it and the text part of gemma-3-27b-it.
PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma-2b": _COMMON
    | dict(architectures=["GemmaForCausalLM"], model_type="gemma", hidden_act="gelu", hidden_activation=None)
    | dict(hidden_size=2048, intermediate_size=16384, num_attention_heads=8, num_hidden_layers=18)
    | dict(num_key_value_heads=1, max_position_embeddings=8192, rope_scaling=None, rope_theta=10000.0)
    | dict(vocab_size=256000, transformers_version="4.38.0.dev0"),
    "gemma-2-27b": _COMMON
    | dict(architectures=["Gemma2ForCausalLM"], model_type="gemma2", cache_implementation="hybrid")
    | dict(hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", head_dim=128)
    | dict(hidden_size=4608, intermediate_size=36864, num_attention_heads=32, num_hidden_layers=46)
    | dict(num_key_value_heads=16, max_position_embeddings=8192, rope_theta=10000.0, vocab_size=256000)
    | dict(query_pre_attn_scalar=144, sliding_window=4096, sliding_window_size=4096)
    | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, transformers_version="4.42.0.dev0"),
    "gemma-3-1b": _COMMON
    | dict(architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", cache_implementation="hybrid")
    | dict(attn_logit_softcapping=None, final_logit_softcapping=None, hidden_activation="gelu_pytorch_tanh")
    | dict(hidden_size=1152, intermediate_size=6912, num_attention_heads=4, num_hidden_layers=26)
    | dict(num_key_value_heads=1, max_position_embeddings=32768, query_pre_attn_scalar=256, vocab_size=262144)
    | dict(rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000)
    | dict(sliding_window=512, sliding_window_pattern=6, eos_token_id=[1, 106], transformers_version="4.50.0.dev0"),
    "gemma-3-27b": dict(architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", dtype="bfloat16")
    | dict(head_dim=128, hidden_size=5376, intermediate_size=21504)
    | dict(num_attention_heads=32, num_hidden_layers=62, num_key_value_heads=16, query_pre_attn_scalar=168)
    | dict(rope_scaling={"factor": 8.0, "rope_type": "linear"}, sliding_window=1024, vocab_size=262208),
}


# -- config.json


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read_and_come_back(name: str) -> None:
    config = PUBLISHED[name]
    spec = spec_from_config(config)
    assert config_for(spec, config) == (config, [])
    assert spec_from_config(config_from_spec(spec)) == spec
    assert spec.norm.zero_centred
    assert spec.multipliers.embedding_multiplier == config["hidden_size"] ** 0.5
    assert (spec.values["activation"], spec.values["gated"], spec.tied) == (GELU_TANH, True, True)
    args = model_args(spec)
    assert spec_fields(_namespace(args)).items() <= spec.values.items()


def _namespace(args: dict[str, Any]) -> Any:
    from argparse import Namespace

    return Namespace(**args)


def test_what_each_release_has() -> None:
    values = {name: spec_from_config(config).values for name, config in PUBLISHED.items()}
    two, three = values["gemma-2-27b"], values["gemma-3-27b"]
    assert (two["attn_logit_softcapping"], two["final_logit_softcapping"]) == (50.0, 30.0)
    assert two["sliding_window"][:4] == (4096, None, 4096, None)
    assert (two["attention_multiplier"], two["block_norms"], two["qk_norm"]) == (1 / 12, AROUND, "")
    assert (three["block_norms"], three["qk_norm"]) == (AROUND, EACH_HEAD)
    assert three["sliding_window"][4:7] == (1024, None, 1024)
    assert three["rotary_base"][4:7] == (1e4, 1e6, 1e4)
    assert three["rope_scaling"][4:7] == (None, RopeScaling("linear", 8.0), None)
    assert values["gemma-2b"]["attention_multiplier"] is values["gemma-3-1b"]["attention_multiplier"] is None


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gemma-3-1b", {"use_bidirectional_attention": True}, "EmbeddingGemma attend to later tokens"),
        ("gemma-3-1b", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "an object for each of"),
        ("gemma-3-1b", {"sliding_window": None}, "its sliding_window is null"),
        ("gemma-3-1b", {"sliding_window_pattern": 0}, "must be one number above 0"),
        ("gemma-3-1b", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "supported are default and linear"),
        (
            "gemma-3-1b",
            {"rope_parameters": {"sliding_attention": {"type": "linear", "factor": 2.0}}},
            "only those of full",
        ),
        ("gemma-3-1b", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("gemma-2-27b", {"attn_logit_softcapping": -1.0}, "it must be above 0"),
        ("gemma-2-27b", {"query_pre_attn_scalar": 0}, "it must be above 0"),
        ("gemma-2b", {"hidden_act": "silu"}, "only 'gelu_pytorch_tanh', 'gelu'"),
        ("gemma-2b", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
    ],
)
def test_what_it_does_not_have_is_refused(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConversionError, match=words):
        spec_from_config(PUBLISHED[name] | changes)


def test_other_lineages_are_refused_by_name() -> None:
    for model_type in ("gemma4_text", "gemma3n_text", "recurrent_gemma", "t5gemma"):
        with pytest.raises(ConversionError, match="so that it cannot be converted"):
            spec_from_config({"model_type": model_type})


def test_each_reason_is_said() -> None:
    reasons = {name: "; ".join(inexpressible(spec_from_config(config))) for name, config in PUBLISHED.items()}
    assert all("a gated MLP with the tanh form of GELU" in found for found in reasons.values())
    assert "attention scores capped softly at 50" in reasons["gemma-2-27b"]
    assert "logits capped softly at 30" in reasons["gemma-2-27b"]
    assert "a rotary base of its own for some layers" in reasons["gemma-3-1b"]
    assert "scaling" not in reasons["gemma-3-1b"]
    assert "rotary scaling on some layers alone (linear, factor 8)" in reasons["gemma-3-27b"]


# -- weights


def test_names_are_those_of_megatron_bridge_and_values_as_they_are(hf_model: HFModel, tmp_path: Path) -> None:
    """By hand, after Gemma3ModelBridge.mapping_registry: no row is moved, and nothing added to the norms."""
    folder = hf_model("gemma3")
    root = hf_to_megatron(folder, tmp_path / "megatron", tp=2, pp=2, **ALLOWED)
    tensors = hf_tensors(folder)
    ours = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm",
        "self_attention.q_layernorm.weight": "self_attn.q_norm",
        "self_attention.k_layernorm.weight": "self_attn.k_norm",
        "self_attention.linear_proj.post_layernorm.weight": "post_attention_layernorm",
        "mlp.linear_fc1.layer_norm_weight": "pre_feedforward_layernorm",
        "mlp.linear_fc2.post_layernorm.weight": "post_feedforward_layernorm",
    }
    for rank in (0, 1):
        model = rank_content(root, f"mp_rank_{rank:02d}_001")["model"]
        for name, theirs in ours.items():
            assert torch.equal(model[f"decoder.layers.1.{name}"], tensors[f"model.layers.3.{theirs}.weight"])
        down = tensors["model.layers.3.mlp.down_proj.weight"]
        assert torch.equal(model["decoder.layers.1.mlp.linear_fc2.weight"], down.chunk(2, dim=1)[rank])
        gate, up = (tensors[f"model.layers.3.mlp.{part}_proj.weight"].chunk(2)[rank] for part in ("gate", "up"))
        assert torch.equal(model["decoder.layers.1.mlp.linear_fc1.weight"], torch.cat([gate, up]))
        assert torch.equal(model["decoder.final_layernorm.weight"], tensors["model.norm.weight"])


def test_args_alone_say_the_model(hf_model: HFModel, tmp_path: Path) -> None:
    for name in ("gemma", "gemma2", "gemma3"):
        folder = hf_model(name)
        root = hf_to_megatron(folder, tmp_path / name, **ALLOWED)
        args = args_of(root)
        del args.hf_config
        edit_rank(root, "mp_rank_00", args=args)
        wanted = spec_from_config(json.loads((folder / "config.json").read_text()))
        assert MegatronSource(root).spec == wanted
        back = megatron_to_hf(root, tmp_path / name / "hf")
        assert different(hf_tensors(folder), hf_tensors(back)) == []


@pytest.mark.parametrize("name", ["gemma", "gemma3"])
def test_multipliers_can_be_folded(
    megatron_pool: MegatronPool, hf_model: HFModel, logits: Logits, tmp_path: Path, name: str
) -> None:
    """A scale of scores goes into the norm of queries, where there is one: (1 + w) s - 1, since norms are around 0."""
    folder = hf_model(name)
    root = hf_to_megatron(folder, tmp_path / "folded", tp=2, mup="fold", **ALLOWED)
    assert difference(megatron_pool.logits(root, TOKENS), logits(name)) < TOLERANCE
    assert not args_of(root).use_mup
    if name == "gemma3":
        norm = hf_tensors(folder)["model.layers.2.self_attn.q_norm.weight"]
        found = rank_content(root)["model"]["decoder.layers.2.self_attention.q_layernorm.weight"]
        assert torch.allclose(1 + found, (1 + norm) * (16 / 40) ** 0.5, rtol=1e-6, atol=0)
    back = hf_tensors(megatron_to_hf(root, tmp_path / "hf"))
    for key, tensor in hf_tensors(folder).items():
        assert torch.allclose(back[key], tensor, rtol=1e-6, atol=1e-6)


def test_gemma_1_works_live(megatron_pool: MegatronPool, hf_model: HFModel, logits: Logits) -> None:
    folder = hf_model("gemma")
    found = megatron_pool.run(bridged, str(folder), TOKENS, dict(tp=2, pp=2), "transformer_engine")
    parts = dict(shard for shard, _ in found if shard is not None)
    assert difference(torch.cat([parts[rank] for rank in sorted(parts)], dim=-1), logits("gemma")) < TOLERANCE
    assert all({*names} <= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} for _, names in found)


_PROVIDERS: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma2": dict(
        query_pre_attn_scalar=40, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, window_size=[6, 0]
    ),
    "gemma3": dict(
        **dict(softmax_scale=40**-0.5, window_size=7, interleaved_attn_pattern=[2, 1], rope_scaling_factor=8.0),
        **dict(rotary_base=[10000, 1000000], qk_layernorm=True),
    ),
}


@pytest.mark.parametrize("name", _PROVIDERS)
def test_a_checkpoint_of_megatron_bridge_says_what_its_provider_is(
    hf_model: HFModel, tmp_path: Path, name: str
) -> None:
    """Fields are those of Bridge's classes, whose own defaults and code say the rest."""
    folder = hf_model(name)
    root = hf_to_torch_dist(folder, tmp_path / "dist", **ALLOWED)
    directory = iteration_directory(root)
    torch.save({"iteration": 1}, directory / "common.pt")
    own = {"_target_": f"megatron.bridge.models.gemma.{name}_provider.{name.capitalize()}ModelProvider"}
    fields = dict(
        **dict(num_layers=4, hidden_size=80, ffn_hidden_size=112, num_attention_heads=8, num_query_groups=4),
        **dict(kv_channels=16, seq_length=512, vocab_size=199, layernorm_epsilon=1e-3, normalization="RMSNorm"),
        **dict(layernorm_zero_centered_gamma=True, position_embedding_type="rope", rotary_base=10000),
        **dict(add_bias_linear=False, gated_linear_unit=True, share_embeddings_and_output_weights=True),
    )
    function = {"_target_": "megatron.core.activations.fast_gelu", "_call_": False}
    model = {**fields, "activation_func": function, **_PROVIDERS[name], **own}
    (directory / "run_config.yaml").write_text(yaml.safe_dump({"model": model}))
    back = megatron_to_hf(root, tmp_path / "hf")
    assert different(hf_tensors(folder), hf_tensors(back)) == []
    configs = [spec_from_config(json.loads((each / "config.json").read_text())) for each in (back, folder)]
    assert configs[0] == configs[1]


def test_the_command_line_needs_leave(hf_model: HFModel, tmp_path: Path) -> None:
    folder = hf_model("gemma2")
    refused(
        verb("convert", folder, tmp_path / "a"),
        "--allow-inexpressible",
        "capped softly at 3",
    )

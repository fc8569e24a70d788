"""Arguments that no release of Megatron-LM has: refused where they are set and about the forward pass, else passed over."""

from __future__ import annotations

import argparse
import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_converters.basics.errors import ConversionError
from megatron_converters.formats.megatron.describing import spec_and_notes
from megatron_converters.formats.megatron.foreign_args import foreign
from megatron_converters.formats.megatron.reading import AS_STORED, MegatronReadOptions
from megatron_converters.model.rotary import RopeScaling
from megatron_converters.model.spec import ModelSpec
from tests.conversions import hf_to_megatron
from tests.helpers import edit_rank, rank_content, refused, succeeded, verb
from tests.test_megatron_args import all_args
from tests.tiny import tiny_spec

SPEC = tiny_spec()
#: By program, arguments that make another model of it than its weights and Megatron-LM's arguments say.
CHANGING: dict[str, dict[str, Any]] = {
    "ms-swift": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "its llama3 scaling without constants": {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}},
    "another form of it": {"rope_scaling": "yarn"},
    "YaRN in MindSpeed-LLM": {"rope_scaling_type": "yarn"},
    "a window": {"sliding_window": 32},
    "Gemma's in MindSpeed-LLM": {
        "geglu": True,
        "add_rmsnorm_offset": True,
        "input_embeds_norm": True,
        "output_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 224,
        "interleave_sliding_window": 4096,
        "post_norm": True,
    },
    "Grok's and others' in MindSpeed-LLM": {
        "embedding_multiplier_scale": 78.4,
        "output_multiplier_scale": 0.57,
        "dynamic_factor": 2.0,
        "partial_rotary_factor": 0.25,
        "use_glm_rope": True,
        "norm_topk_prob": True,
        "attention_mask_type": "general",
        "square_alibi_mask": True,
    },
    "Pai-Megatron-Patch": {"rotary_scale_factor": 2, "use_normhead": True, "embed_layernorm": True},
    "norms that are left out": {"attn_layernorm": False, "final_layernorm": False},
    "others": {"post_layer_norm": True, "xielu": True, "input_embeddings_multiplier": 8.0, "rope_theta": 500000},
}
#: Arguments that every run of a program has, or that change nothing of a model.
HARMLESS: dict[str, Any] = {
    "MindSpeed-LLM's defaults": {
        **{"rope_scaling_mscale": 1.0, "rope_scaling_mscale_all_dim": 0.0, "longrope_freqs_type": "mul"},
        **{"beta_fast": 32, "beta_slow": 1, "dynamic_factor": 1.0, "embedding_multiplier_scale": 1.0, "hc_mult": 4},
        **{
            "output_multiplier_scale": None,
            "partial_rotary_factor": 0.0,
            "rope_theta": 10000.0,
            "sliding_window": None,
        },
        **{"compress_rope_theta": 40000.0, "attention_mask_type": "causal", "cp_window_size": 1, "post_norm": False},
        **{"use_fused_rmsnorm": True, "use_fused_swiglu": True, "use_fused_rotary_pos_emb": True, "swiglu_limit": 0},
        **{"moe_adaptive_recompute_activation_scale": 2.0, "recompute_norm": True, "swap_attention": True},
    },
    "the norms of the Swiss AI Initiative": {"attn_layernorm": True, "mlp_layernorm": True, "final_layernorm": True},
    "Habana's": {"use_fused_rmsnorm": True, "use_fast_softmax": True},
    "slime's": {"grpo_std_normalization": True, "sglang_attention_backend": "fa3", "data_pad_size_multiplier": 128},
    "Primus's": {"file_sink_level": "DEBUG", "use_turbo_rms_norm": True},
    "ms-swift's": {"rope_scaling": None, "scale_rewards": "group"},
    "upstream's": {
        "loss_scale_window": 1000,
        "head_lr_mult": 1.0,
        "yarn_beta_fast": None,
        "mtp_loss_scaling_factor": 0.1,
    },
    "a training loop's": {"max_grad_norm": 1.0, "lr_scale": 0.5, "multimodal_keys": ["image"], "multiple": 3},
}


def described(options: MegatronReadOptions = AS_STORED, /, **changes: Any) -> tuple[ModelSpec, list[str]]:
    args = argparse.Namespace(**{**all_args(SPEC), **changes})
    return spec_and_notes(args, 128, SPEC.dtype, options)


@pytest.mark.parametrize("changes", CHANGING.values(), ids=CHANGING)
def test_what_may_change_the_model_is_refused_until_it_is_ignored(changes: dict[str, Any]) -> None:
    with pytest.raises(ConversionError, match="which no release of Megatron-LM knows") as caught:
        described(**changes)
    text = str(caught.value)
    assert all(f"{name}={value!r}" in text for name, value in changes.items())
    assert text.endswith(f"--ignore-args {','.join(sorted(changes))}")
    first = min(changes)
    if len(changes) > 1:
        with pytest.raises(ConversionError) as caught:
            described(MegatronReadOptions(ignore_args=(first,)), **changes)
        assert first not in str(caught.value).rpartition("--ignore-args")[2]
    spec, notes = described(MegatronReadOptions(ignore_args=tuple(changes)), **changes)
    assert spec == described()[0]
    assert sum("ignored, as --ignore-args says" in note for note in notes) == len(changes)


@pytest.mark.parametrize("changes", HARMLESS.values(), ids=HARMLESS)
def test_what_changes_nothing_is_passed_over(changes: dict[str, Any]) -> None:
    assert described(**changes) == described()


def test_no_configuration_of_megatron_core_is_foreign() -> None:
    """All fields of its configurations, of the release that is installed, at any value that is set."""
    (core,) = (Path(folder) / "core" for folder in importlib.import_module("megatron").__path__)
    files = ("transformer/transformer_config", "model_parallel_config", "optimizer/optimizer_config")
    files += ("distributed/distributed_data_parallel_config",)
    nodes = (node for file in files for node in ast.walk(ast.parse((core / f"{file}.py").read_text())))
    names = {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    assert len(names) > 300
    assert list(foreign(dict.fromkeys(names, "set"))) == []


def test_what_upstream_has_and_no_model_here() -> None:
    for name, value in {
        "enable_mhc_connections": True,
        "moe_shared_expert_glu_interleave_size": 32,
        "moe_router_topk_limited_devices": 2,
    }.items():
        with pytest.raises(ConversionError, match=f"{name}={value}"):
            described(**{name: value})


LLAMA3 = {
    **{"rope_scaling_type": "llama3", "rope_scaling_factor": 32.0},
    **{"low_freq_factor": 2.0, "high_freq_factor": 5.0, "original_max_position_embeddings": 4096.0},
}
SHORT = [1.0, 1.5]


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        (LLAMA3, RopeScaling("llama3", 32.0, 2.0, 5.0, 4096)),
        (
            # MindSpeed-LLM has split the text by the time that it saves the args.
            {
                **{"rope_scaling_type": "longrope", "short_factor": SHORT, "long_factor": "2.0,3.0"},
                "rope_scaling_original_max_position_embeddings": 8,
            },
            ("longrope", (1.0, 1.5), (2.0, 3.0), 8),
        ),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, RopeScaling("linear", 4.0)),
        (
            {
                "rope_scaling": {
                    **{"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
                    "original_max_position_embeddings": 8192,
                }
            },
            RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
        ),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 10000.0}}, None),
    ],
    ids=["llama3", "longrope", "ms-swift's linear", "ms-swift's llama3", "ms-swift's default"],
)
def test_scaling_of_other_programs(changes: dict[str, Any], scaling: Any) -> None:
    found = described(MegatronReadOptions(families=("llama", "minicpm")), **changes)[0].values["rope_scaling"]
    names = ("kind", "short_factor", "long_factor", "original_max_position_embeddings")
    assert scaling in (found, tuple(getattr(found, name, None) for name in names))


def test_scaling_without_its_constants() -> None:
    with pytest.raises(ConversionError, match="low_freq_factor is None; it must be a number"):
        described(**{**LLAMA3, "low_freq_factor": None})


def test_an_option_without_effect_is_said() -> None:
    notes = described(MegatronReadOptions(ignore_args=("num_layers", "sliding_window")))[1]
    assert "warning: --ignore-args num_layers,sliding_window: the args have nothing of this that is refused" in notes


def test_a_reference_is_the_way_out_too(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = hf_model("llama2")
    checkpoint = hf_to_megatron(folder, tmp_path / "megatron")
    args = vars(rank_content(checkpoint)["args"])
    edit_rank(checkpoint, "mp_rank_00", args=argparse.Namespace(**{**args, "sliding_window": 32}))
    refused(verb("inspect", checkpoint), "sliding_window=32", "--hf-config DIR", "--ignore-args sliding_window")
    refused(verb("verify", folder, checkpoint), "sliding_window=32", code=2)
    run = succeeded(verb("inspect", checkpoint, "--hf-config", folder))
    assert f"sliding_window=32, which no release of Megatron-LM knows: {folder / 'config.json'} must say" in run.out
    run = succeeded(verb("verify", folder, checkpoint, "--ignore-args", "sliding_window"))
    assert "ignored, as --ignore-args says" in run.out and "EQUAL" in run.out
    refused(verb("inspect", checkpoint, "--hf-config", folder, "--prefer-args"), "sliding_window=32")
    refused(verb("inspect", folder, "--ignore-args", "x"), "--ignore-args is for reading a Megatron-LM", code=2)

"""Qwen3.5's text models: blocks of their projections, experts in one tensor or in many, multi-token prediction, configurations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_converters.basics.errors import ConversionError
from megatron_converters.families.config_json import config_from_spec, spec_from_config
from megatron_converters.formats.megatron.arguments import inexpressible
from tests.conversions import different, hf_to_megatron, megatron_to_hf
from tests.helpers import config_of, hf_tensors, succeeded, verb
from tests.oracle import by_hand_kinds
from tests.oracle.families import MODELS
from tests.oracle.hf import TOKENS, difference
from tests.oracle.pool import MegatronPool
from tests.oracle.prediction import with_prediction
from tests.oracle.wrappers import make_wrapper, text_logits
from tests.test_hf_config import facts, ours, theirs
from tests.test_proof_kinds import TOLERANCE, assert_same_files

Models = Callable[..., Path]
MIXTURE = "qwen3.5-moe"
PREDICTION_NORMS = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
_ROPE = {"rope_theta": 10000000, "rope_type": "default", "partial_rotary_factor": 0.25}
_MROPE = {**_ROPE, "mrope_interleaved": True, "mrope_section": [11, 11, 10]}
_COMMON: dict[str, Any] = {
    **{"attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True, "dtype": "bfloat16"},
    **{"eos_token_id": 248044, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu"},
    **{"initializer_range": 0.02, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16},
    **{"linear_value_head_dim": 128, "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144},
    **{"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "rms_norm_eps": 1e-06, "use_cache": True},
    **{"vocab_size": 248320, "rope_parameters": _MROPE, "mlp_only_layers": [], "tie_word_embeddings": False},
}
#: Text parts of published configurations.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen3.5-27B": {
        **{**_COMMON, "model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"], "hidden_size": 5120},
        **{"intermediate_size": 17408, "linear_num_value_heads": 48, "num_attention_heads": 24},
        **{"num_hidden_layers": 64, "num_key_value_heads": 4, "output_gate_type": "swish"},
    },
    "Qwen3.5-35B-A3B": {
        **{**_COMMON, "model_type": "qwen3_5_moe_text", "architectures": ["Qwen3_5MoeForCausalLM"]},
        **{"hidden_size": 2048, "linear_num_value_heads": 32, "moe_intermediate_size": 512, "num_experts": 256},
        **{"num_experts_per_tok": 8, "num_hidden_layers": 40, "num_attention_heads": 16, "num_key_value_heads": 2},
        **{"router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512, "output_router_logits": False},
    },
}


@pytest.mark.parametrize("family", ["qwen3.5", MIXTURE])
def test_every_rank_s_file_is_that_of_a_conversion_by_hand(hf_model: Models, tmp_path: Path, family: str) -> None:
    ours = hf_to_megatron(
        hf_model(family), tmp_path / "ours", **{"expert_layout": "sequential", "divisor": 16, **MODELS[family].cut}
    )
    experts = dict(expert_model_parallel_size=2, expert_tensor_parallel_size=1) if family == MIXTURE else {}
    sizes = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, transformer_impl="transformer_engine")
    assert_same_files(by_hand_kinds.convert(hf_model(family), tmp_path / "by-hand", **sizes, **experts), ours)


def packed(tensors: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Tensors in which the experts of layers whose names begin with `where` are stacked in two, as Qwen publishes them."""
    found = dict(tensors)
    for first in [name for name in tensors if name.startswith(where) and ".mlp.experts.0.gate_proj." in name]:
        mlp = first.partition(".experts.0.")[0]
        count = sum(name.startswith(f"{mlp}.experts.") and ".gate_proj." in name for name in tensors)
        parts = {
            part: torch.stack([found.pop(f"{mlp}.experts.{expert}.{part}_proj.weight") for expert in range(count)])
            for part in ("gate", "up", "down")
        }
        found[f"{mlp}.experts.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        found[f"{mlp}.experts.down_proj"] = parts["down"]
    return found


@pytest.fixture(scope="module")
def predicting(hf_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixture with a layer of multi-token prediction and each expert's tensors of its own."""
    return with_prediction(MIXTURE, hf_model, tmp_path_factory.mktemp("predicting") / "hf")


def test_layers_of_multi_token_prediction_go_both_ways(
    megatron_pool: MegatronPool, predicting: Path, logits: Any, tmp_path: Path
) -> None:
    """Strict loading covers the layer's names and shapes; the model's logits do not depend on it."""
    cut = dict(MODELS[MIXTURE].cut, megatron_version="0.16")
    files = hf_to_megatron(predicting, tmp_path / "files", **cut)
    assert difference(megatron_pool.logits(files, TOKENS), logits(MIXTURE)) < TOLERANCE
    state = torch.load(sorted(files.glob("iter_0000001/*_001*/*.pt"))[0], weights_only=False)["model"]
    tensors = hf_tensors(predicting)
    assert torch.equal(state["mtp.layers.0.enorm.weight"], tensors["mtp.pre_fc_norm_embedding.weight"])
    assert torch.equal(state["mtp.layers.0.eh_proj.weight"], tensors["mtp.fc.weight"][:32])
    back = megatron_to_hf(files, tmp_path / "back")
    assert different(tensors, hf_tensors(back)) == []
    assert json.loads((back / "config.json").read_text())["mtp_num_hidden_layers"] == 1


@pytest.mark.parametrize("where", ["model.", ("model.", "mtp.")], ids=["Qwen3.5", "Qwen3.6"])
def test_experts_may_be_packed_in_some_layers_and_not_in_others(predicting: Path, tmp_path: Path, where: Any) -> None:
    """Qwen3.5 packs those of the model, and Qwen3.6 those of multi-token prediction, too."""
    folder = tmp_path / "hf"
    folder.mkdir()
    tensors = packed(hf_tensors(predicting), where)
    assert ("mtp.layers.0.mlp.experts.gate_up_proj" in tensors) == (where != "model.")
    assert "model.layers.3.mlp.experts.down_proj" in tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").symlink_to(predicting / "config.json")
    back = megatron_to_hf(hf_to_megatron(folder, tmp_path / "files", **MODELS[MIXTURE].cut), tmp_path / "back")
    assert different(hf_tensors(predicting), hf_tensors(back)) == []
    succeeded(verb("convert", tmp_path / "files", tmp_path / "packed", "--expert-layout", "fused"))
    both = packed(hf_tensors(predicting), ("model.", "mtp."))
    assert different(both, hf_tensors(tmp_path / "packed")) == []


def test_a_published_model_has_its_text_part_in_a_wrapper(megatron_pool: MegatronPool, tmp_path: Path) -> None:
    """With experts in one tensor, and a layer of multi-token prediction beside the text part."""
    plain, folder = make_wrapper("qwen3_5_moe", tmp_path / "plain"), tmp_path / "hf"
    tensors, last = hf_tensors(plain), "model.language_model.layers.1."
    generator = torch.Generator().manual_seed(7)
    separate = {
        **tensors,
        **{name.replace(last, "mtp.layers.0."): value.clone() for name, value in tensors.items() if last in name},
        **{f"mtp.{name}.weight": torch.randn(32, generator=generator) for name in PREDICTION_NORMS},
        "mtp.fc.weight": torch.randn(32, 64, generator=generator),
    }
    folder.mkdir()
    save_file(packed(separate, "model."), folder / "model.safetensors", metadata={"format": "pt"})
    config = config_of(plain)
    config["text_config"]["mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    files = hf_to_megatron(folder, tmp_path / "files", **MODELS[MIXTURE].cut, megatron_version="0.16")
    assert difference(megatron_pool.logits(files, TOKENS), text_logits(plain, TOKENS)) < TOLERANCE
    back = megatron_to_hf(files, tmp_path / "back")
    assert different(separate, hf_tensors(back)) == []
    assert config_of(back) == config


def test_a_norm_that_rounds_when_1_is_taken_from_it_is_said(hf_model: Models, tmp_path: Path) -> None:
    """In bfloat16 half of the numbers between a quarter and a half do not come back; 155/512 is one."""
    plain, folder = hf_model("qwen3.5", dtype="bfloat16"), tmp_path / "hf"
    folder.mkdir()
    tensors = load_file(plain / "model.safetensors")
    name = "model.layers.1.linear_attn.norm.weight"
    tensors[name][:2] = torch.tensor([155 / 512, 154 / 512])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").symlink_to(plain / "config.json")
    run = succeeded(verb("convert", folder, tmp_path / "files"))
    assert "delta_norm: computing back would not restore the bits of 1 element in 1 tensor" in run.out
    back = hf_tensors(megatron_to_hf(tmp_path / "files", tmp_path / "back"))
    assert different(tensors, back) == [name]
    assert (back[name] != tensors[name]).tolist() == [True] + [False] * 11


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_what_it_is_to_transformers(name: str) -> None:
    """Sections of rotary embeddings aside: rows of positions are equal in texts."""
    values = PUBLISHED[name]
    spec = spec_from_config(values)
    assert ours(spec) == facts(theirs({**values, "rope_parameters": _ROPE}))
    assert len(spec.mtp) == 1
    assert spec_from_config(config_from_spec(spec)) == spec
    assert inexpressible(spec) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"attention_bias": True},
        {"attn_output_gate": False},
        {"output_gate_type": "sigmoid"},
        {"mtp_use_dedicated_embeddings": True},
        {"norm_topk_prob": False},
        {"mlp_only_layers": [1]},
        {"layer_types": ["linear_attention"] * 40},
    ],
)
def test_what_cannot_be_converted_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConversionError, match=next(iter(fields)) if "layer_types" not in fields else "full attention"):
        spec_from_config({**PUBLISHED["Qwen3.5-35B-A3B"], **fields})

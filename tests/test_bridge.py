"""AutoBridge in one process: live models compute what transformers computes, and their export is the source."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_converters.basics.errors import ConversionError
from megatron_converters.bridge import AutoBridge, UnsupportedModel
from tests.conversions import different
from tests.helpers import hf_tensors
from tests.live_process import live
from tests.oracle.hf import FAMILIES, MOE_FAMILIES, hf_logits, sample_tokens
from tests.oracle.hf_kinds import FOLDED, KINDS
from tests.oracle.minicpm import LONGROPE, make_minicpm
from tests.oracle.prediction import with_prediction
from tests.test_hf_names import renamed, zero_bias

HFModel = Callable[..., Path]
TOKENS = sample_tokens(length=40)
TOLERANCE = 1e-5
#: Of float32: a multiplier is applied and taken back, each time rounded.
ROUNDING = 3e-7
#: Families that no local layers of megatron-core can be, and what is said.
IMPOSSIBLE = {
    "qwen3-next": "from Transformer Engine's layers alone.*install transformer_engine",
    "glm-5": "from Transformer Engine's layers alone.*install transformer_engine",
}
EXACT = sorted({*FAMILIES, *MOE_FAMILIES, *KINDS, "smollm3-window"} - {*IMPOSSIBLE, "granite", "granite-untied"})
ROUNDED = ["granite", "granite-untied", *FOLDED]


def logits(model: torch.nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """Logits [B, S, V] of a live model."""
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1)
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(tokens, positions, attention_mask=None)
    return found.float()


def built(folder: Path, **options: Any) -> tuple[AutoBridge, torch.nn.Module]:
    """Bridge of a folder, and its only model."""
    bridge = AutoBridge.from_hf_pretrained(folder, **options)
    (model,) = bridge.to_megatron_model(wrap_with_ddp=False)
    return bridge, model


def agree(model: torch.nn.Module, reference: Path) -> None:
    """Assert that a live model computes what transformers computes of a folder."""
    theirs = hf_logits(reference, TOKENS)
    assert float((logits(model) - theirs).abs().max() / theirs.abs().max()) < TOLERANCE


def exported(bridge: AutoBridge, model: Any, **options: Any) -> dict[str, torch.Tensor]:
    """Weights of an export by name; none comes twice."""
    found = list(bridge.export_hf_weights(model, show_progress=False, **options))
    weights = {each.param_name: each.weight for each in found}
    assert len(weights) == len(found)
    return weights


def almost(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Assert the same names, dtypes, shapes, and values but for the rounding of float32."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.allclose(tensor, theirs[name], rtol=ROUNDING, atol=0), name


@pytest.fixture(params=EXACT)
def exact(request: pytest.FixtureRequest, hf_model: HFModel) -> Path:
    return hf_model(request.param)


@pytest.fixture(params=ROUNDED)
def rounded(request: pytest.FixtureRequest, hf_model: HFModel) -> Path:
    return hf_model(request.param)


@pytest.fixture(params=IMPOSSIBLE)
def impossible(request: pytest.FixtureRequest, hf_model: HFModel) -> tuple[Path, str]:
    return hf_model(request.param), IMPOSSIBLE[request.param]


@pytest.fixture
def sparse(hf_model: HFModel) -> Path:
    return hf_model("glm-5")


@pytest.fixture
def llama(hf_model: HFModel, tmp_path: Path) -> Path:
    """Copy of a Llama that a test may change."""
    return Path(shutil.copytree(hf_model("llama2"), tmp_path / "llama"))


@pytest.fixture
def predicting(hf_model: HFModel, tmp_path: Path) -> Path:
    return with_prediction("deepseek-v3", hf_model, tmp_path / "hf")


@live
def test_models_compute_the_same_and_export_the_source(exact: Path) -> None:
    bridge, model = built(exact)
    agree(model, exact)
    assert different(exported(bridge, model), hf_tensors(exact)) == []


@live
def test_what_no_release_here_builds_is_refused_with_transformer_engine_too(sparse: Path) -> None:
    there = mock.patch("megatron_converters.live.providing.has_engine", return_value=True)
    with there, pytest.raises(ConversionError, match=r"(?s)cannot be built here with.*dsa_indexer_topk=40"):
        AutoBridge.from_hf_pretrained(sparse).to_megatron_provider()


@live
def test_multipliers_are_folded_and_taken_back_within_rounding(rounded: Path) -> None:
    bridge, model = built(rounded)
    agree(model, rounded)
    almost(exported(bridge, model), hf_tensors(rounded))


@live
@pytest.mark.parametrize("tied", [True, False])
def test_minicpm_computes_what_its_granite_computes(tmp_path: Path, tied: bool) -> None:
    folder, granite = make_minicpm(tmp_path, tied=tied)
    bridge, model = built(folder)
    agree(model, granite)
    almost(exported(bridge, model), hf_tensors(folder))


@live
def test_layers_of_multi_token_prediction_are_loaded_and_exported(predicting: Path, exact_deepseek: Path) -> None:
    bridge, model = built(predicting)
    agree(model, exact_deepseek)
    assert different(exported(bridge, model), hf_tensors(predicting)) == []


@pytest.fixture
def exact_deepseek(hf_model: HFModel) -> Path:
    return hf_model("deepseek-v3")


@pytest.fixture(params=["bfloat16", "float16"])
def half(request: pytest.FixtureRequest, hf_model: HFModel) -> Path:
    return hf_model("qwen3-moe", dtype=request.param)


@live
def test_half_precision_is_exported_bit_for_bit(half: Path) -> None:
    bridge, model = built(half)
    assert {parameter.dtype for parameter in model.parameters()} == {hf_tensors(half)["lm_head.weight"].dtype}
    assert different(exported(bridge, model), hf_tensors(half)) == []


@pytest.fixture
def unbiased(hf_model: HFModel, tmp_path: Path) -> Path:
    """Llama whose output biases are 0."""
    return zero_bias(hf_model("llama2", attention_bias=True, num_hidden_layers=2), tmp_path / "hf")


@live
def test_output_biases_that_are_0_are_none_in_megatron_and_come_back(unbiased: Path, tmp_path: Path) -> None:
    odd = renamed(unbiased, tmp_path / "odd", lambda name: f"_orig_mod.{name}")
    bridge, model = built(odd)
    agree(model, unbiased)
    with pytest.raises(ConversionError, match=r"cannot be exported from it:\n.*o_proj\.bias"):
        exported(bridge, model)
    bridge.save_hf_pretrained(model, tmp_path / "back")
    found = hf_tensors(tmp_path / "back")
    assert found.keys() == hf_tensors(unbiased).keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in hf_tensors(unbiased).items())


@live
def test_models_that_megatron_s_local_layers_cannot_be(impossible: tuple[Path, str]) -> None:
    folder, text = impossible
    with pytest.raises(ConversionError, match=text):
        AutoBridge.from_hf_pretrained(folder).to_megatron_model()


@live
def test_longrope_has_no_flag_in_megatron(tmp_path: Path) -> None:
    folder, _ = make_minicpm(tmp_path, rope=LONGROPE, tied=False)
    with pytest.raises(ConversionError, match="LongRoPE: each rotary frequency has a divisor of its own"):
        AutoBridge.from_hf_pretrained(folder).to_megatron_provider()


@live
def test_yarn_outside_latent_attention_is_the_provider_s(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    table = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 16,
        "truncate": False,
    }
    (llama / "config.json").write_text(json.dumps({**config, "rope_parameters": None, "rope_scaling": table}))
    provider = AutoBridge.from_hf_pretrained(llama).to_megatron_provider(load_weights=False)
    assert provider.position_embedding_type == "yarn"
    names = (
        "rotary_scaling_factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
    )
    assert [getattr(provider, f"yarn_{name}") for name in names] == [4.0, 16, 16.0, 1.0, 1.0, 0.0]
    assert provider.yarn_correction_range_round_to_int is False


# -- models that are none, or others


def test_unsupported_models_are_refused_with_the_supported_ones(llama: Path) -> None:
    supported = AutoBridge.list_supported_models()
    assert "LlamaForCausalLM" in supported and supported == sorted(supported)
    config = json.loads((llama / "config.json").read_text())
    other = {**config, "model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (llama / "config.json").write_text(json.dumps(other))
    for refuse in (
        lambda: AutoBridge.from_hf_pretrained(llama),
        lambda: AutoBridge.from_hf_config(other),
    ):
        with pytest.raises(ValueError, match=r"(?s)Mamba.*supported models: .*LlamaForCausalLM") as raised:
            refuse()
        assert isinstance(raised.value, UnsupportedModel)
        assert all(name in str(raised.value) for name in supported)
    assert not AutoBridge.can_handle(llama)
    assert not AutoBridge.supports(other)
    assert AutoBridge.supports(config)


def test_folders_that_are_no_model_are_refused_alike(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        with pytest.raises(ValueError, match=f"(?s){name}.*supported models: "):
            AutoBridge.from_hf_pretrained(tmp_path / name)
        assert not AutoBridge.can_handle(tmp_path / name)
    (llama / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        AutoBridge.from_hf_pretrained(llama)
    assert not AutoBridge.can_handle(str(llama), trust_remote_code=True)


def test_tensors_that_are_not_the_model_s_are_all_named(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.renamed.weight"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="supported models") as raised:
        AutoBridge.from_hf_pretrained(llama)
    assert all(name in str(raised.value) for name in ("model.renamed.weight", "model.norm.weight", "lm_head.weight"))


def _rename(model: Any) -> None:
    model.decoder.layers[1].mlp.down = model.decoder.layers[1].mlp.linear_fc2
    del model.decoder.layers[1].mlp.linear_fc2


def _misshape(model: Any) -> None:
    model.output_layer.weight = torch.nn.Parameter(torch.zeros(201, 64))


def _lose(model: Any) -> None:
    del model.decoder.final_layernorm


CHANGES: dict[str, tuple[Callable[[Any], None], list[str]]] = {
    "renamed": (
        _rename,
        [
            "decoder.layers.1.mlp.linear_fc2.weight is missing",
            "decoder.layers.1.mlp.down.weight is no tensor of this model",
        ],
    ),
    "misshapen": (_misshape, ["output_layer.weight has shape [201, 64], not [199, 64]"]),
    "missing": (_lose, ["decoder.final_layernorm.weight is missing"]),
}


@live
def test_parameters_that_do_not_match_are_all_named(llama: Path) -> None:
    for change in (*((one,) for one in CHANGES), tuple(CHANGES)):
        bridge, model = built(llama)
        for name in change:
            CHANGES[name][0](model)
        for use in (lambda: exported(bridge, model), lambda: bridge.load_hf_weights([model])):  # noqa: B023
            with pytest.raises(ConversionError) as raised:
                use()
            assert all(text in str(raised.value) for name in change for text in CHANGES[name][1]), change
    bridge, model = built(llama)
    _misshape(model)
    with torch.no_grad():
        model.embedding.word_embeddings.weight.zero_()
    bridge.load_hf_weights([model], allowed_mismatched_params=["output_layer.weight"])
    assert torch.equal(model.embedding.word_embeddings.weight, hf_tensors(llama)["model.embed_tokens.weight"])
    assert not model.output_layer.weight.any()


@live
def test_models_with_other_layers_are_refused(llama: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(llama)
    provider = bridge.to_megatron_provider()
    provider.num_layers = 3
    with pytest.raises(ConversionError, match="3 layers"):
        provider(wrap_with_ddp=False)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.num_layers = 3
    (model,) = provider(wrap_with_ddp=False)
    assert len(model.decoder.layers) == 3
    for use in (lambda: bridge.load_hf_weights([model]), lambda: exported(bridge, model)):
        with pytest.raises(ConversionError, match="3 layers"):
            use()
    for nothing in (None, [], "model", torch.nn.Linear(2, 2)):
        with pytest.raises(ConversionError):
            exported(bridge, nothing)

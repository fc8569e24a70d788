"""Names and arguments of AutoBridge, those of Megatron-Bridge's first guide and of its later releases."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_converters.basics.errors import ConversionError, UsageError
from megatron_converters.bridge import AutoBridge, CausalLMBridge, WeightDistributionMode
from tests.conversions import different
from tests.helpers import hf_tensors
from tests.live_process import live
from tests.oracle.hf import make_model
from tests.test_bridge import agree, built, exported, logits

HFModel = Callable[..., Path]


@pytest.fixture
def llama(hf_model: HFModel) -> Path:
    return hf_model("llama2")


@pytest.fixture
def gpt2(hf_model: HFModel) -> Path:
    return hf_model("gpt2")


@pytest.fixture
def deepseek(hf_model: HFModel) -> Path:
    return hf_model("deepseek-v3")


def test_the_old_name_and_its_lists_are_the_same() -> None:
    assert CausalLMBridge is AutoBridge
    assert AutoBridge.get_supported_bridges() == AutoBridge.list_supported_models()


# -- opening


def test_loading_options(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "megatron.bridge.models"):
        AutoBridge.from_hf_pretrained(
            str(llama),
            device_map="auto",
            attn_implementation="flash_attention_2",
            load_in_8bit=True,
            trust_remote_code=True,
            torch_dtype="auto",
        )
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("attn_implementation, device_map, load_in_8bit: not heeded")
    for unknown in ({"devcie_map": "auto"}, {"num_labels": 2}):
        with pytest.raises(TypeError, match=next(iter(unknown))):
            AutoBridge.from_hf_pretrained(llama, **unknown)
    for dtype in (torch.int8, "float99"):
        with pytest.raises(ConversionError, match="dtype"):
            AutoBridge.from_hf_pretrained(llama, torch_dtype=dtype)


@live
@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
def test_torch_dtype_casts_as_torch_does(llama: Path, name: str) -> None:
    bridge, model = built(llama, **{name: torch.bfloat16})
    cast = {key: value.bfloat16() for key, value in hf_tensors(llama).items()}
    assert different(exported(bridge, model), cast) == []
    assert bridge.transformer_config.params_dtype is torch.bfloat16
    assert bridge.transformer_config.bf16


@live
def test_bridges_of_a_configuration(llama: Path) -> None:
    from transformers import AutoConfig

    configs = (AutoConfig.from_pretrained(llama), json.loads((llama / "config.json").read_text()))
    for config in configs:
        assert AutoBridge.supports(config)
        bridge = CausalLMBridge.from_hf_config(config)
        assert bridge.transformer_config.hidden_size == 64
        (model,) = bridge.to_megatron_model(load_weights=False, wrap_with_ddp=False)
        assert torch.isfinite(logits(model)).all()
        for load in (bridge.to_megatron_model, lambda: bridge.load_hf_weights(model)):  # noqa: B023
            with pytest.raises(ConversionError, match="made of a configuration, which has no weights"):
                load()
        assert bridge.load_hf_weights([model], str(llama)) == [model]
        agree(model, llama)
        (model,) = bridge.to_megatron_model(True, str(llama), wrap_with_ddp=False)
        agree(model, llama)
    for nothing in (None, "llama", 3):
        assert not AutoBridge.supports(nothing)
        with pytest.raises(TypeError, match="is no configuration"):
            AutoBridge.from_hf_config(nothing)


# -- providers


@live
def test_configs_are_megatron_s(llama: Path, deepseek: Path) -> None:
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    bridge = AutoBridge.from_hf_pretrained(llama)
    config = bridge.transformer_config
    assert isinstance(config, TransformerConfig)
    assert (config.num_layers, config.num_query_groups, config.ffn_hidden_size) == (4, 4, 112)
    assert config.layernorm_epsilon == 1e-5
    with pytest.raises(ConversionError, match="no multi-latent attention"):
        _ = bridge.mla_transformer_config
    latent = AutoBridge.from_hf_pretrained(deepseek).mla_transformer_config
    assert isinstance(latent, MLATransformerConfig)
    assert (latent.kv_lora_rank, latent.num_moe_experts) == (24, 8)


@live
def test_providers_may_be_changed_before_models_are_built(llama: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(llama)
    provider = bridge.to_megatron_provider()
    provider.seq_length = 77
    provider.bias_activation_fusion = True
    provider.bias_dropout_fusion = True
    provider.recompute_granularity, provider.recompute_method, provider.recompute_num_layers = "full", "uniform", 1
    (model,) = provider(wrap_with_ddp=False)
    assert (model.max_sequence_length, model.config.recompute_num_layers) == (77, 1)
    agree(model, llama)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.num_layers = 2
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    assert len(model.decoder.layers) == 2
    provider = bridge.to_megatron_provider()
    provider.transformer_impl = "banana"
    with pytest.raises(ConversionError, match="'banana' is neither 'local' nor 'transformer_engine'"):
        provider(wrap_with_ddp=False)


@live
def test_finalized_providers_compute_the_same_whatever_is_switched_after(gpt2: Path) -> None:
    provider = AutoBridge.from_hf_pretrained(gpt2).to_megatron_provider()
    for fused in (False, True, False):
        provider.bias_activation_fusion = fused
        provider.finalize()
        (model,) = provider(wrap_with_ddp=False)
        agree(model, gpt2)


@live
def test_fusion_of_the_exact_gelu_is_refused(tmp_path: Path) -> None:
    folder = make_model("gpt2", tmp_path / "exact", activation_function="gelu")
    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
    provider.finalize()
    (model,) = provider(wrap_with_ddp=False)
    agree(model, folder)
    provider.bias_activation_fusion = True
    for build in (provider.finalize, lambda: provider(wrap_with_ddp=False)):
        with pytest.raises(ConversionError, match="tanh form of GELU, but this model has the exact form"):
            build()


@live
def test_hooks_see_the_loaded_models(llama: Path) -> None:
    seen: list[Any] = []

    def hook(number: int) -> Callable[[list[torch.nn.Module]], None]:
        return lambda models: seen.append((number, models[0].output_layer.weight.clone()))

    provider = AutoBridge.from_hf_pretrained(llama).to_megatron_provider()
    provider.register_pre_wrap_hook(hook(2))
    provider.register_pre_wrap_hook(hook(1), prepend=True)
    (model,) = provider.provide_distributed_model(
        wrap_with_ddp=True, pre_wrap_hook=hook(3), post_wrap_hook=lambda models: seen.append((4, models[0]))
    )
    assert [number for number, _ in seen] == [1, 2, 3, 4]
    assert all(torch.equal(weight, hf_tensors(llama)["lm_head.weight"]) for _, weight in seen[:3])
    assert seen[3][1] is model
    assert type(model).__name__ == "DistributedDataParallel"
    agree(model, llama)
    assert different(exported(AutoBridge.from_hf_pretrained(llama), model), hf_tensors(llama)) == []


@live
def test_get_model_takes_the_bridge_s_own_config_or_a_changed_one(llama: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(llama)
    config = bridge.get_model_config()
    config.seq_length = 99
    (model,) = bridge.get_model(config, wrap_with_ddp=False)
    assert model.max_sequence_length == 99
    for built_model in (model, *bridge.get_model(wrap_with_ddp=False)):
        agree(built_model, llama)
    (empty,) = bridge.get_model(bridge.get_model_config(), load_weights=False, wrap_with_ddp=False)
    assert different(exported(bridge, empty), hf_tensors(llama)) != []
    with pytest.raises(NotImplementedError, match="pg_collection"):
        bridge.get_model(pg_collection=object())


@live
def test_weights_of_another_folder(llama: Path, gpt2: Path, tmp_path: Path) -> None:
    other = make_model("llama2", tmp_path / "other", seed=1)
    bridge, model = built(llama)
    assert bridge.load_hf_weights(model, other) == [model]
    assert different(exported(bridge, model), hf_tensors(other)) == []
    (model,) = bridge.to_megatron_model(hf_path=str(other), wrap_with_ddp=False)
    agree(model, other)
    wider = make_model("llama2", tmp_path / "wider", intermediate_size=128)
    for wrong, text in ((gpt2, "family"), (wider, "ffn_hidden_size.*112.*128")):
        for load in (bridge.to_megatron_provider, lambda hf_path: bridge.load_hf_weights(model, hf_path)):
            with pytest.raises(ConversionError, match=f"(?s)holds the weights of another model:.*{text}"):
                load(hf_path=wrong)


@live
def test_other_settings_of_another_folder_are_said(llama: Path, tmp_path: Path) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("megatron.bridge.models").addHandler(handler)
    other = make_model("llama2", tmp_path / "other", rms_norm_eps=1e-6)
    AutoBridge.from_hf_pretrained(llama).to_megatron_provider(hf_path=str(other))
    (record,) = [each for each in records if each.levelno == logging.WARNING]
    assert "settings that are not heeded: " in record.getMessage() and "epsilon" in record.getMessage()


# -- exports


@live
def test_dtypes_of_exported_weights(llama: Path) -> None:
    bridge, model = built(llama)
    for dtype in ("bfloat16", torch.float16, "torch.float64"):
        kind = getattr(torch, str(dtype).removeprefix("torch."))
        cast = {key: value.to(kind) for key, value in hf_tensors(llama).items()}
        assert different(exported(bridge, model, weight_dtype=dtype), cast) == []
    for wrong in (torch.int8, "float99"):
        with pytest.raises(ConversionError, match="dtype"):
            exported(bridge, model, weight_dtype=wrong)
    with torch.no_grad():
        model.decoder.final_layernorm.weight[3] = 70000.0
    assert torch.isfinite(exported(bridge, model, weight_dtype="bfloat16")["model.norm.weight"]).all()
    with pytest.raises(ConversionError, match=r"model\.norm\.weight holds values beyond the range of float16"):
        exported(bridge, model, weight_dtype=torch.float16)


@live
def test_modes_and_orders_in_one_process(llama: Path) -> None:
    bridge, model = built(llama)
    wanted = hf_tensors(llama)
    modes = ["consolidate", "replicate", "distribute", WeightDistributionMode.REPLICATE, None]
    for mode in modes:
        for order in ("safetensors", "model", None):
            assert different(exported(bridge, model, order=order, mode=mode, cpu=True), wanted) == []
    assert different(exported(bridge, model, bucket_bytes=1), wanted) == []
    assert different(exported(bridge, model, current_pp_stage_only=True), wanted) == []
    for name in ("mode", "order"):
        with pytest.raises(UsageError, match=f"{name} 'banana' is not one of"):
            exported(bridge, model, **{name: "banana"})
    with pytest.raises(UsageError, match="bucket_bytes"):
        exported(bridge, model, bucket_bytes=0)
    first = next(iter(bridge.export_hf_weights(model, True, False, None, True, None)))
    assert first == (first.param_name, first.weight)  # positional, as in 0.6


@live
def test_exported_weights_are_tensors_of_their_own(llama: Path) -> None:
    bridge, model = built(llama)
    weights = exported(bridge, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert different(weights, hf_tensors(llama)) == []
    assert not any(weight.requires_grad for weight in weights.values())


@live
def test_tasks_choose_what_is_exported(llama: Path) -> None:
    bridge, model = built(llama)
    tasks = bridge.get_conversion_tasks([model], None)
    assert {task.param_name for task in tasks} == {name for name, _ in model.named_parameters()}
    chosen = [task for task in tasks if task.param_name.endswith("layers.2.self_attention.linear_qkv.weight")]
    weights = exported(bridge, model, conversion_tasks=chosen)
    assert sorted(weights) == [f"model.layers.2.self_attn.{name}_proj.weight" for name in "kqv"]
    assert different(exported(bridge, model, conversion_tasks=tasks), hf_tensors(llama)) == []


@live
def test_names_of_megatron_s_parameters_go_along(llama: Path) -> None:
    bridge, model = built(llama)
    found = list(bridge.export_hf_weights([model], show_progress=False, with_megatron_names=True))
    by_name = {each.param_name: each.megatron_names for each in found}
    assert by_name["model.layers.1.mlp.up_proj.weight"] == ("decoder.layers.1.mlp.linear_fc1.weight",)
    assert {name for names in by_name.values() for name in names} == {name for name, _ in model.named_parameters()}


def test_mappings_are_looked_up_both_ways(llama: Path, gpt2: Path) -> None:
    registry = AutoBridge.from_hf_pretrained(llama)._model_bridge.mapping_registry()
    qkv = registry.megatron_to_hf_lookup("decoder.layers.3.self_attention.linear_qkv.weight")
    assert qkv is not None
    assert qkv.hf_param == tuple(f"model.layers.*.self_attn.{name}_proj.weight" for name in "qkv")
    assert registry.hf_to_megatron_lookup("model.layers.0.self_attn.k_proj.weight") == qkv
    assert qkv in registry.get_mappings_by_pattern("*.self_attention.*")
    assert registry.megatron_to_hf_lookup("nothing") is registry.hf_to_megatron_lookup("nothing") is None
    mappings = registry.get_all_mappings()
    names = {mapping.megatron_param for mapping in mappings}
    assert len(names) == len(mappings) == len(registry.describe().splitlines())
    found = CausalLMBridge.from_hf_pretrained(gpt2)._model_bridge.mapping_registry().get_all_mappings()
    assert "transformer.h.*.attn.c_attn.weight" in {name for mapping in found for name in mapping.hf_param}


def test_adapters_and_quantised_weights_are_not_implemented(llama: Path) -> None:
    bridge = AutoBridge.from_hf_pretrained(llama)
    names = (
        "export_adapter_weights save_hf_adapter export_adapter_ckpt export_hf_weights_quant export_hf_weights_modelopt"
    )
    for name in names.split():
        with pytest.raises(NotImplementedError, match="is not supported"):
            getattr(bridge, name)([], "x", quant_mode="nvfp4")


@live
def test_the_log_of_the_guide_gets_the_records(tmp_path: Path) -> None:
    folder = make_model("llama2", tmp_path / "llama", weights="bin")
    records: list[logging.LogRecord] = []
    log = logging.getLogger("megatron.bridge.models")
    log.setLevel(logging.DEBUG)
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    log.addHandler(handler)
    AutoBridge.from_hf_pretrained(folder).to_megatron_model()
    assert any("no GPU" in record.getMessage() for record in records)

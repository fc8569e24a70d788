"""Families whose code is published with the models: config.json as published, what is refused, and Baichuan2's head."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megatron_converters.basics.errors import ConversionError
from megatron_converters.families.config_json import config_from_spec, config_notes, spec_from_config
from megatron_converters.families.file_rules import RULES
from megatron_converters.model.rotary import RopeScaling
from megatron_converters.storage import safetensors
from megatron_converters.storage.decoding import UnitRows
from tests.conversions import hf_to_megatron, megatron_to_hf
from tests.helpers import hf_tensors, nothing_complete, rank_content, refused, succeeded, verb
from tests.oracle.families.model import publish
from tests.oracle.families.remote import MODELS

Config = dict[str, Any]
Folders = Callable[[str], Path]

_LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
_INTERNLM2: Config = {
    **{
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "attn_implementation": "eager",
        "bias": False,
    },
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "hidden_act": "silu", "hidden_size": 4096},
    **{"initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05},
    **{"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1},
    **{"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 1000000, "tie_word_embeddings": False},
    **{"torch_dtype": "bfloat16", "transformers_version": "4.41.0", "use_cache": True, "vocab_size": 92544},
    "auto_map": {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModel": "modeling_internlm2.InternLM2Model",
    },
}
_EXAONE: Config = {
    **{
        "activation_function": "silu",
        "architectures": ["ExaoneForCausalLM"],
        "attention_dropout": 0.0,
        "head_dim": 128,
    },
    **{"bos_token_id": 1, "embed_dropout": 0.0, "eos_token_id": 361, "hidden_size": 4096, "initializer_range": 0.02},
    **{
        "intermediate_size": 14336,
        "layer_norm_epsilon": 1e-05,
        "max_position_embeddings": 32768,
        "model_type": "exaone",
    },
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "num_layers": 32, "pad_token_id": 0, "rope_theta": 1000000},
    **{"rope_scaling": {**_LLAMA3, "rope_type": "llama3"}, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
    **{"transformers_version": "4.43.0", "use_cache": True, "vocab_size": 102400},
}
_QWEN: Config = {
    **{"architectures": ["QWenLMHeadModel"], "attn_dropout_prob": 0.0, "bf16": False, "emb_dropout_prob": 0.0},
    **{"fp16": False, "fp32": False, "hidden_size": 4096, "intermediate_size": 22016, "initializer_range": 0.02},
    **{"kv_channels": 128, "layer_norm_epsilon": 1e-06, "max_position_embeddings": 8192, "model_type": "qwen"},
    **{
        "no_bias": True,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "onnx_safe": None,
        "rotary_emb_base": 10000,
    },
    **{"rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 8192, "tie_word_embeddings": False},
    **{
        "tokenizer_class": "QWenTokenizer",
        "transformers_version": "4.32.0",
        "use_cache": True,
        "use_dynamic_ntk": True,
    },
    **{"use_flash_attn": "auto", "use_logn_attn": True, "vocab_size": 151936},
}
_QWEN_72B: Config = _QWEN | {
    **{
        "attn_dropout_prob": 0.1,
        "bf16": True,
        "hidden_size": 8192,
        "intermediate_size": 49152,
        "num_hidden_layers": 80,
    },
    **{"num_attention_heads": 64, "padded_vocab_size": 152064, "params_dtype": "torch.bfloat16", "rope_theta": 1000000},
    **{"rotary_emb_base": 1000000, "softmax_in_fp32": False, "tokenizer_type": "QWenTokenizer", "vocab_size": 152064},
    **{"use_cache_kernel": False, "use_cache_quantization": False, "use_dynamic_ntk": False, "use_logn_attn": False},
}
_BAICHUAN: Config = {
    **{"architectures": ["BaiChuanForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu"},
    **{"hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096},
    **{"model_type": "baichuan", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": 0},
    **{
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 64000,
    },
}
_BAICHUAN2: Config = _BAICHUAN | {
    **{"architectures": ["BaichuanForCausalLM"], "tokenizer_class": "BaichuanTokenizer", "model_max_length": 4096},
    **{"_from_model_config": True, "vocab_size": 125696},
}
_CHATGLM3: Config = {
    **{"_name_or_path": "THUDM/chatglm3-6b", "model_type": "chatglm", "architectures": ["ChatGLMModel"]},
    **{"add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True, "attention_dropout": 0.0},
    **{
        "apply_residual_connection_post_layernorm": False,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
    },
    **{"ffn_hidden_size": 13696, "fp32_residual_connection": False, "hidden_dropout": 0.0, "hidden_size": 4096},
    **{"kv_channels": 128, "layernorm_epsilon": 1e-05, "multi_query_attention": True, "multi_query_group_num": 2},
    **{"num_attention_heads": 32, "num_layers": 28, "original_rope": True, "padded_vocab_size": 65024},
    **{"post_layer_norm": True, "rmsnorm": True, "seq_length": 32768, "use_cache": True, "torch_dtype": "float16"},
    **{"transformers_version": "4.30.2", "tie_word_embeddings": False, "eos_token_id": 2, "pad_token_id": 0},
}
_GLM4: Config = _CHATGLM3 | {
    **{"_name_or_path": "THUDM/glm-4-9b-chat", "classifier_dropout": None, "layernorm_epsilon": 1.5625e-07},
    **{"num_layers": 40, "num_hidden_layers": 40, "padded_vocab_size": 151552, "rope_ratio": 500, "seq_length": 131072},
    **{
        "eos_token_id": [151329, 151336, 151338],
        "pad_token_id": 151329,
        "vocab_size": 151552,
        "torch_dtype": "bfloat16",
    },
}
#: config.json as published, and what it means.
PUBLISHED: dict[str, tuple[Config, Config]] = {
    "internlm2_5-7b": (
        _INTERNLM2,
        dict(num_query_groups=8, kv_channels=128, qkv_bias=False, rope_scaling=RopeScaling("dynamic", 2.0)),
    ),
    "EXAONE-3.5-7.8B": (_EXAONE, dict(num_layers=32, rope_scaling=RopeScaling("llama3", **_LLAMA3), tied=False)),
    "EXAONE-3.5-2.4B": (
        {**_EXAONE, "hidden_size": 2560, "head_dim": 80, "intermediate_size": 7168, "tie_word_embeddings": True},
        dict(kv_channels=80, ffn_hidden_size=7168, tied=True),
    ),
    "Qwen-7B": (
        _QWEN,
        dict(ffn_hidden_size=11008, num_query_groups=32, qkv_bias=True, proj_bias=False, rotary_base=10000),
    ),
    "Qwen-72B": (_QWEN_72B, dict(ffn_hidden_size=24576, rotary_base=1000000, norm_epsilon=1e-6)),
    "Baichuan-7B": (_BAICHUAN, dict(family="baichuan", num_query_groups=32, kv_channels=128, rotary_base=10000)),
    "Baichuan2-7B": (_BAICHUAN2, dict(family="baichuan2", max_position_embeddings=4096, vocab_size=125696)),
    "chatglm2-6b": (
        {key: value for key, value in _CHATGLM3.items() if key != "pad_token_id"}
        | {"_name_or_path": "THUDM/chatglm2-6b"},
        dict(rotary_base=10000, max_position_embeddings=32768),
    ),
    "codegeex2-6b": ({**_CHATGLM3, "interleaved_qkv": False, "rotary_percent": 0.5}, dict(rotary_percent=0.5)),
    "chatglm3-6b": (_CHATGLM3, dict(rotary_percent=0.5, rotary_interleaved=True, qkv_bias=True, tied=False)),
    "chatglm3-6b-32k": ({**_CHATGLM3, "rope_ratio": 50}, dict(rotary_base=500000, vocab_size=65024)),
    "glm-4-9b-chat": (_GLM4, dict(rotary_base=5000000, num_layers=40, ffn_hidden_size=13696, num_query_groups=2)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_and_written(name: str) -> None:
    config, facts = PUBLISHED[name]
    spec = spec_from_config(config)
    assert {key: spec.family if key == "family" else spec.values[key] for key in facts} == facts
    written = config_from_spec(spec)
    decided = written.keys() & config.keys()
    assert {key: written[key] for key in decided} == {key: config[key] for key in decided}
    assert spec_from_config(written) == spec


#: What the configuration classes set where config.json leaves a key out; the rest they require.
DEFAULTS: dict[str, tuple[Config, tuple[str, ...], Config]] = {
    "internlm2": (
        _INTERNLM2,
        ("bias", "rms_norm_eps", "max_position_embeddings", "num_key_value_heads", "rope_theta", "rope_scaling"),
        dict(qkv_bias=True, proj_bias=True, norm_epsilon=1e-6, max_position_embeddings=2048, num_query_groups=32),
    ),
    "exaone": (
        _EXAONE,
        ("intermediate_size", "layer_norm_epsilon", "max_position_embeddings", "tie_word_embeddings", "head_dim"),
        dict(ffn_hidden_size=16384, norm_epsilon=1e-5, max_position_embeddings=2048, tied=True, kv_channels=128),
    ),
    "qwen": (
        _QWEN,
        ("kv_channels", "layer_norm_epsilon", "max_position_embeddings", "no_bias", "rotary_pct", "rotary_emb_base"),
        dict(kv_channels=128, norm_epsilon=1e-6, max_position_embeddings=8192, rotary_base=10000, proj_bias=False),
    ),
    "baichuan": (
        _BAICHUAN,
        ("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "hidden_act"),
        dict(norm_epsilon=1e-6, max_position_embeddings=4096, tied=False),
    ),
    "chatglm": (
        _CHATGLM3,
        ("kv_channels", "layernorm_epsilon", "add_qkv_bias", "seq_length", "multi_query_group_num", "rmsnorm"),
        dict(kv_channels=128, norm_epsilon=1e-5, qkv_bias=False, max_position_embeddings=2048, num_query_groups=1),
    ),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_absent_keys_mean_what_the_configuration_class_sets(name: str) -> None:
    config, absent, facts = DEFAULTS[name]
    values = spec_from_config({key: value for key, value in config.items() if key not in absent}).values
    assert {key: values[key] for key in facts} == facts


_ALIBI = "whose attention has ALiBi instead of rotary embeddings; no release of Megatron-LM has that"
REFUSED: dict[str, tuple[Config, str]] = {
    "Baichuan2-13B": (
        {**_BAICHUAN2, "hidden_size": 5120, "num_attention_heads": 40, "max_position_embeddings": None},
        _ALIBI,
    ),
    "Baichuan-13B": (
        {key: value for key, value in _BAICHUAN2.items() if key != "max_position_embeddings"} | {"vocab_size": 64000},
        _ALIBI,
    ),
    "a Baichuan of either generation": (
        {**_BAICHUAN2, "vocab_size": 64000},
        "unclear whether the head is normed; write z_loss_weight: 0 if it is, and BaiChuanForCausalLM if it is a Baichuan-7B",
    ),
    "Baichuan2 as Baichuan": ({**_BAICHUAN, "vocab_size": 125696}, "but has Baichuan2's vocab_size, 125696"),
    "a Baichuan without its class": (
        {key: value for key, value in _BAICHUAN.items() if key != "architectures"},
        "no architectures; add which class it is: BaiChuanForCausalLM or BaichuanForCausalLM",
    ),
    "chatglm2-6b-32k": (
        {**_CHATGLM3, "_name_or_path": "THUDM/chatglm2-6b-32k", "rope_ratio": 4},
        "divides positions by it",
    ),
    "one that may be that": ({**_CHATGLM3, "_name_or_path": "mine", "rope_ratio": 4}, "let _name_or_path say chatglm3"),
    "heads one by one": (
        {key: value for key, value in _CHATGLM3.items() if key != "multi_query_attention"},
        "no multi_query_attention, which means False; only True can be converted",
    ),
    "P-tuning": ({**_CHATGLM3, "pre_seq_len": 128, "prefix_projection": False}, "does not know: pre_seq_len"),
    "quantised ChatGLM": ({**_CHATGLM3, "quantization_bit": 4}, "quantization_bit=4; the architecture has 0"),
    "LayerNorm": ({**_CHATGLM3, "rmsnorm": False}, "rmsnorm=False; only True"),
    "biases of Qwen-1": ({**_QWEN, "no_bias": False}, "no_bias=False; only True"),
    "partial rotary of Qwen-1": ({**_QWEN, "rotary_pct": 0.25}, "rotary_pct=0.25; only 1.0"),
    "an odd MLP": ({**_QWEN, "intermediate_size": 22017}, "intermediate_size=22017; it must be a multiple of 2"),
    "InternLM2 with YaRN": (
        {**_INTERNLM2, "rope_scaling": {"type": "yarn", "factor": 2.0}},
        "supported are default, linear and",
    ),
    "EXAONE with GELU": ({**_EXAONE, "activation_function": "gelu_new"}, "activation_function='gelu_new'; only 'silu'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused_by_name(name: str) -> None:
    config, words = REFUSED[name]
    with pytest.raises(ConversionError) as raised:
        spec_from_config(config)
    assert words in str(raised.value)


def test_what_clears_up_which_model_it_is_is_heeded() -> None:
    extended = {**_BAICHUAN2, "vocab_size": 125698}
    assert spec_from_config({**extended, "z_loss_weight": 0}).family == "baichuan2"
    assert config_from_spec(spec_from_config(_BAICHUAN2))["z_loss_weight"] == 0
    named = spec_from_config({**_CHATGLM3, "_name_or_path": "chatglm3-extended", "rope_ratio": 4})
    assert named.values["rotary_base"] == 40000
    assert spec_from_config({**_GLM4, "architectures": ["ChatGLMForConditionalGeneration"]}) == spec_from_config(_GLM4)
    assert spec_from_config({**_GLM4, "rope_ratio": 1.5}).values["rotary_base"] == 15000


def test_what_acts_on_long_sequences_alone_is_said() -> None:
    notes = config_notes(_QWEN)
    assert [note.split()[0] for note in notes if "on sequences longer than seq_length" in note] == [
        "use_dynamic_ntk",
        "use_logn_attn",
    ]
    assert config_notes(_QWEN_72B) == []


def test_the_rules_can_be_named_in_files() -> None:
    made = RULES["multiple"].make(field="ffn_hidden_size", key="ff", factor=4)
    assert made.read({"ff": 32}) == {"ffn_hidden_size": 8}


# -- folders


@pytest.fixture(scope="module")
def published(hf_model: Folders, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Function `published(name)`: the folder of a tiny model as its family publishes it."""
    return cache(lambda name: publish(MODELS[name], hf_model(name), tmp_path_factory.mktemp("remote") / name))


def test_the_head_of_baichuan2_is_stored_as_it_is_computed(published: Folders, tmp_path: Path) -> None:
    """It is said and recorded; all else is copied bit for bit, and what comes back is what was stored."""
    folder = published("baichuan2")
    run = succeeded(verb("convert", folder, tmp_path / "meg", "--tp", 2))
    assert "lm_head.weight: each row divided by its length, as the model's own code does when it runs" in run.out
    manifest = json.loads((tmp_path / "meg" / "iter_0000001" / "conversion.json").read_text())
    heads = [
        entry
        for file in manifest["files"].values()
        for name, entry in file["tensors"].items()
        if name.endswith("output_layer.weight")
    ]
    assert [entry["computed"] for entry in heads] == ["each row divided by its length, rounded to float32"] * 2
    head = hf_tensors(folder)["lm_head.weight"]
    shares = [rank_content(tmp_path / "meg", f"mp_rank_0{tp}")["model"]["output_layer.weight"] for tp in (0, 1)]
    stored = torch.cat(shares)[: len(head)]
    assert torch.allclose(stored, torch.nn.functional.normalize(head), rtol=3e-7, atol=0)
    succeeded(verb("verify", folder, tmp_path / "meg"))
    back = hf_tensors(megatron_to_hf(tmp_path / "meg", tmp_path / "hf"))
    assert torch.equal(back.pop("lm_head.weight"), stored)
    assert all(torch.equal(hf_tensors(folder)[name], tensor) for name, tensor in back.items())
    succeeded(verb("verify", folder, tmp_path / "hf"))
    again = hf_to_megatron(tmp_path / "hf", tmp_path / "again")
    assert torch.equal(rank_content(again)["model"]["output_layer.weight"][: len(head)], stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_get_length_1_whatever_part_of_them_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    rows = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    rows[2], rows[3] = 0, torch.tensor([0, 0, 1, 0, 0, 0])
    save_file({"a": rows.to(dtype)}, tmp_path / "a.safetensors")
    reader = UnitRows("a", safetensors.read(tmp_path / "a.safetensors").tensors["a"])
    wanted = torch.nn.functional.normalize(rows.to(dtype).double()).to(dtype)
    found = [
        reader.read(slice(0, 7), slice(0, 6)),
        np.concatenate([reader.read(np.arange(7), slice(start, start + 2)) for start in (0, 2, 4)], axis=1),
    ]
    for bits in found:
        values = torch.from_numpy(bits.copy().view(f"i{dtype.itemsize}")).view(dtype)
        assert (values - wanted).abs().max() <= (1e-7 if dtype is torch.float32 else 0)
    assert np.array_equal(*found)


def test_buffers_of_chatglm_are_left_out(published: Folders, tmp_path: Path) -> None:
    folder = published("chatglm")
    save_file({"transformer.rotary_pos_emb.inv_freq": torch.ones(4)}, tmp_path / "model-2.safetensors")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name.replace("model.s", "model-1.s")).symlink_to(folder / name)
    index = dict.fromkeys(hf_tensors(folder), "model-1.safetensors")
    index["transformer.rotary_pos_emb.inv_freq"] = "model-2.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    run = succeeded(verb("inspect", tmp_path))
    assert "transformer.rotary_pos_emb.inv_freq (no weight)" in run.out


def test_published_code_is_not_run_for_logits(published: Folders) -> None:
    folder = published("chatglm")
    words = ("is a chatglm model, whose class transformers does not have itself", "compare checkpoints of Megatron-LM")
    refused(verb("verify", folder, folder, "--logits"), *words, code=2)


def test_a_baichuan_of_13b_is_refused_by_the_command(published: Folders, tmp_path: Path) -> None:
    config = json.loads((published("baichuan2") / "config.json").read_text())
    del config["max_position_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(published("baichuan2") / "model.safetensors")
    refused(verb("convert", tmp_path, tmp_path / "out", "--allow-inexpressible"), "Baichuan2-13B", "ALiBi")
    nothing_complete(tmp_path / "out")

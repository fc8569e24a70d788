"""Models whose code is published with them: made from transformers' models that compute the same, under the published names.

`publish` follows the published code, and not the tables that are to be proven: modeling_internlm2.py, modeling_exaone.py,
modeling_qwen.py, modeling_baichuan.py and modeling_chatglm.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..hf import SIZES
from .model import Config, Model, Tensors

_COMMON = ("bos_token_id", "eos_token_id", "hidden_size", "num_attention_heads", "initializer_range", "use_cache")
_LLAMA: Config = SIZES | dict(model_type="llama", rms_norm_eps=1e-3, tie_word_embeddings=False)


def _renamed(tensors: Tensors, names: Mapping[str, str]) -> Tensors:
    """Tensors under names of which each begins or contains one of `names`, replaced in their order."""
    found = {}
    for name, tensor in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new)
        found[name] = tensor
    return found


def _joined(tensors: Tensors, parts: str, into: str, join: Callable[[list[torch.Tensor]], torch.Tensor]) -> Tensors:
    """Tensors in which those of each layer whose names the pattern `parts` matches are one, `into`."""
    groups: dict[str, list[torch.Tensor]] = {}
    rest = {}
    for name in sorted(tensors):
        found = re.search(parts, name)
        if found is None:
            rest[name] = tensors[name]
        else:
            groups.setdefault(name.replace(found[0], into), []).append(tensors[name])
    return rest | {name: join(group) for name, group in groups.items()}


def _qkv(config: Config, tensors: Tensors, into: str, *, grouped: bool = False) -> Tensors:
    """Tensors with query, key and value of each layer as one: one after the other, or group by group."""
    groups = config["num_key_value_heads"]

    def join(parts: list[torch.Tensor]) -> torch.Tensor:
        key, query, value = parts  # by name
        if not grouped:
            return torch.cat([query, key, value])
        size = key.shape[0] // groups
        per_group = [part.reshape(groups, -1, size, *part.shape[1:]) for part in (query, key, value)]
        return torch.cat(per_group, dim=1).flatten(0, 2)

    return _joined(tensors, r"[qkv]_proj", into, join)


def _taken(config: Config, *names: str, **renamed: str) -> Config:
    """Keys of a config under these names: `renamed` has the published name by the class's."""
    return {name: config[name] for name in (*_COMMON, *names)} | {new: config[old] for old, new in renamed.items()}


def _internlm2(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    names = {
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.wqkv": "attention.wqkv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
    kept = ("num_hidden_layers", "intermediate_size", "num_key_value_heads", "rms_norm_eps", "vocab_size", "hidden_act")
    published = _taken(config, *kept, "tie_word_embeddings", "max_position_embeddings", attention_bias="bias")
    published |= {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "attn_implementation": "eager"}
    published |= {
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }
    return _renamed(_qkv(config, tensors, "wqkv", grouped=True), names), published | {"torch_dtype": config["dtype"]}


#: Names of GPT-2 that EXAONE and Qwen-1 have.
_AS_GPT2 = {
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "model.layers.": "transformer.h.",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
}


def _exaone(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    names = {
        **_AS_GPT2,
        "self_attn.o_proj": "attn.attention.out_proj",
        "self_attn.": "attn.attention.",
        "mlp.gate_proj": "mlp.c_fc_0",
        "mlp.up_proj": "mlp.c_fc_1",
        "mlp.down_proj": "mlp.c_proj",
    }
    scaling = dict(config["rope_parameters"])
    published = _taken(
        config,
        *("intermediate_size", "num_key_value_heads", "vocab_size", "head_dim", "max_position_embeddings"),
        **dict(num_hidden_layers="num_layers", rms_norm_eps="layer_norm_epsilon", hidden_act="activation_function"),
    )
    published |= {"architectures": ["ExaoneForCausalLM"], "model_type": "exaone", "embed_dropout": 0.0}
    published |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling, "torch_dtype": config["dtype"]}
    return _renamed(tensors, names), published  # tied, which is the class's default


def _qwen(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    names = {
        **_AS_GPT2,
        "self_attn.o_proj": "attn.c_proj",
        "self_attn.": "attn.",
        "mlp.gate_proj": "mlp.w2",
        "mlp.up_proj": "mlp.w1",
        "mlp.down_proj": "mlp.c_proj",
    }
    kept = ("num_hidden_layers", "vocab_size", "max_position_embeddings", "tie_word_embeddings")
    published = _taken(config, *kept, rms_norm_eps="layer_norm_epsilon")
    published |= {
        **{"architectures": ["QWenLMHeadModel"], "model_type": "qwen", "torch_dtype": config["dtype"]},
        **{
            "intermediate_size": 2 * config["intermediate_size"],
            "rotary_emb_base": int(config["rope_parameters"]["rope_theta"]),
        },
        **{"kv_channels": config["hidden_size"] // config["num_attention_heads"], "seq_length": 512, "rotary_pct": 1.0},
        **{
            "no_bias": True,
            "use_dynamic_ntk": True,
            "use_logn_attn": True,
            "scale_attn_weights": True,
            "onnx_safe": None,
        },
        **{"attn_dropout_prob": 0.0, "emb_dropout_prob": 0.0, "bf16": False, "fp16": False, "fp32": False},
    }
    return _renamed(_qkv(config, tensors, "c_attn"), names), published


def _baichuan(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    kept = (
        "num_hidden_layers",
        "intermediate_size",
        "rms_norm_eps",
        "vocab_size",
        "hidden_act",
        "max_position_embeddings",
    )
    published = _taken(config, *kept, "tie_word_embeddings") | {"torch_dtype": config["dtype"]}
    published |= {"architectures": ["BaiChuanForCausalLM"], "model_type": "baichuan"}
    return _qkv(config, tensors, "W_pack"), published


def _baichuan2(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    tensors, published = _baichuan(tensors, config)
    more = {
        "architectures": ["BaichuanForCausalLM"],
        "model_max_length": 512,
        "_from_model_config": True,
        "z_loss_weight": 0,
    }
    return tensors, published | more


def normed_head(logits: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """Logits with a head whose rows have length 1, of logits with this one: that is Baichuan2's NormHead."""
    return logits / tensors["lm_head.weight"].norm(dim=1)


def _chatglm(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    names = {
        "model.embed_tokens": "transformer.embedding.word_embeddings",
        "model.norm": "transformer.encoder.final_layernorm",
        "model.layers.": "transformer.encoder.layers.",
        "lm_head": "transformer.output_layer",
        "self_attn.o_proj": "self_attention.dense",
        "self_attn.": "self_attention.",
        "mlp.gate_up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    }
    published = _taken(
        config,
        "attention_dropout",
        **dict(num_hidden_layers="num_layers", intermediate_size="ffn_hidden_size", head_dim="kv_channels"),
        **dict(vocab_size="padded_vocab_size", num_key_value_heads="multi_query_group_num"),
        **dict(rms_norm_eps="layernorm_epsilon", attention_bias="add_qkv_bias", max_position_embeddings="seq_length"),
    )
    published |= {
        **{"architectures": ["ChatGLMModel"], "model_type": "chatglm", "torch_dtype": config["dtype"]},
        **{
            "rope_ratio": config["rope_parameters"]["rope_theta"] / 10000,
            "num_hidden_layers": config["num_hidden_layers"],
            "original_rope": True,
        },
        **{"multi_query_attention": True, "rmsnorm": True, "post_layer_norm": True, "add_bias_linear": False},
        **{"apply_residual_connection_post_layernorm": False, "apply_query_key_layer_scaling": True},
        **{"attention_softmax_in_fp32": True, "fp32_residual_connection": False, "bias_dropout_fusion": True},
        **{"hidden_dropout": 0.0, "tie_word_embeddings": False},
    }
    published.pop("initializer_range")
    return _renamed(_qkv(config, tensors, "query_key_value"), names), published


def _rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


_WIDE = _LLAMA | dict(head_dim=16)  # heads times channels is not the hidden size
_ALL_HEADS = _LLAMA | dict(num_attention_heads=4, num_key_value_heads=4, **_rope(1e4))
_LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
_YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
MODELS: Mapping[str, Model] = {
    "internlm2": Model(_LLAMA | _rope(1e6), _internlm2),
    "exaone": Model(
        _LLAMA
        | dict(head_dim=32, max_position_embeddings=131072, tie_word_embeddings=True)  # long wavelengths
        | _rope(1e6, rope_type="llama3", **_LLAMA3),
        _exaone,
    ),
    "qwen": Model(_ALL_HEADS | dict(model_type="qwen2"), _qwen),
    "baichuan": Model(_ALL_HEADS, _baichuan),
    "baichuan2": Model(_ALL_HEADS, _baichuan2, exact=False, computed=normed_head),
    "chatglm": Model(
        _WIDE
        | dict(model_type="glm", attention_bias=True, num_key_value_heads=2)
        | _rope(5e6, partial_rotary_factor=0.5),
        _chatglm,
    ),
    # YaRN outside multi-latent attention, which every class of this kind has.
    "qwen2-yarn": Model(_LLAMA | dict(model_type="qwen2") | _rope(1e6, **_YARN)),
    "qwen3-yarn": Model(
        _WIDE
        | dict(model_type="qwen3", max_position_embeddings=32768)
        | _rope(
            1e4,
            **dict(_YARN, factor=8.0, original_max_position_embeddings=4096, beta_fast=16.0, beta_slow=2.0),
            **dict(attention_factor=1.5, truncate=False),
        ),
    ),
}

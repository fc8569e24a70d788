"""Names of slots in a Megatron-LM checkpoint, one table per dialect, and the modules that own an `_extra_state`.

The dialects differ in where norms live: the local spec keeps them apart, Transformer Engine fuses them into the next linear.
Source: Megatron-LM core_v0.16.1, core/models/gpt/gpt_layer_specs.py, and state dicts written by core_v0.17.1 with
Transformer Engine 2.14.
"""

from __future__ import annotations

_LAYER = "decoder.layers.{layer}."
_ATTENTION = _LAYER + "self_attention."
_MLP = _LAYER + "mlp."

LOCAL = {
    "word_embeddings": "embedding.word_embeddings.weight",
    "input_norm": _LAYER + "input_layernorm.weight",
    "qkv": _ATTENTION + "linear_qkv.weight",
    "qkv_bias": _ATTENTION + "linear_qkv.bias",
    "q_norm": _ATTENTION + "q_layernorm.weight",
    "k_norm": _ATTENTION + "k_layernorm.weight",
    "proj": _ATTENTION + "linear_proj.weight",
    "proj_bias": _ATTENTION + "linear_proj.bias",
    "mlp_norm": _LAYER + "pre_mlp_layernorm.weight",
    "fc1": _MLP + "linear_fc1.weight",
    "fc1_bias": _MLP + "linear_fc1.bias",
    "fc2": _MLP + "linear_fc2.weight",
    "fc2_bias": _MLP + "linear_fc2.bias",
    "final_norm": "decoder.final_layernorm.weight",
    "output_layer": "output_layer.weight",
}
TRANSFORMER_ENGINE = {
    **LOCAL,
    "input_norm": _ATTENTION + "linear_qkv.layer_norm_weight",
    "mlp_norm": _MLP + "linear_fc1.layer_norm_weight",
}
DIALECTS = {"local": LOCAL, "transformer_engine": TRANSFORMER_ENGINE}

_LINEARS = (_ATTENTION + "linear_proj", _ATTENTION + "linear_qkv", _MLP + "linear_fc1", _MLP + "linear_fc2")
#: Modules with an `_extra_state`: by dialect, those of each layer and those of the last stage.
EXTRA_STATE = {
    "local": (_LINEARS, ("output_layer",)),
    "transformer_engine": ((_ATTENTION + "core_attention", *_LINEARS), ("decoder.final_layernorm", "output_layer")),
}
#: Further modules with an `_extra_state` when query and key are normed.
QK_NORM_EXTRA_STATE = {
    "local": (),
    "transformer_engine": (_ATTENTION + "q_layernorm", _ATTENTION + "k_layernorm"),
}
EXTRA_STATE_SUFFIX = "_extra_state"

"""Rows that models with LayerNorm, or with an MLP that has no gate, share."""

from __future__ import annotations

from ..model.layers import GELU, GELU_TANH, SQUARED_RELU
from ..model.layouts import GROUPED_QKV
from .entries import linear, tensor
from .llama import ATTENTION, LAYER, MLP
from .rules import Named, Row

#: Llama's names of embeddings and head, and of norms with biases.
ENDS = {**tensor("word_embeddings", "model.embed_tokens.weight"), **tensor("output_layer", "lm_head.weight")}
NORMS = {
    **linear("input_norm", LAYER + "input_layernorm"),
    **linear("mlp_norm", LAYER + "post_attention_layernorm"),
    **linear("final_norm", "model.norm"),
}
#: Llama's names of attention with biases, and of an MLP without its gate.
QKV = linear("qkv", *(f"{ATTENTION}{part}_proj" for part in "qkv"), layout=GROUPED_QKV)
PROJ = linear("proj", ATTENTION + "o_proj")
UNGATED = {**linear("fc1", MLP + "up_proj"), **linear("fc2", MLP + "down_proj")}

LAYER_NORM_EPSILON = Row("norm_epsilon", "layer_norm_eps", 1e-5)
RELU2 = Named("activation", "hidden_act", {"relu2": SQUARED_RELU}, "relu2")
#: Names of GELU in its two forms (transformers 5.23, activations.py).
GELUS = {"gelu_new": GELU_TANH, "gelu_pytorch_tanh": GELU_TANH, "gelu_fast": GELU_TANH, "gelu": GELU}

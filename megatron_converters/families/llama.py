"""Llama 1, 2, 3, 3.1, 3.2 and 3.3 (transformers LlamaForCausalLM), and the rows that later families share."""

from __future__ import annotations

from ..model.layouts import GATED, GROUPED_QKV, SAME
from ..model.tables import Entry
from .defaults import IfAbsent, Quotient, SameAs
from .rules import Fixed, Row, Rule
from .rules_attention import Rope
from .table import Family, Proof

LAYER = "model.layers.{layer}."
ATTENTION = LAYER + "self_attn."
MLP = LAYER + "mlp."

DENSE = {
    "word_embeddings": Entry(SAME, ("model.embed_tokens.weight",)),
    "input_norm": Entry(SAME, (LAYER + "input_layernorm.weight",)),
    "qkv": Entry(GROUPED_QKV, tuple(f"{ATTENTION}{part}_proj.weight" for part in "qkv")),
    "proj": Entry(SAME, (ATTENTION + "o_proj.weight",)),
    "mlp_norm": Entry(SAME, (LAYER + "post_attention_layernorm.weight",)),
    "fc1": Entry(GATED, (MLP + "gate_proj.weight", MLP + "up_proj.weight")),
    "fc2": Entry(SAME, (MLP + "down_proj.weight",)),
    "final_norm": Entry(SAME, ("model.norm.weight",)),
    "output_layer": Entry(SAME, ("lm_head.weight",)),
}
QKV_BIAS = {"qkv_bias": Entry(GROUPED_QKV, tuple(f"{ATTENTION}{part}_proj.bias" for part in "qkv"))}
QK_NORM = {
    "q_norm": Entry(SAME, (ATTENTION + "q_norm.weight",)),
    "k_norm": Entry(SAME, (ATTENTION + "k_norm.weight",)),
}
PROJ_BIAS = {"proj_bias": Entry(SAME, (ATTENTION + "o_proj.bias",))}
MLP_BIAS = {
    "fc1_bias": Entry(GATED, (MLP + "gate_proj.bias", MLP + "up_proj.bias")),
    "fc2_bias": Entry(SAME, (MLP + "down_proj.bias",)),
}

#: Rows of a Llama's sizes, with any activation.
SIZES_ALONE: tuple[Rule, ...] = (
    Row("num_layers", "num_hidden_layers"),
    Row("hidden_size", "hidden_size"),
    Row("ffn_hidden_size", "intermediate_size"),
    Row("num_attention_heads", "num_attention_heads"),
    Row("vocab_size", "vocab_size"),
    Row("initializer_range", "initializer_range", 0.02),
    Row("attention_dropout", "attention_dropout", 0.0),
    Row("tied", "tie_word_embeddings", False),
    Row("norm_epsilon", "rms_norm_eps", 1e-6),
)
SIZES: tuple[Rule, ...] = (*SIZES_ALONE, Fixed("hidden_act", "silu"))


def query_groups(absent: int | None = None) -> Rule:
    """Row of `num_key_value_heads`: null means one group per head; so does absence, unless the class has a default."""
    key, heads = "num_key_value_heads", "num_attention_heads"
    return Row("num_query_groups", key, SameAs(heads) if absent is None else IfAbsent(key, absent, heads))


def head_dim(absent: int) -> Rule:
    """Row of `head_dim`, which is `absent` where the key is absent, and follows from other sizes where it is null."""
    return Row("kv_channels", "head_dim", IfAbsent("head_dim", absent, Quotient("hidden_size", "num_attention_heads")))


DERIVED_HEAD_DIM = Row("kv_channels", "head_dim", Quotient("hidden_size", "num_attention_heads"))

FAMILY = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    since="0.8",
    proof=Proof.LOGITS,
    models="Llama 1, 2, 3, 3.1, 3.2, 3.3 (and models of that shape)",
    covers=(
        "rope theta, llama3, linear and dynamic RoPE scaling, LongRoPE with `--allow-inexpressible`, tied "
        "embeddings, `head_dim`, `attention_bias` with `mlp_bias`"
    ),
    tensors={**DENSE, **QKV_BIAS, **PROJ_BIAS, **MLP_BIAS},
    rules=(
        *SIZES,
        query_groups(),
        DERIVED_HEAD_DIM,
        Rope(),
        Row("max_position_embeddings", "max_position_embeddings", 2048),
        Row("qkv_bias", "attention_bias", False),
        Row("proj_bias", "attention_bias", False),
        Row("mlp_bias", "mlp_bias", False),
    ),
)

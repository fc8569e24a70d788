"""StarCoder2 (transformers Starcoder2ForCausalLM): Llama's attention, LayerNorm, and an MLP of tanh GELU without a gate.

Names and defaults: transformers 5.23, models/starcoder2.
"""

from __future__ import annotations

from ..model.layers import GELU, GELU_TANH, LAYER_NORM
from ..model.layouts import GROUPED_QKV
from .entries import implied, linear, tensor
from .llama import ATTENTION, DERIVED_HEAD_DIM, LAYER, MLP, query_groups
from .rules import Named, Passed, Restated, Row
from .rules_attention import Rope, Window
from .table import Family, Proof

STARCODER2 = Family(
    name="starcoder2",
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    since="0.15",
    proof=Proof.LOGITS,
    models="StarCoder2",
    covers="LayerNorm with biases, MLP without a gate, sliding window",
    tensors={
        **tensor("word_embeddings", "model.embed_tokens.weight"),
        **linear("input_norm", LAYER + "input_layernorm"),
        **linear("qkv", *(f"{ATTENTION}{part}_proj" for part in "qkv"), layout=GROUPED_QKV),
        **linear("proj", ATTENTION + "o_proj"),
        **linear("mlp_norm", LAYER + "post_attention_layernorm"),
        **linear("fc1", MLP + "c_fc"),
        **linear("fc2", MLP + "c_proj"),
        **linear("final_norm", "model.norm"),
        **tensor("output_layer", "lm_head.weight"),
    },
    rules=(
        Row("num_layers", "num_hidden_layers"),
        Row("hidden_size", "hidden_size"),
        Row("ffn_hidden_size", "intermediate_size"),
        Row("num_attention_heads", "num_attention_heads"),
        query_groups(absent=2),
        DERIVED_HEAD_DIM,
        Row("vocab_size", "vocab_size"),
        Row("max_position_embeddings", "max_position_embeddings", 4096),
        Row("norm_epsilon", "norm_epsilon", 1e-5),
        Row("initializer_range", "initializer_range", 0.018042),
        Row("attention_dropout", "attention_dropout", 0.0),
        Row("tied", "tie_word_embeddings", True),
        Named("activation", "hidden_act", {"gelu_pytorch_tanh": GELU_TANH, "gelu": GELU}, "gelu_pytorch_tanh"),
        Rope(),
        Window(default=None),
        *(Row(name, "use_bias", True) for name in ("qkv_bias", "proj_bias", "mlp_bias")),
        *implied(gated=False, normalization=LAYER_NORM),
        Passed(("residual_dropout", "embedding_dropout")),
        # starcoder2-15b's config.json, where `rms_norm_eps` repeats `norm_epsilon`, the only one that the class reads.
        Restated("mlp_type", "default"),
        Restated("norm_type", "layer_norm"),
        Passed(("rms_norm_eps",)),
    ),
)

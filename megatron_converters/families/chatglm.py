"""ChatGLM2-6B, ChatGLM3-6B, CodeGeeX4 and GLM-4-9B (remote ChatGLMModel), of which transformers has the last as GlmForCausalLM.

Names and defaults: modeling_chatglm.py and configuration_chatglm.py of THUDM/chatglm2-6b, chatglm3-6b and glm-4-9b-chat.
"""

from __future__ import annotations

from ..model.layouts import GATED, GROUPED_QKV, interleaved, joined
from .entries import implied, linear, tensor
from .rules import Fixed, Passed, Restated, Row
from .rules_remote import RopeRatio
from .table import Family, Proof

_LAYER = "transformer.encoder.layers.{layer}."

CHATGLM = Family(
    name="chatglm",
    model_type="chatglm",
    architecture="ChatGLMModel",
    further_architectures=("ChatGLMForConditionalGeneration",),  # in what transformers saves
    since="0.8",
    proof=Proof.EQUIVALENT,
    models="ChatGLM2, ChatGLM3, CodeGeeX2, GLM-4-9B-chat",
    covers="fused `query_key_value`, half-rotated heads of neighbouring pairs, scaled rotary base",
    layer=_LAYER,
    tensors={
        **tensor("word_embeddings", "transformer.embedding.word_embeddings.weight"),
        **tensor("input_norm", _LAYER + "input_layernorm.weight"),
        **linear("qkv", _LAYER + "self_attention.query_key_value", layout=joined(interleaved(GROUPED_QKV))),
        **tensor("proj", _LAYER + "self_attention.dense.weight"),
        **tensor("mlp_norm", _LAYER + "post_attention_layernorm.weight"),
        **tensor("fc1", _LAYER + "mlp.dense_h_to_4h.weight", layout=joined(GATED)),
        **tensor("fc2", _LAYER + "mlp.dense_4h_to_h.weight"),
        **tensor("final_norm", "transformer.encoder.final_layernorm.weight"),
        **tensor("output_layer", "transformer.output_layer.weight"),
    },
    rules=(
        *(Row(name, name) for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")),
        Row("num_query_groups", "multi_query_group_num", 1),
        Row("vocab_size", "padded_vocab_size"),
        Row("max_position_embeddings", "seq_length", 2048),
        Row("norm_epsilon", "layernorm_epsilon", 1e-5),
        *(Row(name, name, default) for name, default in (("kv_channels", 128), ("attention_dropout", 0.0))),
        Row("qkv_bias", "add_qkv_bias", False),
        RopeRatio(),
        *implied(rotary_percent=0.5, rotary_interleaved=True, rope_scaling=None),
        Fixed("multi_query_attention", True, absent=False),  # else query, key and value lie head by head
        *(Fixed(key, True) for key in ("rmsnorm", "post_layer_norm")),
        *(Fixed(key, False) for key in ("add_bias_linear", "tie_word_embeddings")),
        *(Restated(key, False) for key in ("apply_residual_connection_post_layernorm", "interleaved_qkv")),
        *(Restated(key, value) for key, value in (("rotary_percent", 0.5), ("quantization_bit", 0))),
        # Precision, kernels, a scale that the number of the layer cancels out, and repetitions.
        Passed(("attention_softmax_in_fp32", "fp32_residual_connection", "bias_dropout_fusion", "original_rope")),
        Passed(("apply_query_key_layer_scaling", "prefix_projection", "num_hidden_layers", "vocab_size")),
    ),
    ignored_suffixes=("rotary_pos_emb.inv_freq",),
)

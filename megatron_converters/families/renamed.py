"""InternLM2 and 2.5, EXAONE 3, 3.5 and Deep, and Qwen-1: Llamas under other names, whose code is published with the models.

Names and defaults: modeling_internlm2.py and configuration_internlm2.py of internlm/internlm2-7b and internlm2_5-7b;
modeling_exaone.py and configuration_exaone.py of LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct; modeling_qwen.py and configuration_qwen.py
of Qwen/Qwen-7B.
"""

from __future__ import annotations

from ..model.layouts import GATED, GROUPED_QKV, joined
from .defaults import Product, Quotient, SameAs
from .entries import implied, linear, tensor
from .llama import DERIVED_HEAD_DIM, LAYER, SIZES, SIZES_ALONE, query_groups
from .rules import Fixed, Multiple, Passed, Row, overridden
from .rules_attention import DYNAMIC, LINEAR, Rope
from .table import Family, Proof

_HEADS = Quotient("hidden_size", "num_attention_heads")
_BLOCK = "transformer.h.{layer}."
#: What EXAONE and Qwen-1 name as GPT-2 does.
_AS_GPT2 = {
    **tensor("word_embeddings", "transformer.wte.weight"),
    **tensor("input_norm", _BLOCK + "ln_1.weight"),
    **tensor("mlp_norm", _BLOCK + "ln_2.weight"),
    **tensor("fc2", _BLOCK + "mlp.c_proj.weight"),
    **tensor("final_norm", "transformer.ln_f.weight"),
    **tensor("output_layer", "lm_head.weight"),
}

INTERNLM2 = Family(
    name="internlm2",
    model_type="internlm2",
    architecture="InternLM2ForCausalLM",
    since="0.8",
    proof=Proof.EQUIVALENT,
    models="InternLM2, InternLM2.5",
    covers="fused `wqkv`, dynamic RoPE up to the model's positions",
    tensors={
        **tensor("word_embeddings", "model.tok_embeddings.weight"),
        **tensor("input_norm", LAYER + "attention_norm.weight"),
        **linear("qkv", LAYER + "attention.wqkv"),  # by query groups, as in Megatron-LM
        **linear("proj", LAYER + "attention.wo"),
        **tensor("mlp_norm", LAYER + "ffn_norm.weight"),
        **tensor("fc1", *(f"{LAYER}feed_forward.{part}.weight" for part in ("w1", "w3")), layout=GATED),
        **tensor("fc2", LAYER + "feed_forward.w2.weight"),
        **tensor("final_norm", "model.norm.weight"),
        **tensor("output_layer", "output.weight"),
    },
    rules=(
        *SIZES,
        query_groups(),
        *implied(kv_channels=_HEADS),
        Rope(scalings=(LINEAR, DYNAMIC), kind_keys=("type",)),
        Row("max_position_embeddings", "max_position_embeddings", 2048),
        Row("qkv_bias", "bias", True),
        Row("proj_bias", "bias", True),
    ),
)

EXAONE = Family(
    name="exaone",
    model_type="exaone",
    architecture="ExaoneForCausalLM",
    since="0.10",
    proof=Proof.EQUIVALENT,
    models="EXAONE 3, 3.5, Deep",
    covers="llama3 RoPE, GPT-2's names",
    layer=_BLOCK,
    tensors={
        **_AS_GPT2,
        **tensor("qkv", *(f"{_BLOCK}attn.attention.{part}_proj.weight" for part in "qkv"), layout=GROUPED_QKV),
        **tensor("proj", _BLOCK + "attn.attention.out_proj.weight"),
        **tensor("fc1", *(f"{_BLOCK}mlp.c_fc_{part}.weight" for part in range(2)), layout=GATED),
    },
    rules=(
        *overridden(
            SIZES_ALONE,
            [
                Row("num_layers", "num_layers"),
                Row("ffn_hidden_size", "intermediate_size", Product(4, "hidden_size")),
                Row("norm_epsilon", "layer_norm_epsilon", 1e-5),
                Row("tied", "tie_word_embeddings", True),
            ],
        ),
        Fixed("activation_function", "silu"),
        query_groups(),
        DERIVED_HEAD_DIM,
        Rope(),
        Row("max_position_embeddings", "max_position_embeddings", 2048),
        Passed(("embed_dropout", "resid_dropout", "num_hidden_layers")),
    ),
)

_BEYOND = "acts in inference alone, on sequences longer than seq_length; Megatron-LM has nothing like it"

QWEN1 = Family(
    name="qwen",
    model_type="qwen",
    architecture="QWenLMHeadModel",
    since="0.8",
    proof=Proof.EQUIVALENT,
    models="Qwen 1",
    covers="fused `c_attn` with bias; dynamic NTK and logn attention act beyond `seq_length` only",
    layer=_BLOCK,
    tensors={
        **_AS_GPT2,
        **linear("qkv", _BLOCK + "attn.c_attn", layout=joined(GROUPED_QKV)),
        **tensor("proj", _BLOCK + "attn.c_proj.weight"),
        **tensor("fc1", _BLOCK + "mlp.w2.weight", _BLOCK + "mlp.w1.weight", layout=GATED),
    },
    rules=(
        *overridden(
            SIZES_ALONE,
            [
                Multiple("ffn_hidden_size", "intermediate_size", 2),  # of both halves together
                Row("norm_epsilon", "layer_norm_epsilon", 1e-6),
                Row("attention_dropout", "attn_dropout_prob", 0.0),
            ],
        ),
        Row("kv_channels", "kv_channels", 128),
        Row("rotary_base", "rotary_emb_base", 10000),
        Row("max_position_embeddings", "max_position_embeddings", 8192),
        *implied(num_query_groups=SameAs("num_attention_heads"), qkv_bias=True, rope_scaling=None),
        *(Fixed(key, value) for key, value in {"no_bias": True, "scale_attn_weights": True, "rotary_pct": 1.0}.items()),
        # Kernels, precision and dropout; `rope_theta` and `padded_vocab_size` repeat other keys in Qwen-72B.
        Passed(("bf16", "fp16", "fp32", "softmax_in_fp32", "params_dtype", "emb_dropout_prob", "tokenizer_type")),
        Passed(("use_cache_quantization", "use_cache_kernel", "rope_theta", "padded_vocab_size")),
        Passed(("use_dynamic_ntk", "use_logn_attn", "seq_length")),
    ),
    remarks={name: f"{name} of config.json {_BEYOND}" for name in ("use_dynamic_ntk", "use_logn_attn")},
    ignored_suffixes=("rotary_emb.inv_freq", "attn.masked_bias", "attn.logn_tensor"),
)

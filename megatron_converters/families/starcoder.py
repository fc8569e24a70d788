"""StarCoder and SantaCoder (transformers GPTBigCodeForCausalLM), and StarCoder2 (Starcoder2ForCausalLM).

The first is a GPT-2 whose matrices are not transposed and whose heads all share one key and value, unless config.json says
otherwise. StarCoder2 has Llama's attention, LayerNorm, and an MLP of tanh GELU without a gate. Names and defaults: transformers
5.23, models/gpt_bigcode and models/starcoder2.
"""

from __future__ import annotations

import dataclasses

from ..model.layers import GELU, GELU_TANH, LAYER_NORM
from ..model.layouts import SAME
from .entries import implied, linear
from .gpt2 import FAMILY as GPT2
from .llama import DERIVED_HEAD_DIM, MLP, query_groups
from .rules import Named, Passed, Restated, Row, overridden
from .rules_attention import MultiQuery, Rope, Window
from .table import Family, Proof
from .ungated import ENDS, GELUS, NORMS, PROJ, QKV

GPT_BIGCODE = Family(
    name="gpt_bigcode",
    model_type="gpt_bigcode",
    architecture="GPTBigCodeForCausalLM",
    since="0.8",
    proof=Proof.LOGITS,
    models="StarCoder 1, SantaCoder",
    covers="one query group or as many as heads, learned positions",
    tensors={slot: dataclasses.replace(entry, layout=SAME, transposed=False) for slot, entry in GPT2.tensors.items()},
    rules=overridden(
        GPT2.rules,
        (
            MultiQuery(heads="n_head"),
            Named("activation", "activation_function", GELUS, "gelu_pytorch_tanh"),
            Passed(("num_key_value_heads",)),  # as transformers 5 saves what multi_query says
            # Dtypes of scores, and how the program that trained SantaCoder and StarCoder ran them.
            Passed(
                ("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "inference_runner", "max_batch_size")
            ),
            Passed(("validate_runner_input", "pre_allocate_kv_cache", "pad_key_length")),
        ),
    ),
    optional_prefix="transformer.",
    ignored_suffixes=GPT2.ignored_suffixes,
)

STARCODER2 = Family(
    name="starcoder2",
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    since="0.15",
    proof=Proof.LOGITS,
    models="StarCoder2",
    covers="LayerNorm with biases, MLP without a gate, sliding window",
    tensors={
        **{**ENDS, **NORMS, **QKV, **PROJ},
        **linear("fc1", MLP + "c_fc"),
        **linear("fc2", MLP + "c_proj"),
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

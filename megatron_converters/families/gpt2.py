"""GPT-2 (transformers GPT2LMHeadModel): learned positions, LayerNorm, an MLP without a gate, weights stored transposed.

Names and defaults: transformers 5.23, models/gpt2. Published files have no `transformer.` prefix and no head.
"""

from __future__ import annotations

from ..model.layers import LAYER_NORM
from ..model.layouts import GROUPED_QKV, joined
from .defaults import Product, Quotient, SameAs
from .entries import implied, linear, tensor
from .rules import Fixed, Named, Passed, Row
from .table import Family, Proof
from .ungated import GELUS

_LAYER = "transformer.h.{layer}."

FAMILY = Family(
    name="gpt2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    since="0.8",
    proof=Proof.LOGITS,
    models="GPT-2",
    covers="learned positions, LayerNorm, both forms of GELU, files with and without the `transformer.` prefix",
    tensors={
        **tensor("word_embeddings", "transformer.wte.weight"),
        **tensor("position_embeddings", "transformer.wpe.weight"),
        **linear("input_norm", _LAYER + "ln_1"),
        **linear("qkv", _LAYER + "attn.c_attn", layout=joined(GROUPED_QKV), transposed=True),
        **linear("proj", _LAYER + "attn.c_proj", transposed=True),
        **linear("mlp_norm", _LAYER + "ln_2"),
        **linear("fc1", _LAYER + "mlp.c_fc", transposed=True),
        **linear("fc2", _LAYER + "mlp.c_proj", transposed=True),
        **linear("final_norm", "transformer.ln_f"),
        **tensor("output_layer", "lm_head.weight"),
    },
    rules=(
        Row("num_layers", "n_layer"),
        Row("hidden_size", "n_embd"),
        Row("num_attention_heads", "n_head"),
        Row("ffn_hidden_size", "n_inner", Product(4, "n_embd")),
        Row("vocab_size", "vocab_size"),
        Row("max_position_embeddings", "n_positions", 1024),
        Row("norm_epsilon", "layer_norm_epsilon", 1e-5),
        Row("initializer_range", "initializer_range", 0.02),
        Row("attention_dropout", "attn_pdrop", 0.1),
        Row("tied", "tie_word_embeddings", True),
        Named("activation", "activation_function", GELUS, "gelu_new"),
        *implied(num_query_groups=SameAs("n_head"), kv_channels=Quotient("n_embd", "n_head")),
        *implied(learned_positions=True, rope=False, normalization=LAYER_NORM, gated=False),
        *implied(qkv_bias=True, proj_bias=True, mlp_bias=True),
        Fixed("scale_attn_weights", True),
        Fixed("scale_attn_by_inverse_layer_idx", False),
        # Dropout outside attention, n_positions again, a dtype of scores, and heads that make summaries.
        Passed(("resid_pdrop", "embd_pdrop", "n_ctx", "reorder_and_upcast_attn", "summary_activation")),
        Passed(("summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj")),
        Passed(("n_special", "predict_special_tokens")),  # of heads of an older class, in GPT-2 medium's file
    ),
    optional_prefix="transformer.",
    ignored_suffixes=(".attn.bias", ".attn.masked_bias"),
)

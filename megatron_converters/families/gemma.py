"""Gemma 1 and CodeGemma, Gemma 2, and the text models of Gemma 3 (transformers GemmaForCausalLM, Gemma2…, Gemma3ForCausalLM).

Llamas whose norms store their weights minus 1, whose embeddings are scaled by the root of the hidden size, and whose MLP is gated by
the tanh form of GELU. Gemma 2 and 3 have norms after both blocks, too; Gemma 2 caps scores and logits; Gemma 3 has norms of queries
and keys, and another rotary base in layers with a window. Names and defaults: transformers 5.23, models/gemma, gemma2 and gemma3.
"""

from __future__ import annotations

from ..model.layers import GELU_TANH
from .defaults import Root
from .entries import implied
from .llama import DENSE, PROJ_BIAS, QKV_BIAS, SIZES_ALONE, head_dim, query_groups
from .rules import Named, Restated, Row, overridden
from .rules_attention import Rope
from .table import Family, Proof

_TANH = "gelu_pytorch_tanh"
_BOTH_WAYS = Restated(
    "use_bidirectional_attention",
    False,
    why="Megatron-LM hides later tokens from attention; embedding models (EmbeddingGemma) look at them",
)
_ROOT = {
    "hidden_size": "embeddings are scaled by the root of the hidden size, which transformers rounds to the dtype that it computes in "
    "(in bfloat16 55.5 for 3072), and a flag or a model provider does not unless told so"
}

GEMMA = Family(
    name="gemma",
    model_type="gemma",
    architecture="GemmaForCausalLM",
    proof=Proof.LOGITS,
    models="Gemma 1, CodeGemma",
    covers=(
        "live, through AutoBridge; files with `--allow-inexpressible`, under Megatron-Bridge's names: no flag has GELU with a gate. "
        "Embeddings are scaled by muP's flags, or folded"
    ),
    tensors={**DENSE, **QKV_BIAS, **PROJ_BIAS},
    rules=(
        *overridden(SIZES_ALONE, (Row("tied", "tie_word_embeddings", True),)),
        query_groups(absent=16),
        head_dim(absent=256),
        Rope(),
        Row("max_position_embeddings", "max_position_embeddings", 8192),
        # In the first files "gelu" means the tanh form, which the class makes of it; releases up to 4.50 read the second key.
        Named("activation", "hidden_act", {_TANH: GELU_TANH, "gelu": GELU_TANH}, _TANH),
        Restated("hidden_activation", _TANH),
        *(Row(bias, "attention_bias", False) for bias in ("qkv_bias", "proj_bias")),
        *implied(zero_centred=True, embedding_multiplier=Root("hidden_size")),
        _BOTH_WAYS,
    ),
    remarks=_ROOT,
)

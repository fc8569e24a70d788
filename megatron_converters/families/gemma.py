"""Gemma 1 and CodeGemma (transformers GemmaForCausalLM), Gemma 2 (Gemma2ForCausalLM), Gemma 3's text (Gemma3ForCausalLM).

Llamas whose norms store their weights minus 1, whose embeddings are scaled by the root of the hidden size, and whose MLP is gated
by the tanh form of GELU. Gemma 2 and 3 have norms after both blocks, too; Gemma 2 caps scores and logits; Gemma 3 has norms of
queries and keys, and another rotary base in layers with a window. Names and defaults: transformers 5.23, models/gemma, gemma2 and
gemma3.
"""

from __future__ import annotations

from ..model.layers import AROUND, EACH_HEAD, GELU_TANH
from .defaults import IfAbsent, Root
from .entries import implied, tensor
from .llama import DENSE, LAYER, PROJ_BIAS, QK_NORM, QKV_BIAS, SIZES_ALONE, head_dim, query_groups
from .rules import Named, Passed, Repeated, Restated, Row, overridden
from .rules_attention import Rope
from .rules_layer_kinds import ListedWindow
from .rules_layer_ropes import LayerRopes
from .rules_scales import QueryScalar
from .table import Family, Proof

_TANH = "gelu_pytorch_tanh"
_ROOT = {
    "hidden_size": "embeddings are scaled by the root of the hidden size, which transformers rounds to the dtype that it computes "
    "in (for 3072 to 55.5 in bfloat16); flags and folded weights have it unrounded. Megatron-Bridge's providers scale embeddings "
    "themselves, so that they take weights as they are (--mup flags), and not folded ones"
}
_ONE_WAY = Restated(
    "use_bidirectional_attention",
    False,
    why="embedding models such as EmbeddingGemma attend to later tokens, which Megatron-LM hides",
)


def _cap(key: str, absent: float | None) -> Row:
    """Row of a soft cap, which null switches off."""
    return Row(key, key, IfAbsent(key, absent))


GEMMA = Family(
    name="gemma",
    model_type="gemma",
    architecture="GemmaForCausalLM",
    proof=Proof.LOGITS,
    models="Gemma 1, CodeGemma",
    covers=(
        "with `--allow-inexpressible`, under Megatron-Bridge's names, or live through AutoBridge: no flag has a gated MLP with "
        "GELU; embeddings are scaled by muP's flags, or folded"
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
        _ONE_WAY,
    ),
    remarks=_ROOT,
)

_SANDWICH = {
    **GEMMA.tensors,
    **tensor("attention_post_norm", LAYER + "post_attention_layernorm.weight"),
    **tensor("mlp_norm", LAYER + "pre_feedforward_layernorm.weight"),
    **tensor("mlp_post_norm", LAYER + "post_feedforward_layernorm.weight"),
}
_SANDWICH_RULES = (
    *overridden(
        [rule for rule in GEMMA.rules if rule.keys != ("hidden_activation",)],
        (
            query_groups(absent=4),
            Named("activation", "hidden_activation", {_TANH: GELU_TANH}, _TANH),
            QueryScalar(256, size=head_dim(absent=256)),
            Passed(("cache_implementation",)),
            *implied(block_norms=AROUND),
        ),
    ),
    Restated("hidden_act", _TANH),  # which the class does not read
)

GEMMA2 = Family(
    name="gemma2",
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    proof=Proof.LOGITS,
    models="Gemma 2",
    covers=(
        "with `--allow-inexpressible`, under Megatron-Bridge's names: soft caps of scores and logits, and a gated MLP with GELU, "
        "which Megatron-LM has no arguments for; norms after blocks are in a layer of `megatron_layers`"
    ),
    tensors=_SANDWICH,
    rules=(
        *_SANDWICH_RULES,
        ListedWindow(default=4096, full=2, last=True),
        Repeated("sliding_window_size", "sliding_window", 4096),  # in the first files of 27B
        _cap("attn_logit_softcapping", 50.0),
        _cap("final_logit_softcapping", 30.0),
    ),
    remarks=_ROOT,
)

GEMMA3 = Family(
    name="gemma3_text",
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    stem="Gemma3Text",
    proof=Proof.LOGITS,
    models="Gemma 3 (text)",
    covers=(
        "with `--allow-inexpressible`, under Megatron-Bridge's names: a rotary base for layers with a window, another one with "
        "scaling for the others, and a gated MLP with GELU; norms after blocks are in a layer of `megatron_layers`; EmbeddingGemma "
        "is refused"
    ),
    tensors={**_SANDWICH, **QK_NORM},
    rules=(
        *overridden(
            [rule for rule in _SANDWICH_RULES if not isinstance(rule, Rope)],
            (LayerRopes(), Row("max_position_embeddings", "max_position_embeddings", 131072)),
        ),
        Restated("attn_logit_softcapping", None),  # which the class does not read
        _cap("final_logit_softcapping", None),
        *implied(qk_norm=EACH_HEAD),
    ),
    remarks=_ROOT,
)

"""Llamas whose norms are after attention and MLP: OLMo 2 and 3 (transformers Olmo2ForCausalLM, Olmo3ForCausalLM) and EXAONE 4
(Exaone4ForCausalLM).

Names and defaults: transformers 5.23, models/olmo2, olmo3 and exaone4. What Llama's files call the norm before the MLP,
`post_attention_layernorm`, is the one after attention here. Queries and keys are normed over all heads in OLMo, and each head by
itself in EXAONE.
"""

from __future__ import annotations

from ..model.layers import AFTER, ALL_HEADS, EACH_HEAD
from .entries import implied, tensor
from .llama import DENSE, DERIVED_HEAD_DIM, LAYER, PROJ_BIAS, QK_NORM, QKV_BIAS, SIZES, query_groups
from .rules import Biases, Row
from .rules_attention import Rope
from .rules_layer_kinds import ListedWindow, RopeByType, WindowsRotate
from .table import Family, Proof

_DENSE = {
    **{slot: entry for slot, entry in DENSE.items() if slot not in ("input_norm", "mlp_norm")},
    **tensor("attention_post_norm", LAYER + "post_attention_layernorm.weight"),
    **tensor("mlp_post_norm", LAYER + "post_feedforward_layernorm.weight"),
    **QK_NORM,
}
_RULES = (
    *SIZES,
    DERIVED_HEAD_DIM,
    Row("norm_epsilon", "rms_norm_eps", 1e-5),
    Row("max_position_embeddings", "max_position_embeddings", 2048),
    *implied(block_norms=AFTER),
)
_OLMO_RULES = (*_RULES, query_groups(), Biases(mlp_key=""), *implied(qk_norm=ALL_HEADS))

OLMO2 = Family(
    name="olmo2",
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    since="0.12",
    proof=Proof.LOGITS,
    models="OLMo 2",
    covers="norms after blocks and over all heads, in a layer of `megatron_layers`",
    tensors={**_DENSE, **QKV_BIAS, **PROJ_BIAS},
    rules=(*_OLMO_RULES, Rope()),
)

OLMO3 = Family(
    name="olmo3",
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    since="0.15",
    proof=Proof.LOGITS,
    models="OLMo 3",
    covers=(
        "the same with a sliding window on three of four layers; rotary embeddings that differ between layers, as in models "
        "of long context, are refused"
    ),
    tensors=OLMO2.tensors,
    rules=(*_OLMO_RULES, RopeByType(5e5), ListedWindow(4096, full=4, last=True)),
)

EXAONE4 = Family(
    name="exaone4",
    model_type="exaone4",
    architecture="Exaone4ForCausalLM",
    since="0.12",
    proof=Proof.LOGITS,
    models="EXAONE 4.0",
    covers="norms after blocks, in a layer of `megatron_layers`; sliding windows, layers without rotary embeddings",
    tensors=_DENSE,
    rules=(
        *_RULES,
        query_groups(absent=32),
        Rope(),
        WindowsRotate(window=4096, pattern=4),
        *implied(qk_norm=EACH_HEAD),
    ),
)

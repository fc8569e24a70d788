"""OLMo 1 (transformers OlmoForCausalLM): a Llama with LayerNorms that have neither weights nor biases.

Names, defaults and the epsilon, which is no key: transformers 5.23, models/olmo. The 7B models clip queries, keys and values, which
Megatron-LM does not.
"""

from __future__ import annotations

from ..model.layers import LAYER_NORM
from .entries import constant, implied
from .llama import DENSE, PROJ_BIAS, QKV_BIAS
from .llama import FAMILY as LLAMA
from .rules import Biases, Fixed, overridden
from .table import Family, Proof

_NORMS = ("input_norm", "mlp_norm", "final_norm")

OLMO = Family(
    name="olmo",
    model_type="olmo",
    architecture="OlmoForCausalLM",
    since="0.8",
    proof=Proof.LOGITS,
    models="OLMo 1",
    covers="norms without weights, which become ones and zeros; `clip_qkv` is refused",
    tensors={
        **{**DENSE, **QKV_BIAS, **PROJ_BIAS},
        **{
            slot: entry
            for norm in _NORMS
            for slot, entry in {**constant(norm, 1), **constant(f"{norm}_bias", 0)}.items()
        },
    },
    rules=overridden(
        [rule for rule in LLAMA.rules if rule.keys != ("mlp_bias",)],
        (
            *implied(normalization=LAYER_NORM, norm_epsilon=1e-5),
            Biases(mlp_key=""),
            Fixed("clip_qkv", None, why="Megatron-LM does not clip queries, keys and values"),
        ),
    ),
)

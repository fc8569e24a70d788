"""Jais 2 (transformers Jais2ForCausalLM): Llama's names, LayerNorm, biases, and an MLP of squared ReLU without a gate.

Names and defaults: transformers 5.23, models/jais2.
"""

from __future__ import annotations

from ..model.layers import LAYER_NORM
from .entries import implied
from .llama import FAMILY as LLAMA
from .rules import Biases, Row, overridden
from .table import Family, Proof
from .ungated import ENDS, LAYER_NORM_EPSILON, NORMS, PROJ, QKV, RELU2, UNGATED

JAIS2 = Family(
    name="jais2",
    model_type="jais2",
    architecture="Jais2ForCausalLM",
    since="0.8",
    proof=Proof.LOGITS,
    models="Jais 2",
    covers="LayerNorm, all biases, squared ReLU",
    tensors={**ENDS, **NORMS, **QKV, **PROJ, **UNGATED},
    rules=overridden(
        LLAMA.rules,
        (
            RELU2,
            LAYER_NORM_EPSILON,
            Row("max_position_embeddings", "max_position_embeddings", 8192),
            Biases(attention=True, mlp=True),
            *implied(normalization=LAYER_NORM, gated=False),
        ),
    ),
)

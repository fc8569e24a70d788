"""Llamas with a rule or two of their own: SmolLM3.

Names and defaults: transformers 5.23, models/smollm3.
"""

from __future__ import annotations

from .llama import DERIVED_HEAD_DIM, query_groups
from .llama import FAMILY as LLAMA
from .rules import Row, overridden
from .rules_attention import Rope
from .rules_layer_kinds import RotatedLayers
from .table import Family, Proof

SMOLLM3 = Family(
    name="smollm3",
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    since="0.13",
    proof=Proof.LOGITS,
    tensors=LLAMA.tensors,
    rules=overridden(
        LLAMA.rules,
        [
            query_groups(absent=4),
            DERIVED_HEAD_DIM,
            Rope(2e6),
            RotatedLayers(interval=4),
            Row("max_position_embeddings", "max_position_embeddings", 32768),
            Row("tied", "tie_word_embeddings", True),
        ],
    ),
)

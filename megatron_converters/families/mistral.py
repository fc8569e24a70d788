"""Mistral, Ministral and Ministral 3 (transformers MistralForCausalLM, MinistralForCausalLM, Ministral3ForCausalLM).

They have Llama's tensors, and a sliding window on all layers, on some, or on none.
"""

from __future__ import annotations

from .llama import DENSE, DERIVED_HEAD_DIM, SIZES, head_dim, query_groups
from .rules import Row, overridden
from .rules_attention import Rope, Window
from .rules_layer_kinds import ListedWindow
from .rules_scaled_queries import ScaledQueries
from .table import Family, Proof

FAMILY = Family(
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    since="0.8",
    proof=Proof.LOGITS,
    models="Mistral",
    covers="sliding window",
    tensors=DENSE,
    rules=(
        *SIZES,
        query_groups(absent=8),
        DERIVED_HEAD_DIM,
        Rope(),
        Window(default=4096),
        Row("max_position_embeddings", "max_position_embeddings", 4096 * 32),
    ),
)

MINISTRAL = Family(
    name="ministral",
    model_type="ministral",
    architecture="MinistralForCausalLM",
    since="0.15",
    proof=Proof.LOGITS,
    models="Ministral-8B",
    covers="sliding window on the layers that `layer_types` lists",
    tensors=DENSE,
    rules=overridden(FAMILY.rules, [ListedWindow(default=4096)]),
)

#: What the class takes where config.json has no table.
_YARN = {
    **{"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1},
}

MINISTRAL3 = Family(
    name="ministral3",
    model_type="ministral3",
    architecture="Ministral3ForCausalLM",
    since="0.19",
    proof=Proof.LOGITS,
    models="Ministral 3 (text)",
    covers="YaRN of Megatron-LM 0.19; exact up to the original positions, beyond which queries are scaled",
    tensors=DENSE,
    rules=overridden(
        FAMILY.rules,
        [
            head_dim(absent=128),
            ScaledQueries(absent=(*_YARN.items(),)),
            Window(default=None),
            Row("norm_epsilon", "rms_norm_eps", 1e-5),
            Row("max_position_embeddings", "max_position_embeddings", 262144),
        ],
    ),
)

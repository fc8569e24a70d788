"""Nemotron 3 and 4, Minitron 4B and 8B (transformers NemotronForCausalLM), and Arcee's AFM (ArceeForCausalLM).

Both have an MLP of squared ReLU without a gate. Nemotron's LayerNorm stores its weights minus 1, and its heads rotate in part; AFM
is a Llama otherwise. Names and defaults: transformers 5.23, models/nemotron and models/arcee.
"""

from __future__ import annotations

from ..model.layers import LAYER_NORM
from .entries import implied
from .llama import DENSE, DERIVED_HEAD_DIM, SIZES, query_groups
from .llama import FAMILY as LLAMA
from .rules import Biases, Row, overridden
from .rules_attention import Rope
from .table import Family, Proof
from .ungated import ENDS, NORMS, PROJ, QKV, RELU2, UNGATED

NEMOTRON = Family(
    name="nemotron",
    model_type="nemotron",
    architecture="NemotronForCausalLM",
    since="0.8",
    proof=Proof.LOGITS,
    models="Nemotron-3, Nemotron-4, Minitron-4B and 8B",
    covers="norms stored around 0 (Transformer Engine's layers), squared ReLU, half-rotated heads",
    tensors={**ENDS, **NORMS, **QKV, **PROJ, **UNGATED},
    rules=(
        *overridden(
            SIZES,
            (RELU2, Row("norm_epsilon", "norm_eps", 1e-5), Row("initializer_range", "initializer_range", 0.0134)),
        ),
        query_groups(),
        DERIVED_HEAD_DIM,
        # vLLM reads NeMo's names of the part that rotates first, transformers does not know them.
        Rope(partial=0.5, partial_keys=("partial_rotary_factor", "rope_percent", "rope_percentage")),
        Row("max_position_embeddings", "max_position_embeddings", 4096),
        Biases(),
        *implied(normalization=LAYER_NORM, zero_centred=True, gated=False),
    ),
)

ARCEE = Family(
    name="arcee",
    model_type="arcee",
    architecture="ArceeForCausalLM",
    since="0.8",
    proof=Proof.LOGITS,
    models="Arcee AFM-4.5B",
    covers="squared ReLU without a gate; YaRN from 0.19 on",
    tensors={**DENSE, **QKV, **PROJ, **UNGATED},
    rules=overridden(
        LLAMA.rules,
        (
            RELU2,
            Biases(),
            Row("norm_epsilon", "rms_norm_eps", 1e-5),
            Row("max_position_embeddings", "max_position_embeddings", 4096),
            *implied(gated=False),
        ),
    ),
)

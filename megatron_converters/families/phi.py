"""Phi-3, Phi-3.5 and Phi-4 (transformers Phi3ForCausalLM): Llama with fused qkv and gate_up, and heads that rotate in part.

Names and defaults: transformers 5.23, models/phi3. LongRoPE, which the long-context variants have, is refused: Megatron-LM has
none.
"""

from __future__ import annotations

from ..model.layouts import GATED, GROUPED_QKV, joined
from .entries import tensor
from .llama import ATTENTION, DENSE, DERIVED_HEAD_DIM, MLP, SIZES, query_groups
from .rules import Passed, Row
from .rules_attention import LINEAR, LLAMA3, Rope, Window
from .table import Family

PHI3 = Family(
    name="phi3",
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    tensors={
        **DENSE,
        **tensor("qkv", ATTENTION + "qkv_proj.weight", layout=joined(GROUPED_QKV)),
        **tensor("fc1", MLP + "gate_up_proj.weight", layout=joined(GATED)),
    },
    rules=(
        *SIZES,
        query_groups(),
        DERIVED_HEAD_DIM,
        # Its LongRoPE has other keys, and two sets of factors that differ; it is not supported yet.
        Rope(partial=1.0, scalings=(LINEAR, LLAMA3)),
        Window(default=None),
        Row("norm_epsilon", "rms_norm_eps", 1e-5),
        Row("max_position_embeddings", "max_position_embeddings", 4096),
        # Dropout outside attention, and a length that only LongRoPE uses.
        Passed(("resid_pdrop", "embd_pdrop", "original_max_position_embeddings")),
    ),
)

"""GPT-OSS: sinks, windows, limits and biases are such that leaving one out changes logits, and matrices of experts are square."""

from __future__ import annotations

from typing import Any

from ..hf_kinds import TOKENS
from .model import WITH_EXPERTS, Model

_GPT_OSS: dict[str, Any] = TOKENS | dict(
    model_type="gpt_oss",
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    num_local_experts=8,
    num_experts_per_tok=3,  # 2 is Megatron-LM's default
    max_position_embeddings=512,
    sliding_window=7,
    swiglu_limit=0.5,
    rms_norm_eps=1e-3,
    rope_parameters={"rope_type": "default", "rope_theta": 5e4},
)
#: Rounding the ends of the range of frequencies that are scaled in part (`truncate`) would move both.
_YARN = dict(factor=8.0, beta_fast=6.0, beta_slow=1.5, truncate=False, original_max_position_embeddings=64)

MODELS = {
    "gpt-oss": Model(_GPT_OSS, cut=WITH_EXPERTS),
    "gpt-oss-yarn": Model(
        _GPT_OSS
        | dict(
            intermediate_size=48,
            layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            rope_parameters={"rope_type": "yarn", "rope_theta": 100.0, **_YARN},
        ),
        cut=WITH_EXPERTS,
    ),
}

"""Families with layers of `megatron_layers`: norms after blocks, and over all heads."""

from __future__ import annotations

from ..hf import SIZES
from .model import Model

#: Large enough that another epsilon changes the logits.
_EPSILON = 1e-3
_TYPES = ["sliding_attention"] * 3 + ["full_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 5e4}
#: Low frequencies are divided, since these start where a 16th of the positions ends.
_LLAMA3 = _ROPE | dict(
    rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
_OLMO = SIZES | dict(rms_norm_eps=_EPSILON, rope_parameters=_ROPE)
_EXAONE = SIZES | dict(model_type="exaone4", head_dim=16, rms_norm_eps=_EPSILON)
_WINDOWS = dict(sliding_window=8, layer_types=_TYPES)
_NONE = dict(sliding_window=None, sliding_window_pattern=None, layer_types=["full_attention"] * 4)

MODELS: dict[str, Model] = {
    "olmo2": Model(_OLMO | dict(model_type="olmo2")),
    "olmo2-bias": Model(_OLMO | dict(model_type="olmo2", attention_bias=True, tie_word_embeddings=True)),
    "olmo3": Model(
        _OLMO
        | dict(model_type="olmo3", rope_parameters={"full_attention": _ROPE, "sliding_attention": _ROPE}, **_WINDOWS)
    ),
    "exaone4": Model(_EXAONE | _NONE | dict(max_position_embeddings=32768, rope_parameters=_LLAMA3)),
    "exaone4-windows": Model(_EXAONE | _WINDOWS | dict(sliding_window_pattern="LLLG", rope_parameters=_ROPE)),
}

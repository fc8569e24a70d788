"""Gemma, whose models stock megatron-core cannot compute: `tests/oracle/beyond.py` adds what it lacks."""

from __future__ import annotations

from ..hf_kinds import LLAMA_LIKE
from .model import CUT, ENGINE, Config, Model

_ALLOWED: Config = {"allow_inexpressible": True}
_WHOLE, _CUT = {**ENGINE, **_ALLOWED}, {**CUT, **_ALLOWED}
#: A size whose root is no whole number, and that is not heads times channels.
_SIZES = LLAMA_LIKE | dict(hidden_size=80, tie_word_embeddings=True)
_GEMMA = _SIZES | dict(model_type="gemma")
_SCALAR = dict(query_pre_attn_scalar=40, sliding_window=7)
_GEMMA2 = _SIZES | _SCALAR | dict(model_type="gemma2", attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
_GEMMA3 = (
    _SIZES
    | _SCALAR
    | dict(
        model_type="gemma3_text",
        sliding_window_pattern=3,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
)

MODELS = {
    "gemma": Model(_GEMMA, whole=_WHOLE, cut=_CUT),
    "gemma2": Model(_GEMMA2, whole=_WHOLE, cut=_CUT),
    "gemma3": Model(_GEMMA3, whole=_WHOLE, cut=_CUT),
}

"""Gemma, whose models stock megatron-core cannot compute: `tests/oracle/beyond.py` adds what it lacks."""

from __future__ import annotations

from ..hf_kinds import LLAMA_LIKE
from .model import CUT, ENGINE, Config, Model

_ALLOWED: Config = {"allow_inexpressible": True}
_WHOLE, _CUT = {**ENGINE, **_ALLOWED}, {**CUT, **_ALLOWED}
#: A size whose root is no whole number, and that is not heads times channels.
_SIZES = LLAMA_LIKE | dict(hidden_size=80, tie_word_embeddings=True)
_GEMMA = _SIZES | dict(model_type="gemma")

MODELS = {
    "gemma": Model(_GEMMA, whole=_WHOLE, cut=_CUT),
}

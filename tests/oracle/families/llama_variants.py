"""Models of Llamas with a rule or two of their own."""

from __future__ import annotations

from typing import Any

from ..hf import SIZES
from .model import Model


def rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


#: Sizes that show what a family does: heads are no divisor of the hidden size, and a wrong epsilon changes the logits.
LLAMA: dict[str, Any] = SIZES | dict(
    head_dim=16, rms_norm_eps=1e-3, rope_parameters=rope(1e4), tie_word_embeddings=False
)
_SMOLLM3 = LLAMA | dict(model_type="smollm3", no_rope_layers=[1, 1, 0, 1], tie_word_embeddings=True)
_ALL_BIASES = dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=False)

MODELS = {
    "smollm3": Model(_SMOLLM3),
    "smollm3-window": Model(_SMOLLM3 | _ALL_BIASES | dict(use_sliding_window=True, sliding_window=7)),
    "seed_oss": Model(LLAMA | dict(model_type="seed_oss", rope_parameters=rope(1e5))),
    "internlm3": Model(LLAMA | _ALL_BIASES | dict(model_type="internlm3", num_key_value_heads=2)),
    "iquestcoder": Model(LLAMA | dict(model_type="iquestcoder")),
    "ernie4_5": Model(LLAMA | dict(model_type="ernie4_5", use_bias=True, tie_word_embeddings=True)),
    # Its last projection of attention is square, whatever the size of heads.
    "helium": Model(
        LLAMA | dict(model_type="helium", num_attention_heads=4, num_key_value_heads=2, attention_bias=True)
    ),
}

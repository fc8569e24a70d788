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
#: Queries are scaled beyond more positions than are tested: up to these Megatron-LM computes the same.
_YARN = rope(
    1e4,
    **{"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, "llama_4_scaling_beta": 0.1},
    **{"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0},
)

MODELS = {
    "smollm3": Model(_SMOLLM3),
    "smollm3-window": Model(_SMOLLM3 | _ALL_BIASES | dict(use_sliding_window=True, sliding_window=7)),
    "seed_oss": Model(LLAMA | dict(model_type="seed_oss", rope_parameters=rope(1e5))),
    "internlm3": Model(LLAMA | _ALL_BIASES | dict(model_type="internlm3", num_key_value_heads=2)),
    "iquestcoder": Model(LLAMA | dict(model_type="iquestcoder")),
    "ernie4_5": Model(LLAMA | dict(model_type="ernie4_5", use_bias=True, tie_word_embeddings=True)),
    "ministral": Model(
        LLAMA
        | dict(
            model_type="ministral",
            sliding_window=7,
            layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        )
    ),
    "ministral3": Model(LLAMA | dict(model_type="ministral3", max_position_embeddings=1024, rope_parameters=_YARN)),
    "cwm": Model(LLAMA | dict(model_type="cwm", sliding_window=7)),
    # Its last projection of attention is square, whatever the size of heads.
    "helium": Model(
        LLAMA | dict(model_type="helium", num_attention_heads=4, num_key_value_heads=2, attention_bias=True)
    ),
}

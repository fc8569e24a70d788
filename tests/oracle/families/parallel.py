"""Models whose layers are not Megatron-LM's: parallel blocks, norms after blocks, norms over all heads."""

from __future__ import annotations

from ..hf_kinds import LLAMA_LIKE, TOKENS
from .model import WITH_EXPERTS, Config, Model


def _rope(theta: float, **more: float) -> Config:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


_LAYER_NORMED = {name: value for name, value in LLAMA_LIKE.items() if name not in ("rms_norm_eps", "head_dim")}
_COHERE = _LAYER_NORMED | _rope(1e4) | dict(layer_norm_eps=1e-3, logit_scale=0.25, tie_word_embeddings=True)
_COHERE2 = _COHERE | dict(model_type="cohere2", sliding_window=7, sliding_window_pattern=3)
_FALCON = TOKENS | dict(
    **dict(model_type="falcon", hidden_size=64, ffn_hidden_size=112, num_hidden_layers=4, num_attention_heads=8),
    **dict(layer_norm_epsilon=1e-3, max_position_embeddings=512, tie_word_embeddings=True, **_rope(1e4)),
)
_NEW = dict(new_decoder_architecture=True, num_kv_heads=4, bias=True, tie_word_embeddings=False)
_MINIMAX = LLAMA_LIKE | dict(
    **dict(model_type="minimax_m2", num_local_experts=8, num_experts_per_tok=3, intermediate_size=48),
    **_rope(5e4, partial_rotary_factor=0.5),
)
_GLM4 = LLAMA_LIKE | dict(model_type="glm4", attention_bias=True, **_rope(5e4, partial_rotary_factor=0.5))

MODELS = {
    "cohere": Model(_COHERE | dict(model_type="cohere")),
    "cohere2": Model(_COHERE2 | dict(attention_bias=False, tie_word_embeddings=False)),
    # One group, four with a norm for each block, and four on one norm.
    "falcon": Model(_FALCON),
    "falcon-two-norms": Model(_FALCON | _NEW),
    "falcon-one-norm": Model(_FALCON | _NEW | dict(num_ln_in_parallel_attn=1)),
    "minimax-m2": Model(_MINIMAX, cut=WITH_EXPERTS),
    "glm4": Model(_GLM4),
}

"""Families with LayerNorm, or with an MLP that has no gate."""

from __future__ import annotations

from typing import Any

from ..hf import SIZES
from ..hf_kinds import TOKENS
from .model import CUT, ENGINE, Model

#: Large enough that another epsilon changes the logits.
_EPSILON = 1e-3


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4, **more}}


_BIGCODE = TOKENS | dict(
    model_type="gpt_bigcode",
    **dict(n_embd=64, n_layer=4, n_head=4, n_positions=96, n_inner=112, layer_norm_epsilon=_EPSILON),
)
_OLMO = SIZES | _rope() | dict(model_type="olmo", tie_word_embeddings=False)
_STABLELM = SIZES | _rope(partial_rotary_factor=0.25) | dict(model_type="stablelm", layer_norm_eps=_EPSILON)
_NEMOTRON = SIZES | _rope(partial_rotary_factor=0.5) | dict(model_type="nemotron", head_dim=16, norm_eps=_EPSILON)
_OWN_KEYS = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
_PERSIMMON = _OWN_KEYS | _rope(partial_rotary_factor=0.5) | dict(model_type="persimmon", layer_norm_eps=_EPSILON)
_NEOX = _OWN_KEYS | _rope(partial_rotary_factor=0.75) | dict(model_type="gpt_neox", layer_norm_eps=_EPSILON)

_OPT = TOKENS | dict(
    model_type="opt",
    **dict(hidden_size=64, ffn_dim=112, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=96),
    **dict(word_embed_proj_dim=64, tie_word_embeddings=True),
)
#: Options of models that Megatron-LM has no arguments for, and this project builds.
_LIVE = dict(allow_inexpressible=True)

MODELS: dict[str, Model] = {
    "gpt_bigcode": Model(_BIGCODE),
    "gpt_bigcode-heads": Model(
        _BIGCODE | dict(multi_query=False, activation_function="gelu", tie_word_embeddings=False)
    ),
    "olmo": Model(_OLMO),
    "olmo-bias": Model(_OLMO | dict(attention_bias=True, tie_word_embeddings=True)),
    "stablelm": Model(_STABLELM | dict(use_qkv_bias=True)),
    "nemotron": Model(_NEMOTRON, whole=ENGINE),
    "arcee": Model(SIZES | _rope() | dict(model_type="arcee", head_dim=16, rms_norm_eps=_EPSILON)),
    "jais2": Model(SIZES | _rope() | dict(model_type="jais2", head_dim=16, layer_norm_eps=_EPSILON)),
    "persimmon": Model(_PERSIMMON),
    "gpt_neox": Model(_NEOX | dict(use_parallel_residual=False)),
    "gpt_neox-no-attention-bias": Model(_NEOX | dict(use_parallel_residual=False, attention_bias=False)),
    "gpt_neox-parallel": Model(_NEOX | dict(hidden_act="gelu_new", tie_word_embeddings=True)),
    # Two rows of its positions are not kept, and written as 0.
    "opt": Model(_OPT, whole={"impl": "local"} | _LIVE, cut=CUT | _LIVE, exact=False),
    "opt-gelu": Model(
        _OPT | dict(activation_function="gelu", enable_bias=False, tie_word_embeddings=False), exact=False
    ),
}

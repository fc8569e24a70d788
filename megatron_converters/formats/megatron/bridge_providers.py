"""Providers of Megatron-Bridge whose classes say what their fields do not, turned into the attributes of `args` that mean it.

Source: Megatron-Bridge 0.4, models/gemma: embeddings are scaled by the root of the hidden size; Gemma 2 and 3 have norms after both
blocks; the window of Gemma 2 is on layers 0, 2, …; Gemma 3 has two rotary bases, and divides the frequencies of the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ...basics.errors import ConversionError
from .rows_layers import said

Fields = Mapping[str, Any]
_LOCAL = "sliding_attention"
#: Layer of the same names in this project.
_SANDWICH = said("sandwich_norms")


def fields_of_provider(fields: Fields) -> dict[str, Any]:
    """Fields of a provider, with those that its class implies."""
    change = _CLASSES.get(str(fields.get("_target_")).rpartition(".")[2])
    try:
        return {**fields, **({} if change is None else change(fields))}
    except (KeyError, TypeError, ValueError) as error:
        raise ConversionError(
            f"{fields['_target_']} has fields of another release of Megatron-Bridge than are known here ({error!r}); give a "
            "reference model with --hf-config DIR"
        ) from error


def _scaled(fields: Fields, scale: float | None) -> dict[str, Any]:
    """Scales of embeddings and scores, as muP's arguments say them; None is the usual scale of scores."""
    size = fields["kv_channels"]
    mup = {"mup_embedding_mult": math.sqrt(fields["hidden_size"]), "mup_output_mult": 1.0, "mup_attn_scale_power": 1.0}
    return {"use_mup": True, **mup, "mup_base_head_dim": float(size) if scale is None else (scale * size) ** 2}


def _gemma(fields: Fields) -> dict[str, Any]:
    return _scaled(fields, None)


def _gemma2(fields: Fields) -> dict[str, Any]:
    pattern = [(layer + 1) % 2 for layer in range(fields["num_layers"])]
    scales = _scaled(fields, fields["query_pre_attn_scalar"] ** -0.5)
    return {**scales, "spec": _SANDWICH, "window_attn_skip_freq": pattern, "query_pre_attn_scalar": None}


def _gemma3(fields: Fields) -> dict[str, Any]:
    local_base, base = fields["rotary_base"]
    local, factor = _windowed(fields), fields["rope_scaling_factor"]
    return {
        **_scaled(fields, fields["softmax_scale"]),
        **{"spec": _SANDWICH, "softmax_scale": None, "rope_scaling_factor": None},
        "window_size": (fields["window_size"] - 1, 0),
        "window_attn_skip_freq": [int(each) for each in local],
        "rotary_base": base,
        "rotary_bases": [local_base if each else base for each in local],
        "rotary_scaled": None if factor == 1 else [None if each else factor for each in local],
    }


def _windowed(fields: Fields) -> list[bool]:
    """Whether each layer has the window: a pattern of the numbers of those with and without, or the type of each."""
    pattern, layers = list(fields["interleaved_attn_pattern"]), fields["num_layers"]
    if isinstance(pattern[0], str):
        return [kind == _LOCAL for kind in pattern]
    local, full = pattern
    return [layer % (local + full) < local for layer in range(layers)]


_CLASSES: Mapping[str, Callable[[Fields], dict[str, Any]]] = {
    "GemmaModelProvider": _gemma,
    "Gemma2ModelProvider": _gemma2,
    "Gemma3ModelProvider": _gemma3,
}

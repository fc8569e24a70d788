"""Tiny MiniCPM models. Their class is remote code, so transformers' Granite, which computes the same, is the reference.

Granite's constants follow from MiniCPM's: the algebra of both classes is that of a Llama whose embeddings, block outputs and logits
are scaled. MiniCPM3 is transformers' own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .hf import make_model

SCALE_EMB, SCALE_DEPTH, DIM_MODEL_BASE = 12, 1.4, 16
LAYERS, HIDDEN, HEAD_DIM = 4, 64, 16
#: Divisors of MiniCPM4's kind, one for each frequency of a head.
DIVISORS = [round(1 + 0.4 * number, 2) for number in range(HEAD_DIM // 2)]
LONGROPE: Mapping[str, Any] = dict(
    rope_type="longrope", short_factor=DIVISORS, long_factor=DIVISORS, original_max_position_embeddings=512
)
_GRANITE: Mapping[str, Any] = dict(
    embedding_multiplier=float(SCALE_EMB),
    residual_multiplier=SCALE_DEPTH / math.sqrt(LAYERS),
    logits_scaling=HIDDEN / DIM_MODEL_BASE,
    attention_multiplier=HEAD_DIM**-0.5,
)
_SCALES = dict(scale_emb=SCALE_EMB, scale_depth=SCALE_DEPTH, dim_model_base=DIM_MODEL_BASE)


def make_minicpm(
    folder: Path, *, tied: bool = True, rope: Mapping[str, Any] | None = None, **options: Any
) -> tuple[Path, Path]:
    """Write a random MiniCPM into `folder`; returns its folder and that of the Granite with the same tensors.

    `rope` are the parameters of its rotary embeddings. Its config.json is in MiniCPM4's spelling, without `model_type`.
    """
    parameters = {"rope_theta": 1e4, **(rope or {"rope_type": "default"})}
    granite = make_model(
        "granite",
        folder / "granite",
        **{**_GRANITE, "tie_word_embeddings": tied, "rope_parameters": parameters, **options},
    )
    minicpm = folder / "minicpm"
    minicpm.mkdir()
    for path in granite.glob("*.safetensors"):
        (minicpm / path.name).symlink_to(path)
    config = json.loads((granite / "config.json").read_text())
    plain = {name: value for name, value in config.items() if name not in (*_GRANITE, "model_type", "rope_parameters")}
    plain |= {"architectures": ["MiniCPMForCausalLM"], "rope_theta": 10000.0, **_SCALES}
    if rope is not None:
        plain["rope_scaling"] = dict(rope)
    if tied:
        del plain["tie_word_embeddings"]  # the class's default, as published
    (minicpm / "config.json").write_text(json.dumps(plain))
    return minicpm, granite

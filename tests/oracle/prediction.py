"""Layers of multi-token prediction, which transformers does not save, under the names of published files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.helpers import hf_tensors

from .families import MODELS
from .families.model import publish

_BEYOND = "model.layers.4."
_DEEPSEEK = (_BEYOND + "{}.weight", ("enorm", "hnorm", "eh_proj", "shared_head.norm"), _BEYOND)
_FINAL = (_BEYOND + "{}.weight", ("enorm", "hnorm", "eh_proj", "final_layernorm"), _BEYOND)
_OF_QWEN = (
    *("mtp.{}.weight", ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")),
    "mtp.layers.0.",
)
#: By model: names of the tensors that only such a layer has, and the beginning of the names of its others.
PREDICTING = {
    "glm4-moe": _DEEPSEEK,
    "deepseek-v3": _DEEPSEEK,
    "qwen3-next": _OF_QWEN,
}
#: The same of Qwen3.5, whose config.json has another key for their number.
PREDICTING_QWEN3_5 = {"qwen3.5": _OF_QWEN, "qwen3.5-moe": _OF_QWEN}
#: Models that follow one of these.
PREDICTING_ALIKE = {"glm4-moe-lite": _DEEPSEEK, "hy-v3": _FINAL, "bailing-moe-v2": _FINAL}


def with_prediction(family: str, hf_model: Callable[..., Path], folder: Path) -> Path:
    """The family's model with one layer of multi-token prediction, under the names of published files."""
    plain = publish(MODELS[family], hf_model(family), folder.with_name("plain"))
    tensors = hf_tensors(plain)
    template, names, layer = {**PREDICTING, **PREDICTING_ALIKE, **PREDICTING_QWEN3_5}[family]
    key = "mtp_num_hidden_layers" if family in PREDICTING_QWEN3_5 else "num_nextn_predict_layers"
    generator = torch.Generator().manual_seed(5)

    def like(tensor: torch.Tensor) -> torch.Tensor:
        return 0.1 * torch.randn(tensor.shape, generator=generator)

    norm = tensors["model.norm.weight"]
    wide = norm.new_empty(64, 128)
    new = {template.format(name): like(wide if name in ("eh_proj", "fc") else norm) for name in names}
    old = "model.layers.3."
    new |= {layer + key.removeprefix(old): like(value) for key, value in tensors.items() if key.startswith(old)}
    if "shared_head.norm" in names:
        new["model.layers.4.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        new["model.layers.4.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    folder.mkdir()
    save_file({**tensors, **new}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: 1}))
    return folder

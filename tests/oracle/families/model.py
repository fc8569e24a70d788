"""Tiny model of a family: its config, how its folder is published, and how it is cut for the proof."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


class Model(NamedTuple):
    """Tiny model: `fields` are those of config.json for a class that transformers has.

    `publish` makes of its tensors and its config.json those of a family that transformers lacks, which computes the same. `whole`
    and `cut` are options of `MegatronOptions` for the two conversions. The way back is bit for bit unless `exact` is false. Where
    the family computes something else, that is `computed` of the class's logits and its tensors.
    """

    fields: Mapping[str, Any]
    publish: Callable[[Tensors, Config], tuple[Tensors, Config]] | None = None
    whole: Mapping[str, Any] = {"impl": "local"}
    cut: Mapping[str, Any] = {"tp": 2, "pp": 2, "impl": "transformer_engine"}
    exact: bool = True
    computed: Callable[[torch.Tensor, Tensors], torch.Tensor] | None = None

    @property
    def has_experts(self) -> bool:
        """Whether experts are cut, too."""
        return "ep" in self.cut


#: Cut of a mixture of experts: whole experts on each rank.
WITH_EXPERTS: Mapping[str, Any] = {"tp": 2, "pp": 2, "ep": 2, "etp": 1, "impl": "transformer_engine"}
#: Both implementations where megatron-core's own layers cannot compute the model.
ENGINE: Mapping[str, Any] = {"impl": "transformer_engine"}


def tensors_of(folder: Path) -> Tensors:
    """Every tensor of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def expected(model: Model, logits: torch.Tensor, folder: Path) -> torch.Tensor:
    """What the family computes where the class, whose model is in `folder`, computes `logits`."""
    return logits if model.computed is None else model.computed(logits, tensors_of(folder))


def publish(model: Model, folder: Path, target: Path) -> Path:
    """Write the folder that is published of the model that transformers saved in `folder`."""
    if model.publish is None:
        return folder
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors = tensors_of(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors, config = model.publish(tensors, config)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors", {"format": "pt"}
    )
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target

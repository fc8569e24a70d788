"""Recognition of a model's type, size and variant in a folder of either side."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..basics.errors import ConversionError
from ..basics.json_files import read_json
from ..families.config_json import family_from_config, spec_from_config
from ..formats.detect import format_of
from ..formats.hub import located
from ..formats.kinds import MEGATRON
from ..formats.megatron.detecting import Detected, detect
from .presets import LLAMA, MINICPM, PRESETS, RELEASES, VOCABULARIES, Release

LOG = logging.getLogger(__name__)
UNKNOWN = "unknown"
#: Families of each type that a checkpoint without a configuration may be, in this order. A dense MiniCPM has a Llama's names.
FAMILIES_OF = {MINICPM: ("minicpm", "minicpm3", "llama"), LLAMA: ("llama", "mistral")}
#: More rows than padding adds to a vocabulary.
_MOST_PADDING = 1024
_MINICPM4 = "minicpm4"


class Recognised(NamedTuple):
    """Type and size of a model, and what tells the type; `sure` is false where nothing does."""

    model_type: str
    size: str
    where: str
    sure: bool = True


def recognise(path: str | os.PathLike[str]) -> Recognised:
    """Recognise the model in a checkpoint, a Hugging Face folder, or beside a file of weights."""
    place = located(path, config_only=True).folder
    if _is_checkpoint(place):
        return recognise_detected(detect(place))
    config = _config_beside(place)
    spec = spec_from_config(config, ignored=config)
    model_type = _type_of_family(spec.family)
    shapes = spec.num_layers, spec.hidden_size
    release = next((each for each in RELEASES if (each.layers, each.hidden) == shapes), None)
    return Recognised(model_type, _size(model_type, spec.num_layers, release), "config.json")


def _is_checkpoint(place: Path) -> bool:
    return place.is_dir() and format_of(place) == MEGATRON


def _config_beside(place: Path) -> dict[str, Any]:
    return read_json((place if place.is_dir() else place.parent) / "config.json")


def _type_of_family(family: str) -> str:
    return MINICPM if family in FAMILIES_OF[MINICPM][:-1] else LLAMA


def recognise_detected(found: Detected) -> Recognised:
    """Recognise the model in a checkpoint: by what its args record, its shapes, its vocabulary, or the number of its layers."""
    release = _release(found)
    model_type, where = _type(found, release)
    sure = model_type is not None
    chosen = model_type or MINICPM
    result = Recognised(chosen, _size(chosen, found.num_layers, release), where, sure)
    LOG.debug("%s: type %s, size %s (by %s)", found.directory, *result[:3])
    return result


def _type(found: Detected, release: Release | None) -> tuple[str | None, str]:
    recorded = found.arg("hf_config")
    if isinstance(recorded, dict):
        return _recorded_type(recorded), "the configuration that the args record"
    if found.arg("scale_emb") is not None:
        return MINICPM, "scale_emb of the args"
    if found.is_blockffn or (found.is_latent and not found.is_moe):
        return MINICPM, "names of its tensors"
    if release is not None:
        return release.model_type, "its shapes"
    for model_type, sizes in VOCABULARIES.items():
        if any(size <= found.vocab_rows < size + _MOST_PADDING for size in sizes):
            return model_type, f"its vocabulary of {found.vocab_rows} rows"
    having = [
        name for name, presets in PRESETS.items() if any(each.layers == found.num_layers for each in presets.values())
    ]
    if having == [LLAMA]:
        return LLAMA, f"its {found.num_layers} layers"
    return None, "default, since nothing tells; the names of tensors are the same"


def _recorded_type(config: Mapping[str, Any]) -> str:
    try:
        return _type_of_family(family_from_config(config).name)
    except ConversionError:  # of a family file that is not in use; opening the checkpoint says so
        return LLAMA


def _release(found: Detected) -> Release | None:
    """Released model with these shapes."""
    shapes = found.num_layers, found.hidden_size, found.query_rows, found.kv_rows
    for each in RELEASES:
        rows = each.query_heads * each.head_dim, each.kv_heads * each.head_dim
        if shapes == (each.layers, each.hidden, *rows) or (
            found.is_latent and shapes[:2] == (each.layers, each.hidden)
        ):
            return each
    return None


def _size(model_type: str, layers: int | None, release: Release | None) -> str:
    """Size of the released model, or of the first preset with as many layers."""
    if release is not None and release.model_type == model_type:
        return release.size
    return next((size for size, preset in PRESETS[model_type].items() if preset.layers == layers), UNKNOWN)


def variant(path: str | os.PathLike[str]) -> str:
    """Variant of MiniCPM: "minicpm4" for its fourth generation and for mixtures of experts, else "minicpm"."""
    place = located(path, config_only=True).folder
    if not _is_checkpoint(place):
        config = _config_beside(place)
        spec = spec_from_config(config, ignored=config)
        scaling = spec.values.get("rope_scaling")
        is_fourth = scaling is not None and scaling.kind == "longrope" and spec.family == "minicpm"
        return _MINICPM4 if is_fourth or spec.num_experts else MINICPM
    found = detect(place)
    release = _release(found)
    is_fourth = release is not None and release.variant == _MINICPM4
    return _MINICPM4 if is_fourth or found.is_moe or found.is_blockffn else MINICPM

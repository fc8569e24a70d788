"""Conversions run from Python, for tests of results rather than of command lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_converters.basics.dtypes import DType
from megatron_converters.basics.errors import ConversionError
from megatron_converters.conversion.endpoint import Source, Target
from megatron_converters.conversion.progress import Silent
from megatron_converters.conversion.run import convert
from megatron_converters.formats.huggingface.source import HFSource
from megatron_converters.formats.huggingface.target import HFOptions, HFTarget
from megatron_converters.formats.megatron.opening import open_megatron
from megatron_converters.formats.megatron.rank_files_target import MegatronTarget
from megatron_converters.formats.megatron.reading import MegatronReadOptions
from megatron_converters.formats.megatron.torch_dist_target import TorchDistTarget
from megatron_converters.formats.megatron.writing import MegatronOptions


def run(source: Source, target: Target, dtype: DType | None = None) -> list[str]:
    """Convert; returns the lines that a user would see."""
    return convert(source, target, dtype, Silent())


def hf_to_megatron(source: Path, target: Path, **options: Any) -> Path:
    """Convert Hugging Face to rank files; `options` are those of `MegatronOptions`."""
    run(HFSource(source), MegatronTarget(target, MegatronOptions(**options)))
    return target


def hf_to_torch_dist(source: Path, target: Path, **options: Any) -> Path:
    """Convert Hugging Face to torch_dist; `options` are those of `MegatronOptions`."""
    run(HFSource(source), TorchDistTarget(target, MegatronOptions(**options)))
    return target


def megatron_to_hf(source: Path, target: Path, **options: Any) -> Path:
    """Convert either Megatron-LM format to Hugging Face; `options` are those of `MegatronReadOptions`."""
    run(open_megatron(source, MegatronReadOptions(**options)), HFTarget(target, HFOptions()))
    return target


def refusal(folder: Path, **options: Any) -> str:
    """Why a checkpoint is not opened, with X for its folder; `options` are those of `MegatronReadOptions`."""
    with pytest.raises(ConversionError) as raised:
        open_megatron(folder, MegatronReadOptions(**options))
    return str(raised.value).replace(str(folder), "X")


def reshard(source: Path, target: Path, **options: Any) -> Path:
    """Convert either Megatron-LM format to rank files; `options` are those of `MegatronOptions`."""
    run(open_megatron(source), MegatronTarget(target, MegatronOptions(**options)))
    return target


def different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names that only one side has, or whose dtype, shape or bits differ."""
    names = sorted(one.keys() | other.keys())
    return [name for name in names if name not in one or name not in other or not _same(one[name], other[name])]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and bool((one.view(torch.uint8) == other.view(torch.uint8)).all())
    )

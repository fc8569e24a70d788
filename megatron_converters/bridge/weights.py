"""Weights of a live model, one after the other or saved as files, as `AutoBridge` gives them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..assets.origin import Origin
from ..basics.dtypes import DType
from ..basics.errors import UsageError
from ..basics.folders import new_folder
from ..conversion.crew import ALONE, Crew
from ..conversion.endpoint import Target
from ..conversion.progress import Progress, Silent, make_progress
from ..conversion.run import convert
from ..formats.huggingface.options import HFOptions
from ..formats.huggingface.target import HFTarget
from ..formats.huggingface.weights_target import WeightsTarget
from ..live.export import ExportOptions, Order, WeightDistributionMode, export
from ..live.layout import LiveLayout
from ..live.model import live_model
from ..live.shard_map import MappedTensor, ShardMap, shard_map
from ..live.source import LiveSource
from ..live.writers import Writers
from .pretrained import Pretrained, weights_dtype


class HFWeightTuple(NamedTuple):
    """Weight of Hugging Face by its name."""

    param_name: str
    weight: torch.Tensor


class HFSourcedWeightTuple(NamedTuple):
    """The same with the names of megatron-core's parameters that it is part of, without repetitions."""

    param_name: str
    weight: torch.Tensor
    megatron_names: tuple[str, ...]


def map_of(pretrained: Pretrained, layout: LiveLayout) -> ShardMap:
    """Shard map of a model with this layout, in files as `save_hf_pretrained` writes them."""
    target = HFTarget(Path(os.devnull), HFOptions(expert_layout=pretrained.expert_layout))
    dtype = layout.spec.dtype
    outline = target.prepare(layout.spec, pretrained.origin(), lambda ref: dtype)
    return shard_map(layout, target, outline)


def weights(
    pretrained: Pretrained,
    model: Any,
    options: ExportOptions,
    *,
    names: Collection[str] | None = None,
    show_progress: bool = False,
    with_megatron_names: bool = False,
) -> Iterator[HFWeightTuple | HFSourcedWeightTuple]:
    """Weights that this process gets, all or those of these names."""
    with live_model(model, pretrained.spec) as live:
        shards = map_of(pretrained, live.layout)
        if names is not None:
            shards = dataclasses.replace(shards, tensors={name: shards.tensors[name] for name in names})
        progress = _progress(show_progress and live.process == 0, "exporting", "exported")
        progress.start(sum(tensor.elements for tensor in shards.tensors.values()) * live.layout.spec.dtype.itemsize)
        try:
            for tensor, weight in export(live, shards, options, progress):
                if with_megatron_names:
                    yield HFSourcedWeightTuple(tensor.name, weight, _megatron_names(tensor))
                else:
                    yield HFWeightTuple(tensor.name, weight)
        finally:
            progress.stop()


def _megatron_names(tensor: MappedTensor) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.parameter for part in tensor.parts))


def export_options(
    cpu: bool, order: str | None, mode: str | WeightDistributionMode | None, weight_dtype: Any, bucket_bytes: int
) -> ExportOptions:
    """Options from those of `export_hf_weights`; raises `UsageError` for a value that is none of theirs."""
    dtype = weights_dtype(weight_dtype, "weight_dtype")
    return ExportOptions(
        WeightDistributionMode.REPLICATE if mode is None else _member(WeightDistributionMode, mode, "mode"),
        Order.MODEL if order is None else _member(Order, order, "order"),
        cpu,
        None if dtype is None else dtype.torch,
        bucket_bytes,
    )


def _member(kind: Any, value: Any, name: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(repr(member.value) for member in kind)
        raise UsageError(f"{name} {value!r} is not one of {known}") from None


def save(
    pretrained: Pretrained,
    model: Any,
    path: str | os.PathLike[str],
    *,
    weights_only: bool = False,
    source_path: str | None = None,
    show_progress: bool = True,
    every_n_ranks: int = 0,
    weight_dtype: Any = None,
    overwrite: bool = False,
    max_shard_size: int = HFOptions.max_shard_size,
) -> None:
    """Save a model as a Hugging Face folder, all or nothing; all processes of the model call this.

    With `every_n_ranks`, each N-th process writes files, else the first one all. Configuration, tokenizer and code come from
    `source_path` where it is given. Raises `ConversionError` in all processes if one of them fails.
    """
    options = HFOptions(
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        expert_layout=pretrained.expert_layout,
        tokenizer=source_path,
    )
    target = (WeightsTarget if weights_only else HFTarget)(new_folder(path), options)
    dtype = weights_dtype(weight_dtype, "weight_dtype")
    write(
        pretrained, model, target, pretrained.origin(), dtype, show_progress=show_progress, every_n_ranks=every_n_ranks
    )


def write(
    pretrained: Pretrained,
    model: Any,
    target: Target,
    origin: Origin,
    dtype: DType | None = None,
    *,
    show_progress: bool,
    every_n_ranks: int = 0,
) -> list[str]:
    """Write a live model to a target, together with the other processes; returns lines for the user in the first one."""
    lines: list[str] = []
    with live_model(model, pretrained.spec) as live:
        heartbeat = live.heartbeat
        writers = tuple(range(0, live.processes, every_n_ranks)) if every_n_ranks else (0,)
        source = LiveSource(live, origin, writers)
        if live.process in writers:
            crew: Crew = ALONE if len(writers) == 1 or heartbeat is None else Writers(heartbeat, writers, live.process)
            progress = _progress(show_progress and live.process == 0, "saving", "saved")
            lines = convert(source, target, dtype, progress, crew=crew)
        else:
            source.serve()
        if heartbeat is not None:
            heartbeat.meet("end")
    return lines


def _progress(shown: bool, doing: str, done: str) -> Progress:
    return make_progress(False, doing, done) if shown else Silent()

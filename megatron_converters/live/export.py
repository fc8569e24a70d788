"""Export of a live model's weights under Hugging Face's names, in buckets that the processes move together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from functools import partial
from typing import NamedTuple

import torch

from ..basics.errors import ConversionError, UsageError
from ..model.values import Affine
from .exchange import Exchange, Received, Wanted, in_buckets
from .layout import Key
from .model import LiveModel
from .shard_map import MappedTensor, Part, ShardMap

#: Bytes of weights that are moved together, unless one tensor is larger.
BUCKET_BYTES = 64 << 20
#: Runs of a part above which its rows are gathered by their numbers.
_MAX_RUNS = 32


class WeightDistributionMode(Enum):
    """Processes that get the weights: the first one, all of them, or each one its share; or those of a tensor's own stage."""

    CONSOLIDATE = "consolidate"
    REPLICATE = "replicate"
    DISTRIBUTE = "distribute"
    STAGE = "stage"


class Order(Enum):
    """Order of weights: that of the model's layers, or by file of the saved model."""

    MODEL = "model"
    SAFETENSORS = "safetensors"


class ExportOptions(NamedTuple):
    """How weights are exported. `dtype` None keeps that of the parameters; `cpu` moves the weights to the CPU."""

    mode: WeightDistributionMode = WeightDistributionMode.REPLICATE
    order: Order = Order.MODEL
    cpu: bool = False
    dtype: torch.dtype | None = None
    bucket_bytes: int = BUCKET_BYTES


def export(
    live: LiveModel, shards: ShardMap, options: ExportOptions, progress: Callable[[int], None] = lambda _: None
) -> Iterator[tuple[MappedTensor, torch.Tensor]]:
    """Weights of the model that this process gets, each a tensor of its own. All processes must go through it to the end.

    Raises `ConversionError` if a process is lost, with its number.
    """
    if options.bucket_bytes < 1:
        raise UsageError(f"bucket_bytes is {options.bucket_bytes}; it must be at least 1")
    tensors = list(shards.tensors.values())
    if options.order is Order.SAFETENSORS:
        tensors.sort(key=lambda tensor: tensor.file)
    takers = _takers(live, tensors, options)
    exchange = live.exchange()
    for bucket in in_buckets(tensors, partial(_nbytes, live), options.bucket_bytes):
        received = _moved(exchange, live, bucket, takers)
        for tensor in bucket:
            if takers is None or live.process in takers[tensor.name]:
                found = _assembled(tensor, received, options.dtype)
                yield tensor, found.cpu() if options.cpu else found
            progress(_nbytes(live, tensor))
        del received


def _takers(
    live: LiveModel, tensors: Sequence[MappedTensor], options: ExportOptions
) -> dict[str, tuple[int, ...]] | None:
    """Processes that get each tensor; None where all get all."""
    if options.mode is WeightDistributionMode.REPLICATE:
        return None
    if options.mode is WeightDistributionMode.CONSOLIDATE:
        return {tensor.name: (0,) for tensor in tensors}
    if options.mode is WeightDistributionMode.STAGE:
        of_stage = _by_stage(live)
        return {tensor.name: of_stage[live.stage(tensor.parts[0].ranks[0])] for tensor in tensors}
    assigned = [0] * live.processes
    by_file: dict[str, int] = {}
    found: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        process = assigned.index(min(assigned))
        if options.order is Order.SAFETENSORS:  # a file as a whole, so that its process can write it
            process = by_file.setdefault(tensor.file, process)
        assigned[process] += tensor.elements
        found[tensor.name] = (process,)
    return found


def _by_stage(live: LiveModel) -> dict[int, tuple[int, ...]]:
    """Processes of each pipeline stage."""
    found: dict[int, tuple[int, ...]] = {}
    for process in range(live.processes):
        stage = live.stage(process)
        found[stage] = (*found.get(stage, ()), process)
    return found


def _nbytes(live: LiveModel, tensor: MappedTensor) -> int:
    return tensor.elements * _wanted(live, tensor.parts[0], None).dtype.itemsize


def _wanted(live: LiveModel, part: Part, taker: int | None) -> Wanted:
    return live.wanted_of(part.ranks, Key(part.model, part.parameter), part.parameter_shape, taker)


def _moved(
    exchange: Exchange, live: LiveModel, bucket: Sequence[MappedTensor], takers: dict[str, tuple[int, ...]] | None
) -> Received:
    """Parameters that this process needs for the tensors of a bucket that it gets."""
    if takers is None:
        return exchange.broadcast([_wanted(live, part, None) for tensor in bucket for part in tensor.parts])
    wanted: dict[int, list[Wanted]] = {}
    for tensor in bucket:
        for taker in takers[tensor.name]:
            wanted.setdefault(taker, []).extend(_wanted(live, part, taker) for part in tensor.parts)
    return exchange.send(wanted)


def _assembled(tensor: MappedTensor, received: Received, dtype: torch.dtype | None) -> torch.Tensor:
    """Tensor of Hugging Face, a new one, from the parameters that hold its parts."""
    found = [(part, received[_source(part, received)]) for part in tensor.parts]
    first = found[0][1]
    result = torch.empty(tensor.shape, dtype=dtype or first.dtype, device=first.device)
    for part, parameter in found:
        _copy(part, parameter, result)
    if result.dtype is torch.float16 and first.dtype is not torch.float16 and not torch.isfinite(result).all():
        raise ConversionError(
            f"{tensor.name} holds values beyond the range of float16; export it in its own dtype ({first.dtype}) or in bfloat16"
        )
    return result


def _source(part: Part, received: Received) -> tuple[int, Key]:
    """Owner and key of a part's parameter among those received."""
    key = Key(part.model, part.parameter)
    return next((rank, key) for rank in part.ranks if (rank, key) in received)


def _copy(part: Part, parameter: torch.Tensor, result: torch.Tensor) -> None:
    """Copy a part from its parameter into a tensor."""
    target = result if part.entry is None else result[part.entry]
    matrix = target.T if part.transposed else target.reshape(target.shape[0], -1)
    source = parameter.reshape(parameter.shape[0], -1)
    columns = slice(part.column, part.column + part.columns)
    held = slice(part.parameter_column, part.parameter_column + part.columns)
    if len(part.runs) > _MAX_RUNS:
        rows = torch.cat([torch.arange(row, row + count) for row, _, count in part.runs]).to(matrix.device)
        from_rows = torch.cat([torch.arange(row, row + count) for _, row, count in part.runs]).to(matrix.device)
        matrix[rows, columns] = _computed(source[from_rows, held], part.value).to(matrix.dtype)
        return
    for row, from_row, count in part.runs:
        matrix[row : row + count, columns].copy_(_computed(source[from_row : from_row + count, held], part.value))


def _computed(values: torch.Tensor, value: Affine | None) -> torch.Tensor:
    """Values as a tensor of Hugging Face has them, computed in float32 where they are."""
    if value is None:
        return values
    computed = value.apply(values.float().cpu().numpy())
    return torch.from_numpy(computed).to(values.device)

"""Habana's capacity bins: small buffers of each router that record how a run balanced its experts.

They differ from rank to rank and hold for one set of parallel sizes, so Hugging Face has no place for them. Habana's tools keep
them beside the model, in a `capacity_bins.pt` (HabanaAI/Megatron-LM 1.20 to 1.24, tools/checkpoint/
convert_mlm_to_hf_checkpoint.py and loader_mixtral_hf.py): a nested dictionary [name][layer][pipeline rank][expert rank]
[tensor rank], layers counted over all stages, with `{}` where a rank holds none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..basics.errors import ConversionError, UsageError, raise_all
from ..model.spec import ModelSpec
from ..sharding.ranks import Parallel, Rank
from ..storage import torch_zip
from ..storage.output_file import OutputFile
from ..storage.tensor import StoredTensor

FILE = "capacity_bins.pt"
#: Buffer whose length is Habana's `moe_capacity_bins_num`.
_EDGES = "capacity_bins"
#: Key of a buffer in a rank's file.
_KEY = "decoder.layers.{layer}.mlp.router.capacity_bins.{name}"
CAPACITY_BINS = re.compile(
    re.escape(_KEY).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{name\}", r"(?P<name>[a-z_.]+)")
)


class Place(NamedTuple):
    """Keys of a buffer in `capacity_bins.pt`, in the file's order."""

    name: str
    layer: int
    pp: int
    ep: int
    tp: int

    def __str__(self) -> str:
        return f"{self.name} of layer {self.layer} on pp={self.pp}, ep={self.ep}, tp={self.tp}"


@dataclass(frozen=True)
class CapacityBins:
    """Buffers of a whole checkpoint, as tensors in its files, and the parallel sizes that they belong to."""

    where: str
    layers: int
    pp: int
    ep: int
    tp: int
    tensors: Mapping[Place, StoredTensor]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the kinds of buffers."""
        return tuple(dict.fromkeys(place.name for place in self.tensors))

    @property
    def count(self) -> int:
        """Number of bins of a router, 0 if it is not known."""
        return next((data.shape[0] for place, data in self.tensors.items() if place.name == _EDGES and data.shape), 0)

    def on_rank(self, rank: Rank, parallel: Parallel) -> Iterator[tuple[str, StoredTensor]]:
        """Buffers of one rank, by their keys in a checkpoint."""
        for place, data in self.tensors.items():
            if (place.pp, place.ep, place.tp) == (rank.pp, rank.ep, rank.tp):
                yield _KEY.format(layer=parallel.place(place.layer)[1], name=place.name), data


def from_rank_files(
    where: str, parallel: Parallel, files: Mapping[Rank, Mapping[str, StoredTensor]]
) -> CapacityBins | None:
    """Capacity bins of a checkpoint from the tensors of its ranks' files, by key; None if there are none."""
    tensors: dict[Place, StoredTensor] = {}
    for rank, file in files.items():
        before = sum(parallel.stages[: rank.pp])
        for key, data in file.items():
            match = CAPACITY_BINS.fullmatch(key)
            if match is not None:
                tensors[Place(match["name"], before + int(match["layer"]), rank.pp, rank.ep, rank.tp)] = data
    if not tensors:
        return None
    return CapacityBins(where, sum(parallel.stages), parallel.pp, parallel.ep, parallel.tp, tensors)


def check(bins: CapacityBins, spec: ModelSpec, parallel: Parallel) -> None:
    """Raise unless every rank of these sizes has every kind of buffer for each of its mixtures of experts, and no more."""
    sizes, wanted = (bins.tp, bins.pp, bins.ep), (parallel.tp, parallel.pp, parallel.ep)
    if sizes != wanted:
        raise UsageError(
            f"{bins.where} has capacity bins of tp={sizes[0]}, pp={sizes[1]} and ep={sizes[2]}, which are valid for these "
            f"sizes only, not for tp={wanted[0]}, pp={wanted[1]} and ep={wanted[2]}; choose the same sizes or leave the bins out"
        )
    expected = {
        Place(name, layer, rank.pp, rank.ep, rank.tp)
        for name in bins.names
        for layer in range(spec.num_layers)
        if spec.layer(layer).is_moe
        for rank in parallel.ranks(parallel.place(layer)[0])
    }
    problems = [f"{place} is missing" for place in sorted(expected - bins.tensors.keys())]
    problems += [
        f"{place} is there, but the model has no such router" for place in sorted(bins.tensors.keys() - expected)
    ]
    if bins.layers != spec.num_layers:
        problems.append(f"there are {bins.layers} layers, but the model has {spec.num_layers}")
    raise_all(f"{bins.where}: the capacity bins are not those of this model's routers:", problems)


def left_out_note(bins: CapacityBins, option: str) -> str:
    """Note for a user who did not ask for the bins."""
    return (
        f"{len(bins.tensors)} capacity-bin buffers of {bins.where} are left out; they belong to one run at tp={bins.tp}, "
        f"pp={bins.pp} and ep={bins.ep} ({option} keeps them)"
    )


def write(bins: CapacityBins, path: Path) -> None:
    """Write a `capacity_bins.pt` as Habana's converter does, for reading with `torch.load(path, weights_only=True)`."""

    def leaf(place: Place) -> Any:
        data = bins.tensors.get(place)
        return {} if data is None else torch_zip.NewTensor(str(place), data.dtype, data.shape)

    file = torch_zip.lay_out(path, _nested(bins, leaf))
    try:
        for place, data in bins.tensors.items():
            fill(file, str(place), data)
        file.close()
    except BaseException:
        file.discard()
        raise


def fill(file: OutputFile, name: str, data: StoredTensor) -> None:
    """Write one buffer, which is small, into its place in a file."""
    file.write(name, 0, np.ascontiguousarray(data.array()))


def _nested(bins: CapacityBins, leaf: Callable[[Place], Any]) -> dict[str, Any]:
    return {
        name: {
            layer: {
                pp: {ep: {tp: leaf(Place(name, layer, pp, ep, tp)) for tp in range(bins.tp)} for ep in range(bins.ep)}
                for pp in range(bins.pp)
            }
            for layer in range(bins.layers)
        }
        for name in bins.names
    }


def read(path: Path) -> CapacityBins:
    """Buffers in a `capacity_bins.pt`, without reading their elements; raises `ConversionError` for a file of another form."""
    if not path.is_file():
        raise ConversionError(
            f"{path} is missing; make it with --save-capacity-bins, copy it there or leave out --load-capacity-bins"
        )
    found = dict(_leaves(torch_zip.read(path), (), path))
    names, *numbers = ({keys[level] for keys in found} for level in range(len(_LEVELS)))
    layers, pp, ep, tp = map(len, numbers)
    counted = all(level == set(range(len(level))) for level in numbers)
    complete = counted and len(found) == len(names) * layers * pp * ep * tp
    if not complete or not all(isinstance(name, str) for name in names):
        raise ConversionError(
            f"{path} does not have the same {', '.join(_LEVELS[1:])}, counted from 0, under every name; write it again with "
            "--save-capacity-bins"
        )
    tensors = {Place(*keys): data for keys, data in found.items() if isinstance(data, StoredTensor)}
    empty = sorted(names - {place.name for place in tensors})
    if empty or not tensors:
        raise ConversionError(
            f"{path} holds no capacity bins{''.join(f', {name}' for name in empty)}; leave out --load-capacity-bins"
        )
    return CapacityBins(str(path), layers, pp, ep, tp, tensors)


#: Kind of the keys of each level.
_LEVELS = ("names", "layers", "pipeline ranks", "expert ranks", "tensor ranks")


def _leaves(tree: Any, keys: tuple[Any, ...], path: Path) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every tensor or `{}` below the five levels, with its keys."""
    place = "".join(f"[{key!r}]" for key in keys)
    if len(keys) < len(_LEVELS):
        if not isinstance(tree, Mapping):
            raise ConversionError(
                f"{path}: there is a {type(tree).__name__} at {place or 'the top'} instead of {_LEVELS[len(keys)]}; it is not "
                "a file of capacity bins"
            )
        for key, subtree in tree.items():
            yield from _leaves(subtree, (*keys, key), path)
    elif isinstance(tree, StoredTensor) or (isinstance(tree, dict) and not tree):
        yield keys, tree
    else:
        raise ConversionError(f"{path}: there is a {type(tree).__name__} at {place} instead of a tensor")

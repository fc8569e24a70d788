"""Mappings between names of Hugging Face and of megatron-core as data, read from the tables of families and of Megatron's names."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from ..families import FAMILIES
from ..formats.huggingface.parts import HFNames
from ..formats.megatron.rank_tensors import RankTensors
from ..live.layout import Naming, live_conventions
from ..live.shard_map import ShardMap
from ..model.slots import refs
from ..model.spec import ModelSpec
from ..sharding.ranks import Parallel


class Mapping(NamedTuple):
    """Parameter of megatron-core and the tensors of Hugging Face that it holds, with `*` for numbers of layers and experts."""

    megatron_param: str
    hf_param: tuple[str, ...]
    slot: str


class ConversionTask(NamedTuple):
    """Parameter of a process's model, and the tensors of Hugging Face that it is part of."""

    param_name: str
    model: int
    ranks: tuple[int, ...]
    hf_names: tuple[str, ...]


class MappingRegistry:
    """All mappings of a model."""

    def __init__(self, spec: ModelSpec) -> None:
        self._mappings = list(dict.fromkeys(_mappings(spec)))

    def get_all_mappings(self) -> list[Mapping]:
        """Mappings in the order of the model."""
        return list(self._mappings)

    def get_mappings_by_pattern(self, pattern: str) -> list[Mapping]:
        """Mappings whose parameter matches a pattern with `*`."""
        return [each for each in self._mappings if fnmatchcase(each.megatron_param, pattern)]

    def megatron_to_hf_lookup(self, name: str) -> Mapping | None:
        """Mapping of a parameter by its name."""
        return next((each for each in self._mappings if fnmatchcase(name, each.megatron_param)), None)

    def hf_to_megatron_lookup(self, name: str) -> Mapping | None:
        """Mapping of a tensor of Hugging Face by its name."""
        return next((each for each in self._mappings if any(fnmatchcase(name, hf) for hf in each.hf_param)), None)

    def describe(self) -> str:
        """One line for each mapping."""
        return "\n".join(f"{each.megatron_param} <-> {', '.join(each.hf_param)}" for each in self._mappings)


class ModelBridge(NamedTuple):
    """What holds the mappings of a model."""

    spec: ModelSpec

    def mapping_registry(self) -> MappingRegistry:
        """Mappings of the model."""
        return MappingRegistry(self.spec)


def tasks(shards: ShardMap) -> list[ConversionTask]:
    """Tasks of a shard map, one for each parameter of each of a model's parts."""
    found: dict[tuple[str, int, tuple[int, ...]], dict[str, None]] = {}
    for tensor in shards.tensors.values():
        for part in (*tensor.parts, *tensor.copies):
            found.setdefault((part.parameter, part.model, part.ranks), {})[tensor.name] = None
    return [ConversionTask(*key, tuple(names)) for key, names in found.items()]


def _mappings(spec: ModelSpec) -> Iterator[Mapping]:
    stored = live_conventions(spec)
    whole = RankTensors(
        spec,
        Parallel(1, (spec.num_layers,)),
        spec.vocab_size,
        impl=Naming.impl,
        expert_layout=Naming.expert_layout,
        mtp_module=stored.mtp_module,
    )
    names = HFNames(FAMILIES[spec.family], spec)
    for ref in refs(spec):
        place = next(iter(whole.places(ref)))
        starred = [_starred(name) for name in names.names(ref)]
        yield Mapping(_starred(place.key), tuple(starred), ref.slot.name)


def _starred(name: str) -> str:
    """Name with `*` in place of numbers between dots."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))

"""Layout of a live model: which parameters of which processes hold the rows and columns of each slot."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from ..basics.errors import ConversionError, UsageError
from ..conversion.composing import Piece
from ..conversion.outline import Fill
from ..conversion.stored_model import has_multipliers
from ..formats.megatron.conventions import Conventions, conventions
from ..formats.megatron.names import DIALECTS
from ..formats.megatron.options import FOLD
from ..formats.megatron.rank_tensors import RankTensors
from ..formats.megatron.releases import NEWEST, parse
from ..model.slots import Ref
from ..model.spec import ModelSpec
from ..sharding.ranks import Cut, Parallel, Rank, padded_vocab, parallel_for
from ..sharding.stages import PipelineSplit

#: Greatest multiple that vocabularies are padded to; megatron-core itself needs no more than the tensor-parallel size.
_MOST_PADDING = 128
_DIVISOR = "make_vocab_size_divisible_by"


class Key(NamedTuple):
    """Parameter of a process: the number of the model in its list, and the name there."""

    model: int
    parameter: str


class Holding(NamedTuple):
    """Share of a slot that the processes `holders` have as a parameter; all of these hold the same."""

    holders: tuple[int, ...]
    key: Key
    cut: Cut


@dataclass(frozen=True)
class Naming:
    """Names of parameters: keys of `names.DIALECTS` and `names.EXPERTS`."""

    impl: str = "local"
    expert_layout: str = "sequential"


def installed_release() -> str:
    """Release of the installed megatron-core; the newest that is known where there is none."""
    try:
        return parse(version("megatron-core"))
    except (PackageNotFoundError, UsageError):
        return NEWEST


def live_conventions(spec: ModelSpec) -> Conventions:
    """What a live model stores otherwise than the hub: multipliers are folded into its weights."""
    return conventions(spec, installed_release(), FOLD if has_multipliers(spec) else None)


def grid(parallel: Parallel, processes: int) -> tuple[Rank, ...]:
    """Numbers of each process in the parallel groups, in megatron-core's usual order, tp-cp-ep-dp-pp.

    Source: megatron-core 0.16.1, `RankGenerator` in parallel_state.py. Raises `ConversionError` where the sizes do not fit.
    """
    each, left = divmod(processes, parallel.pp)
    least = stage_size(parallel)
    if left or each % least:
        sizes = f"tp={parallel.tp}, pp={parallel.pp}, ep={parallel.ep}, etp={parallel.etp}"
        raise ConversionError(
            f"a world size of {processes} cannot be divided into {sizes}, which takes {parallel.pp * least} or a multiple of it; "
            "start as many, or choose sizes that fit"
        )
    return tuple(
        Rank(r % parallel.tp, stage, r // parallel.etp % parallel.ep, r % parallel.etp)
        for stage in range(parallel.pp)
        for r in range(each)
    )


def stage_size(parallel: Parallel) -> int:
    """Least number of processes of a pipeline stage."""
    return math.lcm(parallel.tp, parallel.etp * parallel.ep)


class LiveLayout:
    """Layout of a model of this spec that is cut by `parallel`, where process i has the numbers `ranks[i]`.

    `padded` counts embedding rows with padding.
    """

    def __init__(self, spec: ModelSpec, parallel: Parallel, ranks: Sequence[Rank], padded: int, naming: Naming) -> None:
        self.spec, self.parallel, self.padded, self.naming = spec, parallel, padded, naming
        # A model without experts has the numbers of those groups, too, which then mean nothing.
        self.ranks = tuple(ranks) if spec.num_experts else tuple(Rank(r.tp, r.pp, 0, r.tp) for r in ranks)
        self.conventions = live_conventions(spec)
        self._tensors = RankTensors(
            spec,
            parallel,
            padded,
            impl=naming.impl,
            expert_layout=naming.expert_layout,
            shards=self.conventions.shards,
            mtp_module=self.conventions.mtp_module,
        )
        self._holders: dict[tuple[Rank, ...], tuple[int, ...]] = {}

    def holdings(self, ref: Ref) -> Iterator[Iterable[Holding]]:
        """Holdings of a ref in each place that has it: together those of a place are the whole slot."""
        for place in self._tensors.places(ref):
            shares: dict[int, list[Rank]] = {}
            cuts = {share.number: share.cut for share in place.location.shares}
            for share in place.location.shares:
                shares.setdefault(share.number, []).append(share.rank)
            key = Key(place.location.stage // self.parallel.pp, place.key)
            yield [Holding(self._processes(tuple(ranks)), key, cuts[number]) for number, ranks in shares.items()]

    def _processes(self, ranks: tuple[Rank, ...]) -> tuple[int, ...]:
        """Processes that have one of these numbers."""
        if ranks not in self._holders:
            self._holders[ranks] = tuple(process for rank in ranks for process in self._by_rank.get(rank, ()))
        return self._holders[ranks]

    @cached_property
    def _by_rank(self) -> dict[Rank, list[int]]:
        found: dict[Rank, list[int]] = {}
        for process, rank in enumerate(self.ranks):
            found.setdefault(rank, []).append(process)
        return found

    def fill(self, ref: Ref, fill: Fill) -> Fill:
        """Fill of a parameter as the model stores the ref."""
        return fill if self.conventions.is_usual(ref.slot) else self.conventions.fill(ref, fill)

    def pieces(self, ref: Ref, piece: Piece) -> list[Piece]:
        """Pieces of the hub's slot from a piece of the model."""
        return self.conventions.pieces(ref, piece)


def planned(spec: ModelSpec, sizes: Mapping[str, Any], names: str = Naming.impl) -> LiveLayout:
    """Layout of a model that is not there: of `sizes` "tp", "pp", "ep", "etp", "vpp" and "world", and fields of `PipelineSplit`.

    "make_vocab_size_divisible_by" is Megatron-LM's, where the vocabulary is padded to more than a live model of ours has.
    `names` are those of a key of `names.DIALECTS`. Raises `UsageError` for an unknown size, `ConversionError` for one that the
    model cannot have, with those that it can.
    """
    sizes = dict(sizes)
    fields = {field.name for field in dataclasses.fields(PipelineSplit)}
    known = {"tp", "pp", "ep", "etp", "vpp", "world", _DIVISOR}
    unknown = sorted(sizes.keys() - known - fields)
    if unknown or names not in DIALECTS:
        raise UsageError(
            f"{', '.join(unknown)} is none of {', '.join(sorted(known | fields))}"
            if unknown
            else f"names {names!r} is not one of {', '.join(DIALECTS)}"
        )
    split = PipelineSplit(**{name: sizes[name] for name in fields if name in sizes})
    if sizes.get("vpp", 1) != 1:
        split = dataclasses.replace(split, virtual=sizes["vpp"])
    parallel = parallel_for(
        spec, sizes.get("tp", 1), sizes.get("pp", 1), split, sizes.get("ep", 1), sizes.get("etp"), directories=False
    )
    processes = sizes.get("world", parallel.pp * stage_size(parallel))
    engine = names != Naming.impl
    naming = Naming(names, "grouped" if engine and spec.num_experts else Naming.expert_layout)
    padded = padded_vocab(spec.vocab_size, sizes.get(_DIVISOR, least_divisor(spec.vocab_size)), parallel.tp)
    return LiveLayout(spec, parallel, grid(parallel, processes), padded, naming)


def least_divisor(vocab: int) -> int:
    """Multiple that a live model's vocabulary is padded to: the greatest power of 2 up to 128 that divides it, so that none is."""
    return math.gcd(vocab, _MOST_PADDING)

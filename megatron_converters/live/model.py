"""Live model as all its processes know it: how it is cut, which parameters each process has, and in which dtype."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..basics.dtypes import DType
from ..basics.errors import ConversionError, raise_all
from ..formats.megatron.names import EMBEDDINGS
from ..model.spec import ModelSpec
from ..sharding.ranks import Parallel, Rank
from .exchange import Exchange, Wanted, gathered
from .heartbeat import Heartbeat
from .layout import Holding, Key, LiveLayout, Naming
from .parameters import Parameters, common_naming, dtype_of, mismatches, naming_of, parameters_of, unwrapped


class _Summary(NamedTuple):
    """What a process tells the others of its part of the model."""

    rank: Rank
    #: Number of layers of each of its models.
    layers: tuple[int, ...]
    #: Rows of its share of the embedding; 0 where it has none.
    embedding_rows: int
    naming: Naming
    #: Dtype of most of its parameters, and of those that have another one.
    usual: torch.dtype
    others: dict[Key, torch.dtype]


@contextmanager
def live_model(model: Any, spec: ModelSpec) -> Iterator[LiveModel]:
    """Context in which all processes of a model move its weights together; one that is lost is named to the others.

    Raises `ConversionError` with every parameter of any process that is not the model's.
    """
    with process_heartbeat() as heartbeat:
        yield LiveModel(model, spec, heartbeat)


def process_heartbeat() -> AbstractContextManager[Heartbeat | None]:
    """Heartbeat of all processes; None for one alone."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return nullcontext()
    return Heartbeat(dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size())


class LiveModel:
    """Part of a model that this process has, and what it knows of the others' parts."""

    def __init__(self, model: Any, spec: ModelSpec, heartbeat: Heartbeat | None) -> None:
        """Use `live_model`. Raises `ConversionError` with every parameter that is not the model's."""
        self.heartbeat = heartbeat
        self.models = unwrapped(model)
        self.parameters = parameters_of(self.models)
        if not self.parameters:
            raise ConversionError("the model has no parameters; give what the provider returned, a list of models")
        self._summaries: list[_Summary] = gathered(_summary(self.models, self.parameters), heartbeat)
        self.process = dist.get_rank() if len(self._summaries) > 1 else 0
        self.layout = _layout(spec, self._summaries)
        own = [text for _, text in mismatches(self.parameters, self.layout, self.process)]
        own += _tying(self.models, spec, self.process)
        raise_all(
            f"the model does not match the {spec.family} model of the bridge:",
            dict.fromkeys(text for found in gathered(own, heartbeat) for text in found),
        )

    @property
    def processes(self) -> int:
        """Number of processes."""
        return len(self._summaries)

    def wanted(self, holding: Holding, taker: int | None = None) -> Wanted:
        """Parameter of a holding, of the taker itself if that is one of the holders, else of the first of these."""
        return self.wanted_of(holding.holders, holding.key, holding.cut.shape, taker)

    def wanted_of(self, holders: Sequence[int], key: Key, shape: tuple[int, ...], taker: int | None) -> Wanted:
        """Parameter that these processes have, chosen as `wanted` does."""
        owner = taker if taker is not None and taker in holders else holders[0]
        summary = self._summaries[owner]
        return Wanted(owner, key, shape, summary.others.get(key, summary.usual))

    def dtype(self, holding: Holding) -> DType:
        """Dtype of a holding."""
        return dtype_of(self.wanted(holding).dtype)

    def stage(self, process: int) -> int:
        """Pipeline stage of a process."""
        return self._summaries[process].rank.pp

    def exchange(self) -> Exchange:
        """Transfers of this model's parameters."""
        return Exchange(self.parameters, self.process, self.heartbeat)


def _tying(models: Sequence[torch.nn.Module], spec: ModelSpec, process: int) -> list[str]:
    """Text for a model that ties embedding and head otherwise than the spec: with several stages it has the same parameters."""
    tied = {getattr(model, "share_embeddings_and_output_weights", spec.tied) for model in models}
    if tied == {spec.tied}:
        return []
    words = {True: "share_embeddings_and_output_weights=True", False: "share_embeddings_and_output_weights=False"}
    return [f"rank {process}: the model was built with {words[not spec.tied]}, not {words[spec.tied]}"]


def _summary(models: Sequence[torch.nn.Module], parameters: Parameters) -> _Summary:
    from .process_group import own_rank  # imports megatron-core, which those who only read shard maps need not have

    dtypes = Counter(tensor.dtype for tensor in parameters.values())
    usual = dtypes.most_common(1)[0][0]
    embedding = parameters.get(Key(0, EMBEDDINGS))
    return _Summary(
        own_rank(),
        tuple(len(getattr(getattr(model, "decoder", None), "layers", ())) for model in models),
        0 if embedding is None else embedding.shape[0],
        naming_of(parameters),
        usual,
        {key: tensor.dtype for key, tensor in parameters.items() if tensor.dtype != usual},
    )


def _layout(spec: ModelSpec, summaries: Sequence[_Summary]) -> LiveLayout:
    """Layout of a model whose processes have told this."""
    ranks = [summary.rank for summary in summaries]
    tp, pp, ep, etp = (1 + max(numbers) for numbers in zip(*ranks, strict=True))
    vpp = len(summaries[0].layers)
    by_stage = {summary.rank.pp: summary.layers for summary in summaries}
    stages = tuple(by_stage[stage][number] for number in range(vpp) for stage in range(pp))
    if sum(stages) != spec.num_layers:
        raise ConversionError(
            f"the model has {sum(stages)} layers ({'+'.join(map(str, stages))}), but the bridge's has {spec.num_layers}; give the "
            "bridge that it was built by, or the configuration of this model"
        )
    parallel = (
        Parallel(tp, stages, ep=ep, etp=etp, vpp=vpp) if spec.num_experts else Parallel(tp, stages, etp=tp, vpp=vpp)
    )
    padded = tp * max(summary.embedding_rows for summary in summaries if summary.rank.pp == 0)
    naming = common_naming([summary.naming for summary in summaries])
    return LiveLayout(spec, parallel, ranks, padded, naming)

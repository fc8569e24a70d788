"""Inventory of a folder that a conversion would write, from its plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..assets.origin import Origin
from ..conversion.dry_run import Forecast
from ..conversion.endpoint import Target
from ..conversion.outline import Fill
from ..formats.megatron.writing import CheckpointTarget
from ..model.slots import SLOTS, Ref, refs
from ..model.spec import ModelSpec
from .inventory import Holding, Survey

_EMBEDDINGS, _OUTPUT = SLOTS["word_embeddings"], "output_layer"


def planned(kind: str, spec: ModelSpec, target: Target, result: Forecast) -> Survey:
    """Inventory of a target of format `kind` whose forecast was made; nothing is there yet."""
    origin = Origin(str(target.output))
    if isinstance(target, CheckpointTarget):
        origin.parallel, origin.checkpoint_format = target.parallel, target.format
    files = {file: plan.nbytes for file, plan in result.files.items()}
    holdings = tuple(holding for ref in refs(spec) for holding in _holdings(ref, _stored(target.fills(ref))))
    return Survey(kind, spec, origin, files, holdings)


def _stored(fills: Iterable[Fill]) -> list[Fill]:
    """Fills that a file has a place for."""
    return [fill for fill in fills if fill.constant is None]


def _holdings(ref: Ref, fills: list[Fill]) -> Iterator[Holding]:
    """Holdings of a ref. Those after the first that begin at the same element are copies, since fills are equal or disjoint."""
    seen: set[tuple[int, int, int]] = set()
    for fill in fills:
        begin = int(fill.rows[0]), fill.col, fill.padding
        is_copy = begin in seen
        seen.add(begin)
        slot = _OUTPUT if is_copy and ref.slot is _EMBEDDINGS and fill.name != fills[0].name else ref.slot.name
        yield Holding(fill.file, fill.name, ref, slot, fill.dtype, fill.shape, fill.padding, is_copy)

"""Filling of a live model's parameters from any source: each process copies its own shares, without a collective operation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from ..basics.errors import raise_all
from ..conversion.copying import Executor
from ..conversion.endpoint import Source
from ..conversion.outline import Fill
from ..formats.megatron.rank_files_target import resolve_padding
from ..model.slots import Ref, refs
from ..storage.tensor import release_mappings
from .layout import Key, LiveLayout
from .parameters import Parameters, ParameterSink, dtype_of, mismatches, shown


def fill(
    parameters: Parameters,
    source: Source,
    layout: LiveLayout,
    process: int,
    *,
    allowed: Collection[str] = (),
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write the shares of this process, number `process` of the layout, of every tensor of the source.

    Besides the parameters this takes one chunk of memory in each lane. Parameters whose names are in `allowed` may be missing, or
    of another shape, and are then left as they are. Raises `ConversionError` with every parameter that is not the model's.
    """
    found = list(mismatches(parameters, layout, process))
    left_out = {key for key, _ in found if key.parameter in allowed}
    raise_all("the model does not match the one to be loaded:", (text for key, text in found if key not in left_out))
    sink = ParameterSink({shown(key): tensor for key, tensor in parameters.items() if key not in left_out})
    executor: Executor[ParameterSink] = Executor(progress)
    try:
        for ref in refs(source.spec):
            fills = [each for each in _fills(ref, parameters, layout, process) if each[0] not in left_out]
            if not fills and process:
                continue  # other processes check what only they hold, the first one everything
            sources = source.read(ref)
            executor.check(ref, source.spec, sources, replicas=process == 0)
            for _, each in fills:
                executor.fill(sink, each, executor.plan(each, sources.pieces))
        executor.finish()
        source.close()
    except BaseException:
        executor.cancel()
        raise
    finally:
        release_mappings()
    raise_all("the model would not be complete; this is a fault of this program, please report it:", sink.faults())


def _fills(ref: Ref, parameters: Parameters, layout: LiveLayout, process: int) -> Iterator[tuple[Key, Fill]]:
    """Fills of this process's parameters with a ref."""
    for place in layout.holdings(ref):
        for holding in place:
            if process in holding.holders and holding.key in parameters:
                cut = holding.cut
                dtype = dtype_of(parameters[holding.key].dtype)
                rows = resolve_padding(cut, layout.spec.vocab_size)
                found = Fill("the model", shown(holding.key), dtype, cut.shape, rows, cut.col, padding=cut.padding)
                yield holding.key, layout.fill(ref, found)

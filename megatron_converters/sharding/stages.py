"""Distribution of layers over pipeline stages, including virtual ones.

Sources: Megatron-LM core_v0.16.1, `get_num_layers_to_build` (core/transformer/transformer_block.py),
`TransformerConfig.__post_init__`, core/transformer/pipeline_parallel_layer_layout.py, `validate_args` (training/arguments.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..basics.errors import ConversionError


@dataclass(frozen=True)
class PipelineSplit:
    """Megatron-LM's options for uneven and virtual stages; all unset means equal stages, one on each rank.

    `virtual` counts the stages of each rank, `per_virtual` the layers of each such stage (embedding and loss included where
    they count as layers); `layout` spells everything out, such as "Et*3|(tt|)*6,L".
    """

    first: int | None = None
    last: int | None = None
    embedding: bool = False
    loss: bool = False
    virtual: int | None = None
    per_virtual: int | None = None
    layout: str | None = None


#: Equal stages.
EVEN = PipelineSplit()


def stage_layers(num_layers: int, pp: int, split: PipelineSplit) -> tuple[int, ...]:
    """Layers of each stage in the model's order, as Megatron-LM distributes them; stage number i is on rank i % pp."""
    if split.layout is not None:
        return _layout_stages(num_layers, pp, split)
    explicit = split.first is not None or split.last is not None
    ranks = _explicit_ranks(num_layers, pp, split) if explicit else _even_ranks(num_layers, pp, split)
    vpp = _virtual_stages(ranks, split)
    if vpp < 1 or (vpp > 1 and pp == 1) or any(count % vpp for count in ranks):
        raise ConversionError(
            f"pipeline ranks of {', '.join(map(str, ranks))} layers cannot hold {vpp} virtual stages each; "
            "the number must divide all of these and needs a pipeline-parallel size above 1"
        )
    stages = [count // vpp for _ in range(vpp) for count in ranks]
    stages[0] -= split.embedding
    stages[-1] -= split.loss
    if min(stages) < 0:
        raise ConversionError(_uneven(num_layers, pp, sum(ranks), suggest=split == EVEN))
    return tuple(stages)


def _virtual_stages(ranks: list[int], split: PipelineSplit) -> int:
    """Number of stages on each rank; 0 if the given layers of a stage do not divide those of a rank."""
    if split.per_virtual is None:
        return 1 if split.virtual is None else split.virtual
    if split.virtual is not None or split.first is not None or split.last is not None:
        raise ConversionError(
            "the number of layers of each virtual stage cannot be given together with the number of virtual stages or with the "
            "layers of the first or last stage; give only the number of virtual stages"
        )
    return 0 if ranks[0] % split.per_virtual else ranks[0] // split.per_virtual


def _even_ranks(num_layers: int, pp: int, split: PipelineSplit) -> list[int]:
    total = num_layers + split.embedding + split.loss
    if total % pp:
        raise ConversionError(_uneven(num_layers, pp, total, suggest=split == EVEN))
    return [total // pp] * pp


def _explicit_ranks(num_layers: int, pp: int, split: PipelineSplit) -> list[int]:
    if split.embedding or split.loss:
        raise ConversionError(
            "the layers of the first or last stage cannot be given together with account-for-embedding/loss; give one or the other"
        )
    ends = [count for count in (split.first, split.last) if count is not None]
    middle_stages, middle_layers = pp - len(ends), num_layers - sum(ends)
    even = (
        middle_layers % middle_stages == 0 < middle_layers if middle_stages > 0 else middle_stages == 0 == middle_layers
    )
    if pp < 2 or min(ends) < 1 or not even:
        raise ConversionError(
            f"{num_layers} layers cannot be cut into {pp} pipeline stages with first={split.first} and last={split.last}: "
            f"the {middle_stages} stages between must share {middle_layers} layers evenly, at least one each"
        )
    if middle_stages == 0 and (split.virtual or 1) > 1:  # `get_transformer_layer_offset` divides by the stages between
        raise ConversionError(
            "Megatron-LM has no virtual stages if the layers of all ranks are given; use --pipeline-model-parallel-layout"
        )
    middle = [middle_layers // middle_stages] * middle_stages if middle_stages else []
    head = [] if split.first is None else [split.first]
    tail = [] if split.last is None else [split.last]
    return head + middle + tail


def _uneven(num_layers: int, pp: int, total: int, suggest: bool) -> str:
    fitting = [size for size in range(1, num_layers + 1) if total % size == 0]
    last = num_layers - (pp - 1) * -(-num_layers // pp)
    remedy = f" or --decoder-last-pipeline-num-layers {last}" if suggest and pp > 1 and last > 0 else ""
    return f"{num_layers} layers cannot be cut evenly over pp={pp}; use pp {alternatives(fitting)}{remedy}"


def alternatives(sizes: list[int]) -> str:
    """Sizes as text, such as "1, 2 or 4"."""
    return " or ".join(filter(None, [", ".join(map(str, sizes[:-1])), str(sizes[-1])]))


#: `(x|y)*3` and `t*3`, as `PipelineParallelLayerLayout.parse_str_to_list` unrolls them, in this order.
_REPEATS = (re.compile(r"\(([^)]+)\)\*(\d+)"), re.compile(r"(.)\*(\d+)"))
_EMBEDDING, _LOSS, _LAYER = "ELt"
#: Most entries of a layout, far above any model's, since its repeats are unrolled.
_MAX_UNROLLED = 100_000


def layout_entries(layout: str) -> list[str]:
    """Entries of each stage of a `--pipeline-model-parallel-layout`, one letter each: E, t, L."""
    text = layout.replace(",", "")
    for pattern in _REPEATS:
        if sum(len(match[1]) * int(match[2]) for match in pattern.finditer(text)) > _MAX_UNROLLED:
            raise ConversionError(f"the pipeline layout {layout!r} has more than {_MAX_UNROLLED} entries")
        text = pattern.sub(lambda match: match[1] * int(match[2]), text)
    return text.split("|")


def stages_per_rank(pp: int, split: PipelineSplit) -> int:
    """Virtual stages of each of `pp` ranks, as far as they are known without the number of layers."""
    if split.layout is None:
        return split.virtual or 1
    stages = len(layout_entries(split.layout))
    if stages % pp:
        raise ConversionError(
            f"the pipeline layout {split.layout!r} has {stages} stages, which pp={pp} does not divide"
        )
    return stages // pp


def _layout_stages(num_layers: int, pp: int, split: PipelineSplit) -> tuple[int, ...]:
    if PipelineSplit(layout=split.layout, virtual=split.virtual) != split:
        raise ConversionError(
            "a pipeline layout cannot be combined with any other option about pipeline stages; give it alone"
        )
    stages = layout_entries(split.layout or "")
    faults = list(_layout_faults(stages, num_layers, pp))
    if split.virtual is not None and len(stages) != pp * split.virtual:
        faults.append(f"it has {len(stages)} stages, not {pp} x {split.virtual}")
    if faults:
        raise ConversionError(f"the pipeline layout {split.layout!r} does not fit: {'; '.join(faults)}")
    return tuple(stage.count(_LAYER) for stage in stages)


def _layout_faults(stages: list[str], num_layers: int, pp: int) -> list[str]:
    entries = "".join(stages)
    faults = []
    if "m" in entries:
        faults.append("it places multi-token prediction layers, which are not supported")
    if unknown := sorted(set(entries) - {_EMBEDDING, _LOSS, _LAYER, "m"}):
        faults.append(f"it has {', '.join(map(repr, unknown))}; known are E (embedding), t (layer) and L (loss)")
    if pp == 1 and len(stages) > 1:
        faults.append("several stages on each rank need a pipeline-parallel size above 1")
    if len(stages) % pp:
        faults.append(f"it has {len(stages)} stages, which pp={pp} does not divide")
    if entries.count(_LAYER) != num_layers:
        faults.append(f"it has {entries.count(_LAYER)} layers, the model {num_layers}")
    if entries.count(_EMBEDDING) != 1 or not stages[0].startswith(_EMBEDDING):
        faults.append("the embedding must come once, as the first entry of the first stage")
    if entries.count(_LOSS) != 1 or not stages[-1].endswith(_LOSS):
        faults.append("the loss must come once, as the last entry of the last stage")
    return faults

"""Pipeline stages, virtual ones and layouts included, against megatron-core's own functions and cases written out by hand."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from typing import Any

import pytest

from megatron_converters.basics.errors import ConversionError
from megatron_converters.sharding.ranks import Parallel
from megatron_converters.sharding.stages import PipelineSplit, stage_layers, stages_per_rank

#: Run apart, so that no other test finds megatron imported. Reads cases and writes, for each, the global numbers of the layers
#: that megatron-core builds on each rank for each virtual stage, or null where it refuses.
_MEGATRON = """
import json, sys
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

def built(layers, pp, split):
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=pp,
        pipeline_dtype="float32",
        virtual_pipeline_model_parallel_size=split["virtual"],
        pipeline_model_parallel_layout=split["layout"],
        num_layers_in_first_pipeline_stage=split["first"],
        num_layers_in_last_pipeline_stage=split["last"],
        account_for_embedding_in_pipeline_split=split["embedding"],
        account_for_loss_in_pipeline_split=split["loss"],
    )
    vpp = config.virtual_pipeline_model_parallel_size
    parallel_state.set_virtual_pipeline_model_parallel_world_size(vpp)
    found = []
    for rank in range(pp):
        parallel_state.set_pipeline_model_parallel_rank(rank)  # what a layout asks for
        found.append([])
        for stage in range(vpp or 1):
            number = None if vpp is None else stage
            first = get_transformer_layer_offset(config, number, rank)
            found[-1].append(list(range(first, first + get_num_layers_to_build(config, number, rank))))
    return found

def attempt(*case):
    try:
        return built(*case)
    except (AssertionError, ValueError, ZeroDivisionError):  # the last: virtual stages with both ends said and none between
        return None

json.dump([attempt(*case) for case in json.load(sys.stdin)], sys.stdout)
"""


def megatron_layers(cases: list[tuple[int, int, PipelineSplit]]) -> list[list[list[list[int]]] | None]:
    """What megatron-core builds; None where it refuses, or would silently build other layers than all of them once."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _MEGATRON],
        input=json.dumps([(layers, pp, vars(split)) for layers, pp, split in cases]),
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[list[list[list[int]]] | None] = json.loads(run.stdout)
    return [
        ranks if ranks is not None and _all_once(ranks, layers) else None
        for ranks, (layers, _, _) in zip(found, cases, strict=True)
    ]


def _all_once(ranks: list[list[list[int]]], layers: int) -> bool:
    return sorted(layer for rank in ranks for stage in rank for layer in stage) == list(range(layers))


def our_layers(layers: int, pp: int, split: PipelineSplit) -> list[list[list[int]]] | None:
    """The same by our rules, layer by layer."""
    try:
        stages = stage_layers(layers, pp, split)
    except ConversionError:
        return None
    vpp = len(stages) // pp
    parallel = Parallel(1, stages, vpp=vpp)
    found: list[list[list[int]]] = [[[] for _ in range(vpp)] for _ in range(pp)]
    for layer in range(layers):
        stage, local = parallel.place(layer)
        (rank,) = parallel.ranks(stage)
        assert len(found[rank.pp][stage // pp]) == local
        found[rank.pp][stage // pp].append(layer)
    return found


def random_case(random_: random.Random) -> tuple[int, int, PipelineSplit]:
    pp, vpp = random_.randint(1, 6), random_.randint(1, 4)
    layers = random_.choice([random_.randint(1, 30), pp * vpp * random_.randint(1, 3)])
    kind = random_.choice(["even", "flags", "ends", "both", "layout", "layout"])
    if kind == "layout":
        return layers, pp, PipelineSplit(layout=random_layout(random_, layers, pp * vpp))
    ends = [random_.choice([None, random_.randint(1, layers), vpp * random_.randint(1, 3)]) for _ in range(2)]
    flags = [random_.random() < 0.5 for _ in range(2)]
    said = random_.choice([None, vpp, vpp]) if vpp > 1 else None  # Megatron-LM turns 1 into None
    return (
        layers - (sum(flags) if kind == "flags" and random_.random() < 0.7 and layers > 2 else 0),
        pp,
        PipelineSplit(
            *(ends if kind in ("ends", "both") else (None, None)),
            *(flags if kind in ("flags", "both") else (False, False)),
            virtual=said,
        ),
    )


def random_layout(random_: random.Random, layers: int, stages: int) -> str:
    """A layout of all layers, at times one too few or many, spelled in one of its ways."""
    cuts = sorted(random_.randint(0, layers) for _ in range(stages - 1))
    counts = [right - left for left, right in zip([0, *cuts], [*cuts, layers], strict=True)]
    if random_.random() < 0.1:
        counts[random_.randrange(stages)] += 1
    spelled = [f"t*{count}" if count > 1 and random_.random() < 0.5 else "t" * count for count in counts]
    spelled[0] = "E" + random_.choice(["", ","]) + spelled[0]
    spelled[-1] += "L" if random_.random() < 0.95 else ""
    if stages > 2 and len(set(counts[1:-1])) == 1 and "*" not in "".join(spelled[1:-1]):
        return f"{spelled[0]}|({spelled[1]}|)*{stages - 2}{spelled[-1]}"
    return "|".join(spelled)


@pytest.mark.slow
def test_layers_are_where_megatron_core_builds_them() -> None:
    random_ = random.Random(0)
    cases = [random_case(random_) for _ in range(3000)]
    accepted = {"virtual": 0, "layout": 0, "plain": 0}
    for (layers, pp, split), expected in zip(cases, megatron_layers(cases), strict=True):
        ours = our_layers(layers, pp, split)
        if ours is None:  # with one rank megatron-core does not look at what is said about ends and virtual stages
            assert expected is None or pp == 1, (layers, pp, split, expected)
            continue
        assert ours == expected, (layers, pp, split)
        accepted["layout" if split.layout else "virtual" if (split.virtual or 1) > 1 else "plain"] += 1
    assert min(accepted.values()) > 200, accepted


@pytest.mark.parametrize(
    ("layers", "pp", "split", "stages"),
    [
        (8, 4, PipelineSplit(), (2, 2, 2, 2)),
        (7, 2, PipelineSplit(first=3), (3, 4)),
        (7, 2, PipelineSplit(last=2), (5, 2)),
        (10, 4, PipelineSplit(first=1, last=3), (1, 3, 3, 3)),
        (3, 2, PipelineSplit(first=1, last=2), (1, 2)),
        (6, 4, PipelineSplit(embedding=True, loss=True), (1, 2, 2, 1)),
        (7, 4, PipelineSplit(embedding=True), (1, 2, 2, 2)),
        (7, 4, PipelineSplit(loss=True), (2, 2, 2, 1)),
        (1, 3, PipelineSplit(embedding=True, loss=True), (0, 1, 0)),
        (5, 1, PipelineSplit(embedding=True, loss=True), (5,)),
    ],
)
def test_stages(layers: int, pp: int, split: PipelineSplit, stages: tuple[int, ...]) -> None:
    assert stage_layers(layers, pp, split) == stages


@pytest.mark.parametrize(
    ("layers", "pp", "split", "message"),
    [
        (7, 2, PipelineSplit(), r"7 layers cannot be cut evenly over pp=2; use pp 1 or 7 or .*last.*-layers 3"),
        (4, 8, PipelineSplit(), r"use pp 1, 2 or 4$"),
        (6, 2, PipelineSplit(first=7), "cannot be cut into 2 pipeline stages"),
        (6, 2, PipelineSplit(first=2, last=3), "the 0 stages between must share 1 layers"),
        (6, 1, PipelineSplit(first=6), "cannot be cut into 1 pipeline stages"),
        (6, 2, PipelineSplit(first=0), "cannot be cut"),
        (6, 4, PipelineSplit(first=1, last=2), "the 2 stages between must share 3 layers"),
        (6, 2, PipelineSplit(first=3, loss=True), "give one or the other"),
    ],
)
def test_stages_that_cannot_be(layers: int, pp: int, split: PipelineSplit, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        stage_layers(layers, pp, split)


@pytest.mark.parametrize(
    ("layers", "pp", "split", "stages"),
    [
        (8, 2, PipelineSplit(virtual=2), (2, 2, 2, 2)),
        (8, 2, PipelineSplit(per_virtual=1), (1,) * 8),
        (6, 2, PipelineSplit(embedding=True, loss=True, per_virtual=2), (1, 2, 2, 1)),
        (10, 3, PipelineSplit(first=2, last=4, virtual=2), (1, 2, 2, 1, 2, 2)),
        (7, 2, PipelineSplit(layout="Et|tt|t*3,|tL"), (1, 2, 3, 1)),
        (9, 3, PipelineSplit(layout="E|(tt|)*4tL"), (0, 2, 2, 2, 2, 1)),
        (9, 3, PipelineSplit(first=3, last=1), (3, 5, 1)),
        (5, 1, PipelineSplit(layout="Et*5L"), (5,)),
    ],
)
def test_virtual_stages(layers: int, pp: int, split: PipelineSplit, stages: tuple[int, ...]) -> None:
    assert stage_layers(layers, pp, split) == stages


@pytest.mark.parametrize(
    ("layers", "pp", "split", "message"),
    [
        (8, 2, PipelineSplit(virtual=3), "ranks of 4, 4 layers cannot hold 3 virtual stages each"),
        (8, 1, PipelineSplit(virtual=2), "needs a pipeline-parallel size above 1"),
        (8, 2, PipelineSplit(per_virtual=3), "cannot hold 0 virtual stages"),
        (8, 2, PipelineSplit(per_virtual=1, virtual=4), "give only the number of virtual stages"),
        (8, 2, PipelineSplit(first=2, per_virtual=1), "give only the number of virtual stages"),
        (9, 3, PipelineSplit(first=3, virtual=2), "ranks of 3, 3, 3 layers cannot hold 2"),
        (4, 2, PipelineSplit(layout="Ett|ttL", first=2), "a pipeline layout cannot be combined with any other option"),
        (4, 2, PipelineSplit(layout="Ett|tL"), "it has 3 layers, the model 4"),
        (
            4,
            2,
            PipelineSplit(layout="Ett|ttL|"),
            "it has 3 stages, which pp=2 does not divide; .*the loss must come once",
        ),
        (4, 2, PipelineSplit(layout="ttE|ttL"), "the embedding must come once, as the first entry of the first stage"),
        (4, 2, PipelineSplit(layout="|Ett|tt|L"), "the embedding must come once"),
        (4, 2, PipelineSplit(layout="Ett|ttmL"), "multi-token prediction"),
        (4, 2, PipelineSplit(layout="Ett xttL"), "it has ' ', 'x'; known are E"),
        (4, 1, PipelineSplit(layout="Ett|ttL"), "a pipeline-parallel size above 1"),
        (4, 2, PipelineSplit(layout="Ett|ttL", virtual=2), "it has 2 stages, not 2 x 2"),
        (4, 2, PipelineSplit(layout="Et*99999999999|tL"), "more than 100000 entries"),
        (4, 2, PipelineSplit(layout="E(t*9)*9999|(tt|)*99999L"), "more than 100000 entries"),
    ],
)
def test_virtual_stages_that_cannot_be(layers: int, pp: int, split: PipelineSplit, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        stage_layers(layers, pp, split)


@pytest.mark.parametrize(
    ("pp", "split", "expected"),
    [
        (2, PipelineSplit(), 1),
        (2, PipelineSplit(virtual=3), 3),
        (2, PipelineSplit(layout="E|t|t|L"), 2),
        (3, PipelineSplit(layout="E|t|t|L"), "has 4 stages, which pp=3 does not divide"),
    ],
)
def test_stages_of_a_rank(pp: int, split: PipelineSplit, expected: Any) -> None:
    if isinstance(expected, int):
        assert stages_per_rank(pp, split) == expected
        return
    with pytest.raises(ConversionError, match=expected):
        stages_per_rank(pp, split)

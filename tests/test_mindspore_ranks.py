"""MindSpore's folders of ranks: slices land where hand-written cuts say, and a wrong or missing strategy is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_converters.basics.errors import ConversionError
from megatron_converters.formats.mindspore.files import read_weight_files

from .mindspore_bytes import ckpt, content, layout, number, ranks, refused, same, save, strategy

W = np.arange(16 * 6, dtype="float32").reshape(16, 6)
B = np.arange(6, dtype="float32")


def given(folder: Path, data: bytes, name: str = "ckpt_strategy.ckpt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    return folder


_WHOLE = slice(None)


def rows(*starts: int, count: int = 4) -> list[tuple[slice, slice]]:
    """Rows of W that each rank holds, by their start."""
    return [(slice(start, start + count), _WHOLE) for start in starts]


def quarters(*corners: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Quarter of W that each rank holds, by its corner."""
    return [(slice(row, row + 8), slice(column, column + 3)) for row, column in corners]


#: Device matrix, tensor map, step and size of the optimizer's shard; then the rows and columns of W on each rank.
_CUTS: dict[str, tuple[list[int], list[Any], int, int, list[tuple[slice, slice]]]] = {
    "rows": ([4], [0, -1], 0, 0, rows(0, 4, 8, 12)),
    "columns, replicated": ([2, 2], [-1, 0], 0, 0, [(_WHOLE, slice(at, at + 3)) for at in (0, 3, 0, 3)]),
    "both": ([2, 2], [1, 0], 0, 0, quarters((0, 0), (0, 3), (8, 0), (8, 3))),
    "turned": ([2, 2], [0, 1], 0, 0, quarters((0, 0), (8, 0), (0, 3), (8, 3))),
    "nested, turned": ([2, 2], [[0, 1], [-1]], 0, 0, rows(0, 8, 4, 12)),
    "nested, in order": ([2, 2], [[1, 0], [-1]], 0, 0, rows(0, 4, 8, 12)),
    # Data parallel 2 (major), tensor parallel 2: ranks 0 and 2 share the first half, 1 and 3 the second.
    "optimizer shard": ([2, 2], [0, -1], 2, 2, rows(0, 8, 4, 12)),
    "optimizer shard of all": ([4], [-1, -1], 1, -1, rows(0, 4, 8, 12)),
    # Data parallel 4, tensor parallel 2, shards of 2: ranks {0, 2}, {4, 6}, {1, 3}, {5, 7}.
    "optimizer shard of some": ([4, 2], [0, -1], 2, 2, rows(0, 8, 4, 12, 0, 8, 4, 12)),
    # Tensor parallel is major, so that neighbours share a slice.
    "optimizer shard of neighbours": ([2, 2], [1, -1], 1, 2, rows(0, 4, 8, 12)),
    # Neighbours share a slice again, but 2 of the 4 repeats are of the other dimension.
    "optimizer shard of two dimensions": ([2, 2, 2], [1, -1], 1, -1, rows(0, 2, 8, 10, 4, 6, 12, 14, count=2)),
}


@pytest.mark.parametrize("case", _CUTS)
@pytest.mark.parametrize("kind", ["protobuf", "json", "given"])
def test_slices_are_joined(tmp_path: Path, case: str, kind: str) -> None:
    devices, tensor_map, step, size, places = _CUTS[case]
    folder = ranks(tmp_path / "checkpoint", [{"w": W[place], "b": B, "adam_m.w": W[place]} for place in places])
    encoded = strategy({"w": layout(devices, tensor_map, step, size), "adam_m.w": layout(devices, tensor_map)})
    where = None
    if kind == "protobuf":
        given(tmp_path / "strategy", encoded, "ckpt_strategy_rank_0.ckpt")
        given(tmp_path / "strategy", encoded, "ckpt_strategy_rank_1.ckpt")
    elif kind == "given":
        where = given(tmp_path / "elsewhere", encoded) / "ckpt_strategy.ckpt"
    else:
        item = dict(
            dev_matrix=devices, tensor_map=tensor_map, field=0, opt_weight_shard_step=step, opt_weight_shard_size=size
        )
        given(
            folder, json.dumps({"current_stage": 1, "parallel_layout_item": {"w": item}}).encode(), "ckpt_strategy.json"
        )
    found = read_weight_files(folder, where)
    same(found, {"w": W, "b": B})
    assert (found.form, found.dropped, len(found.tensors["b"].copies)) == ("ranks", {"optimizer": 1}, len(places) - 1)


def test_removed_redundancy(tmp_path: Path) -> None:
    given(tmp_path, strategy({"w": layout([2, 2], [0, -1]), "b": layout([2, 2], [-1])}))
    ranks(tmp_path, [{"w": W[:8]}, {"b": B}, {"x": B}, {"w": W[8:]}])
    found = read_weight_files(tmp_path)
    same(found, {"w": W, "b": B, "x": B})
    assert not found.tensors["w"].copies
    save(tmp_path / "rank_3" / "net_rank_3-1_10.safetensors", {"x": B})
    refused(tmp_path, "w: 1 of 2 slices were found")


def test_single_axis_that_two_dimensions_cut(tmp_path: Path) -> None:
    given(tmp_path, strategy({"b": layout([2, 3], [[0, 1]])}))
    same(read_weight_files(ranks(tmp_path, [{"b": B[at : at + 1]} for at in (0, 2, 4, 1, 3, 5)])), {"b": B})


def test_ckpt_files_of_ranks(tmp_path: Path) -> None:
    given(tmp_path, strategy({"w": layout([2], [-1, 0])}))
    for rank in range(2):
        given(tmp_path / f"rank_{rank}", ckpt({"w": W[:, 3 * rank : 3 * rank + 3].copy()}), f"net_rank_{rank}-2_5.ckpt")
    same(read_weight_files(tmp_path), {"w": W})


@pytest.mark.parametrize("merged", [False, True])
def test_pipeline_stages(tmp_path: Path, merged: bool) -> None:
    ranks(tmp_path, [{"e": W[:8], "a": B}, {"e": W[8:], "a": B}, {"e": W, "z": W[:, :3]}, {"e": W, "z": W[:, 3:]}])
    first = {"e": layout([2], [0, -1]), "a": layout([2], [-1])}
    second = {"e": layout([2], [-1, -1]), "z": layout([2], [-1, 0])}
    if merged:
        named = {f"0-{name}": item for name, item in first.items()} | {
            f"1-{name}": item for name, item in second.items()
        }
        given(tmp_path, strategy(named), "merged_ckpt_strategy.ckpt")
    else:
        given(tmp_path, strategy(first), "ckpt_strategy_rank_0.ckpt")
        refused(tmp_path, "rank 2 is of pipeline stage 1, of which no strategy file was found")
        given(tmp_path, strategy(second, stage=1), "ckpt_strategy_rank_2.ckpt")
    found = read_weight_files(tmp_path)
    same(found, {"e": W, "a": B, "z": W})
    assert [data.shape for data, _ in found.tensors["e"].copies] == [(16, 6), (16, 6)]
    for rank in (2, 3):
        (tmp_path / f"rank_{rank}" / f"net_rank_{rank}-1_10.safetensors").unlink()
    refused(tmp_path, "no rank of pipeline stage 1")


def test_last_step_of_all_ranks(tmp_path: Path) -> None:
    given(tmp_path, strategy({"w": layout([2], [0, -1])}))
    for rank in range(2):
        for step in ("1_9", "1_10", "2_1") if rank else ("1_9", "1_10"):
            value = W if step == "1_10" else W + 1
            save(
                tmp_path / f"rank_{rank}" / f"net_rank_{rank}-{step}.safetensors", {"w": value[8 * rank : 8 * rank + 8]}
            )
    found = read_weight_files(tmp_path)
    same(found, {"w": W})
    assert "1_10" in found.notes[0]


def test_single_rank_needs_no_strategy(tmp_path: Path) -> None:
    same(read_weight_files(ranks(tmp_path, [{"w": W}])), {"w": W})
    refused(ranks(tmp_path, [{"w": W}, {"w": W}]), "2 ranks without a strategy", "unified_safetensors")


def test_one_of_several_ranks_is_refused(tmp_path: Path) -> None:
    folder = ranks(tmp_path / "checkpoint", [{"w": W[:8]}]) / "rank_0"
    for path in (folder, *folder.iterdir()):
        same(read_weight_files(path), {"w": W[:8]})
    given(tmp_path / "strategy", strategy({"w": layout([2], [0, -1])}))
    refused(folder, "one of several ranks", f"the folder of all, {tmp_path / 'checkpoint'}")
    refused(tmp_path / "checkpoint", "w: 1 of 2 slices")
    (tmp_path / "strategy" / "ckpt_strategy.ckpt").unlink()
    ranks(tmp_path / "checkpoint", [{"w": W[:8]}, {"w": W[8:]}])
    for path in (folder, *folder.iterdir()):
        refused(path, "one of several ranks")
    save(tmp_path / "alone" / "rank_1" / "w.safetensors", {"w": W[8:]})
    refused(tmp_path / "alone", "rank 1 alone")


def test_files_of_two_runs_are_refused(tmp_path: Path) -> None:
    ranks(tmp_path, [{"w": W}])
    save(tmp_path / "rank_0" / "net_rank_0_1-1_10.safetensors", {"w": W})
    refused(tmp_path, "net_rank_0_1-1_10.safetensors", "one run")
    (tmp_path / "rank_0" / "net_rank_0_1-1_10.safetensors").unlink()
    save(tmp_path / "rank_1" / "net_rank_1-1_11.safetensors", {"w": W})
    refused(tmp_path, "no step is saved by all")


def test_wrong_slices_are_refused(tmp_path: Path) -> None:
    given(tmp_path, strategy({"w": layout([2], [0, -1])}))
    refused(ranks(tmp_path, [{"w": W[:8]}, {"w": W[8:14]}]), "w: its slices do not agree")
    refused(ranks(tmp_path, [{"w": W[:8]}, {"w": W[8:].astype("float16")}]), "w: its slices do not agree")
    refused(ranks(tmp_path, [{"w": W[:8]}, {"x": B}]), "w: 1 of 2 slices")
    refused(ranks(tmp_path, [{"w": B}, {"w": B}]), "cuts 2 axes")
    refused(ranks(tmp_path, [{"v": B}, {"v": B}]), "name none of its tensors")
    refused(ranks(tmp_path, [{"w": W[:8], "b": B}, {"w": W[8:], "b": B[:3]}]), "b: its slices do not agree")


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (strategy({}), "no layouts"),
        (strategy({"w": layout([2], [0, -1], field=3)}), "uneven"),
        (strategy({"w": layout([2], [0, -1]) + content(3, number(1, 4))}), "uneven"),
        (strategy({"w": layout([2], [1, -1])}), "tensor map"),
        (strategy({"w": layout([2], [0, 0])}), "tensor map"),
        (strategy({"w": layout([0], [0, -1])}), "device matrix"),
        (strategy({"w": layout([1 << 40], [0, -1])}), "device matrix"),
        (strategy({"w": layout([2, 2], [0, -1], 1, 2)}), "optimizer shard"),
        (strategy({"w": layout([2, 2], [0, -1], 2, 3)}), "optimizer shard"),
        (strategy({"w": layout([2, 2], [0, -1], 2, -2)}), "optimizer shard"),
        (strategy({"w": layout([2, 2, 2], [0, 1], 4, 2)}), "two ways"),
        (strategy({"w": layout([2], [0, -1]), "b": layout([4], [-1])}), "different numbers of ranks"),
        (strategy({"w": layout([2], [0, -1])})[:-3], "malformed"),
        (content(3, content(1, "w")), "lacks its name"),
        (content(3, number(1, 1) + content(2, b"")), "malformed"),
        (b"\x1a" + b"\xff" * 9 + b"\x01", "malformed"),
        (b"not a strategy", "malformed"),
    ],
)
def test_damaged_strategy_is_refused(tmp_path: Path, data: bytes, word: str) -> None:
    refused(ranks(given(tmp_path, data), [{"w": W[:8]}, {"w": W[8:]}]), word)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"parallel_layout_item": 3}',
        '{"parallel_layout_item": {"w": {}}}',
        '{"parallel_layout_item": {"w": 1}}',
        '{"parallel_strategy_item": {"a": {"stage": []}}, "parallel_layout_item": {"w": {}}}',
        '{"parallel_layout_item": {"w": {"dev_matrix": ["2"], "tensor_map": [0], "field": 0, "opt_weight_shard_step": 0, '
        '"opt_weight_shard_size": 0}}}',
        '{"parallel_layout_item": {"w": {"dev_matrix": 2, "tensor_map": [0], "field": 0, "opt_weight_shard_step": 0, '
        '"opt_weight_shard_size": 0}}}',
        "[" * 100_000,
    ],
)
def test_damaged_strategy_in_json_is_refused(tmp_path: Path, text: str) -> None:
    refused(ranks(given(tmp_path, text.encode(), "a_strategy.json"), [{"w": W[:8]}, {"w": W[8:]}]), "a_strategy.json")


def test_contradicting_strategies_are_refused(tmp_path: Path) -> None:
    given(tmp_path, strategy({"w": layout([2], [0, -1])}))
    given(tmp_path, strategy({"w": layout([2], [-1, 0])}), "ckpt_strategy_rank_1.ckpt")
    refused(ranks(tmp_path, [{"w": W[:8]}, {"w": W[8:]}]), "contradicts the other")


def test_random_damage_of_a_strategy_never_ends_otherwise(tmp_path: Path) -> None:
    ranks(tmp_path, [{"w": W[:8]}, {"w": W[8:]}])
    data, generator = strategy({"w": layout([2], [0, -1], 0, 0), "b": layout([2], [[-1]])}), random.Random(3)
    for _ in range(500):
        damaged = bytearray(data)
        damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        given(tmp_path, bytes(damaged))
        try:
            read_weight_files(tmp_path)
        except ConversionError:
            continue

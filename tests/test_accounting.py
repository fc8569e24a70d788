"""A target that would not write the whole model is refused before a byte is written, in every format."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_converters.basics.dtypes import dtype_named
from megatron_converters.basics.errors import ConversionError
from megatron_converters.cli import main as cli
from megatron_converters.conversion.composing import Planner
from megatron_converters.conversion.copying import Executor
from megatron_converters.conversion.dry_run import forecast
from megatron_converters.conversion.gathering import gather_chunks
from megatron_converters.conversion.outline import Fill
from megatron_converters.conversion.progress import Silent
from megatron_converters.conversion.run import convert
from megatron_converters.formats.huggingface.source import HFSource
from megatron_converters.formats.huggingface.target import HFOptions, HFTarget
from megatron_converters.formats.megatron import torch_dist_target
from megatron_converters.formats.megatron.arguments import uncut_args
from megatron_converters.formats.megatron.rank_files_target import MegatronTarget
from megatron_converters.formats.megatron.torch_dist_target import TorchDistTarget
from megatron_converters.formats.megatron.writing import MegatronOptions
from megatron_converters.formats.queue.target import QueueTarget, stream
from megatron_converters.model.slots import Ref, Slot
from megatron_converters.sharding import placement
from megatron_converters.sharding.ranks import Cut
from tests.tiny import piece

HFModel = Callable[..., Path]
Fills = list[Fill]


def _moved(fill: Fill, change: Callable[[np.ndarray[Any, Any]], Any]) -> Fill:
    rows = fill.rows.copy()
    return fill._replace(rows=change(rows))


def _one_row_is_none(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    rows[1] = -1
    return rows


#: What is made of the fills of one tensor.
WRONG: dict[str, Callable[[Fills], Fills]] = {
    "the rows of another": lambda fills: [*fills[:-1], fills[-1]._replace(rows=fills[0].rows)],
    "a row of none": lambda fills: [*fills[:-1], _moved(fills[-1], _one_row_is_none)],
    "rows beyond the slot": lambda fills: [*fills[:-1], _moved(fills[-1], lambda rows: rows + 1000)],
    "rows in part beyond": lambda fills: [*fills[:-1], _moved(fills[-1], lambda rows: rows + 1)],
    "dropped": lambda fills: fills[:-1],
    "doubled": lambda fills: [*fills, fills[-1]],
    "wrong columns": lambda fills: [*fills[:-1], fills[-1]._replace(col=fills[-1].col + 1)],
    "columns before the first": lambda fills: [*fills[:-1], fills[-1]._replace(col=-1)],
    "rows in place of padding": lambda fills: [*fills[:-1], fills[-1]._replace(padding=1)],
    "another tensor's place": lambda fills: [*fills[:-1], fills[-1]._replace(name=fills[-1].name + ".x")],
    "a place further on": lambda fills: [*fills[:-1], fills[-1]._replace(start=8)],
}
#: Messages have no bytes to be placed in.
OF_FILES = ("another tensor's place", "a place further on")
FORMATS: dict[str, Callable[[Path], Any]] = {
    "torch": lambda folder: MegatronTarget(folder, MegatronOptions(tp=2)),
    "torch_dist": lambda folder: TorchDistTarget(folder, MegatronOptions(tp=2)),
    "hf": lambda folder: HFTarget(folder, HFOptions()),
}


def _break(target: Any, slot: str, wrong: Callable[[Fills], Fills]) -> None:
    right = target.fills

    def fills(ref: Ref) -> Fills:
        found = list(right(ref))
        return wrong(found) if ref.slot.name == slot and ref.layer in (None, 1) else found

    target.fills = fills


@pytest.mark.parametrize("act", ["plan", "convert"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", FORMATS)
def test_a_wrong_fill_is_refused_with_its_place(
    kind: str, wrong: str, act: str, hf_model: HFModel, tmp_path: Path
) -> None:
    source, target = HFSource(hf_model("llama2")), FORMATS[kind](tmp_path / "out")
    _break(target, "fc1", WRONG[wrong])
    with pytest.raises(ConversionError) as refusal:
        forecast(source, target, None) if act == "plan" else convert(source, target, None, Silent())
    fc1 = {"hf": "model.layers.1.mlp.up_proj.weight", "torch": "decoder.layers.1.mlp.linear_fc1.weight"}
    file = {"hf": "model.safetensors: ", "torch": "mp_rank_01/model_optim_rng.pt: ", "torch_dist": ".distcp: "}
    assert fc1.get(kind, "decoder.layers.mlp.linear_fc1.weight [1,") in str(refusal.value)
    assert file[kind] in str(refusal.value)
    assert "layer 0" not in str(refusal.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("wrong", [wrong for wrong in WRONG if wrong not in OF_FILES])
def test_a_wrong_message_is_not_sent(wrong: str, hf_model: HFModel) -> None:
    sent: queue.Queue[Any] = queue.Queue()
    target = QueueTarget(sent, uncut_args, model_type="GPT", divisor=None)
    _break(target, "fc1", WRONG[wrong])
    with pytest.raises(ConversionError, match=r"transformer layer 1: mlp l0 weight [WV]"):
        stream(HFSource(hf_model("llama2")), target, None)
    names = [message["name"] for message in list(sent.queue)[1:]]
    assert names == ["embeddings", "transformer layer 0"]


@pytest.mark.parametrize("wrong", ["dropped", "the rows of another", "rows beyond the slot"])
def test_a_copy_counts_like_the_first(wrong: str, hf_model: HFModel, tmp_path: Path) -> None:
    """A norm lies on both ranks; without one of its copies every element of the slot would still be written."""
    target = FORMATS["torch"](tmp_path / "out")
    _break(
        target, "mlp_norm", lambda fills: WRONG[wrong](fills) if wrong != "the rows of another" else _upside_down(fills)
    )
    with pytest.raises(
        ConversionError, match=r"mp_rank_01/model_optim_rng\.pt: decoder\.layers\.1\.mlp\.linear_fc1\.layer_norm"
    ):
        forecast(HFSource(hf_model("llama2")), target, None)


def _upside_down(fills: Fills) -> Fills:
    """All rows of the copy are one row: nothing is unwritten, but not all are written as often."""
    return [*fills[:-1], _moved(fills[-1], np.zeros_like)]


def _with_rows(cut: Cut, rows: np.ndarray[Any, Any]) -> Cut:
    return Cut(cut.shape, rows, cut.col, cut.padding)


CUTS: dict[str, Callable[..., Cut]] = {
    "rank 0's rows": lambda cut, *sizes: cut(*sizes[:4], 0, *sizes[5:]),
    "a row of none": lambda cut, *sizes: _with_rows(cut(*sizes), _one_row_is_none(cut(*sizes).rows.copy())),
    "rows + 1000": lambda cut, *sizes: _with_rows(cut(*sizes), cut(*sizes).rows + 1000),
}


@pytest.mark.parametrize("act", ["plan", "convert"])
@pytest.mark.parametrize("wrong", CUTS)
def test_a_wrong_cut_of_fc1_is_refused(
    wrong: str, act: str, hf_model: HFModel, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    right, kept = placement.cut, {}

    def cut(slot: Slot, *sizes: Any) -> Cut:
        rank = sizes[3]  # after the model, the layer and the number of shares
        if slot.name != "fc1" or rank != 1:
            return right(slot, *sizes)
        return kept.setdefault(sizes, CUTS[wrong](right, slot, *sizes))

    monkeypatch.setattr(placement, "cut", cut)
    with pytest.raises(SystemExit, match=r"^1$"):
        cli.main([act, str(hf_model("llama2")), str(tmp_path / "out"), "--tp", "2"])
    told = capsys.readouterr().err
    assert "mp_rank_01/model_optim_rng.pt: decoder.layers.0.mlp.linear_fc1.weight" in told
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("wrong", ["rank 0's rows", "rows + 1000", "one row fewer"])
def test_a_wrong_box_of_fc1_is_refused(
    wrong: str, hf_model: HFModel, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    right = torch_dist_target.boxes

    def boxes(slot: Slot, extent: Any, ways: int, index: int, padded: int) -> Sequence[tuple[int, int, int, int]]:
        found = right(slot, extent, ways, index, padded)
        if slot.name != "fc1" or index != 1:
            return found
        if wrong == "rank 0's rows":
            return right(slot, extent, ways, 0, padded)
        shift, fewer = (1000, 0) if wrong == "rows + 1000" else (0, 1)
        return tuple((row + shift, rows - fewer, col, cols) for row, rows, col, cols in found)

    monkeypatch.setattr(torch_dist_target, "boxes", boxes)
    options = ["--tp", "2", "--ckpt-format", "torch_dist"]
    with pytest.raises(SystemExit, match=r"^1$"):
        cli.main(["convert", str(hf_model("llama2")), str(tmp_path / "out"), *options])
    assert ".distcp: decoder.layers.mlp.linear_fc1.weight [0," in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


WHOLE = np.arange(24, dtype=np.uint64).reshape(4, 6)
HOLES = {
    "a row is missing": [piece(WHOLE[:3], [0, 1, 2])],
    "a column is missing": [piece(WHOLE[:, :5], range(4))],
    "filled twice": [piece(WHOLE, range(4)), piece(WHOLE, range(4))],
}


@pytest.mark.parametrize("hole", HOLES)
def test_a_chunk_that_is_not_filled_is_never_written(hole: str) -> None:
    gathers = Planner().compose(np.arange(4), 0, 6, HOLES[hole])
    with pytest.raises(ConversionError, match=r"a file: w: rows 0 to 3 get \d+ elements instead of 24"):
        list(gather_chunks(gathers, (4, 6), dtype_named("int64"), "a file: w"))


def test_a_gap_found_while_copying_stops_the_executor() -> None:
    class File:
        written = 0

        def write(self, *_: Any) -> None:
            self.written += 1

    file, executor = File(), Executor()
    fill = Fill("a file", "w", dtype_named("int64"), (4, 6), np.arange(4), 0)
    with pytest.raises(ConversionError, match="a file: w: rows 0 to 3 get 18 elements instead of 24"):
        executor.fill(file, fill, executor.plan(fill, [piece(WHOLE[:3], [0, 1, 2])]))  # type: ignore[arg-type]
    executor.cancel()
    assert file.written == 0

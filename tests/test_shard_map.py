"""Shard map: equal ranks are drawn once and nothing is lost by it; every bar has a name; a plan shows what would be written."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_converters.basics.dtypes import dtype_named
from megatron_converters.cli import main as cli
from megatron_converters.conversion.dry_run import forecast
from megatron_converters.conversion.endpoint import Target
from megatron_converters.conversion.progress import Silent
from megatron_converters.conversion.run import convert
from megatron_converters.formats.detect import HF, MEGATRON, MINDSPORE
from megatron_converters.formats.huggingface.source import HFSource
from megatron_converters.formats.huggingface.target import HFOptions, HFTarget
from megatron_converters.formats.megatron.rank_files_target import MegatronTarget
from megatron_converters.formats.megatron.torch_dist_target import TorchDistTarget
from megatron_converters.formats.megatron.writing import MegatronOptions
from megatron_converters.formats.mindspore.target import MindSporeOptions, MindSporeTarget
from megatron_converters.inspection.inventory import Holding, Survey
from megatron_converters.inspection.planned import planned
from megatron_converters.inspection.shard_map.fold import folded
from megatron_converters.inspection.shard_map.grid import Grid, grid, row_of
from megatron_converters.inspection.shard_map.page import page
from megatron_converters.model.slots import DECODER, MTP, SLOTS, Ref
from megatron_converters.sharding.stages import PipelineSplit
from tests.sparse import PUBLISHED, sparse_hf, sparse_megatron, surveyed
from tests.tiny import tiny_spec

HFModel = Callable[..., Path]
_MOE: dict[str, Any] = dict(family="mixtral", num_experts=8, moe_ffn_hidden_size=4, moe_router_topk=2)


def fold_of(found: Survey) -> Grid:
    fold = folded(found, grid(found))
    assert fold is not None
    return fold


# --- equal ranks


@pytest.mark.parametrize(
    ("spec", "options", "columns", "rows", "title"),
    [
        (
            tiny_spec(num_layers=8),
            dict(tp=2, pp=4),
            {"stage 0": 2, "stages 1 to 2": 4, "stage 3": 2},
            ["embeddings", "1st layer", "2nd layer", "output"],
            "8 ranks in 3 groups of equal ones, ",
        ),
        (
            tiny_spec(num_layers=4, tied=True, vocab_size=200),
            dict(tp=2, pp=2),
            {"stage 0": 2, "stage 1": 2},
            ["embeddings", "1st layer", "2nd layer", "output"],
            "4 ranks in 2 groups of equal ones, ",
        ),
        (
            tiny_spec(**_MOE),
            dict(tp=2, ep=4, etp=1),
            {"4 ranks": 4},
            ["embeddings", "layer 0", "layer 1", "output"],
            "4 ranks, all alike, ",
        ),
        (
            tiny_spec(num_layers=126),
            dict(tp=2),
            {"2 ranks": 2},
            ["embeddings", "layers 0 to 125", "output"],
            "2 ranks, all alike, ",
        ),
        (
            tiny_spec(num_layers=5),
            dict(tp=2, pp=3, split=PipelineSplit(first=1)),
            {"stage 0": 2, "stage 1": 2, "stage 2": 2},
            ["embeddings", "1st layer", "2nd layer", "output"],
            "6 ranks in 3 groups of equal ones, ",
        ),
    ],
    ids=["stages", "tied", "experts", "many layers", "uneven stages"],
)
def test_equal_ranks_are_one_column(
    tmp_path: Path, spec: Any, options: dict[str, Any], columns: dict[str, int], rows: list[str], title: str
) -> None:
    found = surveyed(sparse_megatron(spec, tmp_path / "meg", **options))
    fold = fold_of(found)
    (panel,) = fold.panels
    assert {column.label: column.times for column in panel.columns} == columns
    assert list(panel.rows) == rows
    assert panel.title.startswith(title)
    weights = sum(holding.nbytes for holding in found.holdings)
    assert weights == sum(cell.nbytes * cell.times for cell in panel.cells)
    assert weights == sum(column.nbytes * column.times for column in panel.columns)
    assert weights == sum(cell.nbytes for other in grid(found).panels for cell in other.cells)


def test_ranks_that_differ_in_a_shape_or_a_dtype_are_apart(tmp_path: Path) -> None:
    """One rank of a stage stores another dtype than its neighbours."""
    from dataclasses import replace

    found = surveyed(sparse_megatron(tiny_spec(num_layers=6), tmp_path / "meg", tp=4, pp=3, divisor=4))
    file = "mp_rank_01_001/model_optim_rng.pt"
    half = dtype_named("bf16")
    holdings = [replace(one, dtype=half) if one.file == file else one for one in found.holdings]
    changed = replace(found, holdings=tuple(holdings))
    (panel,) = fold_of(changed).panels
    assert [(column.name, column.times) for column in panel.columns] == [
        ("stage 0, 4 ranks alike", 4),
        ("stage 1, 3 of 4 ranks alike", 3),
        ("mp_rank_01_001", 1),
        ("stage 2, 4 ranks alike", 4),
    ]
    assert panel.columns[2].label == "stage 1, tp1"
    assert panel.columns[1].nbytes == 2 * panel.columns[2].nbytes


def test_what_is_not_equal_is_not_folded(tmp_path: Path) -> None:
    """Files of few layers each that all differ are drawn as they are."""
    found = surveyed(sparse_hf(tiny_spec(num_layers=2), tmp_path / "hf", max_shard_size=900))
    assert folded(found, grid(found)) is None
    text = page(found)
    assert "drawn once" not in text and "Each of the" not in text
    assert '<svg class="map"' in text


def test_the_width_of_a_bar_is_the_number_of_equal_ranks(tmp_path: Path) -> None:
    text = page(surveyed(sparse_megatron(tiny_spec(num_layers=8), tmp_path / "meg", tp=2, pp=4)))
    chart = ElementTree.fromstring(re.findall(r'<svg class="map".*?</svg>', text, re.DOTALL)[0])
    bars = [group for group in chart.iter("g") if group.get("class") == "cell"]
    widths = [float(bar.find("rect").get("width")) for bar in bars]
    assert len(widths) == 3
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.02) == pytest.approx(2 * widths[2], rel=0.02)


def test_files_of_a_published_size_fold_to_a_pattern(tmp_path: Path) -> None:
    found = surveyed(sparse_hf(PUBLISHED["Llama-3.1-405B"], tmp_path / "hf", max_shard_size=4_800_000_000))
    (panel,) = fold_of(found).panels
    assert len(panel.columns) < 10 and sum(column.times for column in panel.columns) == len(found.by_file) == 191
    assert sum(cell.nbytes * cell.times for cell in panel.cells) == 2 * 405_853_388_800
    assert panel.columns[0].label == "001" and panel.columns[0].name == "model-00001-of-00191.safetensors"


def test_a_folded_bar_says_how_many_it_stands_for_and_names_the_first(tmp_path: Path) -> None:
    found = surveyed(sparse_megatron(tiny_spec(num_layers=8), tmp_path / "meg", tp=2, pp=4))
    texts = [cell.text.splitlines() for cell in fold_of(found).panels[0].cells]
    assert [
        "2nd layer, stages 1 to 2, 4 ranks alike",
        "the first is layer 3, mp_rank_00_001; it has",
    ] in [lines[:2] for lines in texts]
    assert all(lines[2].endswith("tensors") or lines[2].endswith("1 tensor") for lines in texts)
    tall = surveyed(sparse_megatron(tiny_spec(num_layers=126), tmp_path / "tall"))
    texts = [cell.text.splitlines() for cell in fold_of(tall).panels[0].cells]
    assert ["layers 0 to 125, mp_rank_00, 126 layers alike", "the first is layer 0, mp_rank_00; it has"] in [
        lines[:2] for lines in texts
    ]


def test_layers_of_multi_token_prediction_have_rows_of_their_own() -> None:
    float32 = dtype_named("fp32")
    rows = [
        row_of(Holding("file", "name", Ref(SLOTS["fc1"], 0, None, stack), "fc1", float32, (2, 2), 0, False))
        for stack in (DECODER, MTP)
    ]
    assert [row.label for row in rows] == ["layer 0", "MTP layer 0"]
    assert rows == sorted(rows)


# --- what keyboards and screen readers find


class _Tables(HTMLParser):
    """Rows of every table with a caption, as text by caption."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[list[str]]] = {}
        self._rows: list[list[str]] = []
        self._text: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self._rows.append([])
        elif tag in ("caption", "th", "td"):
            self._text = ""

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "caption":
            self._rows = self.found[self._text or ""] = []
        elif tag in ("th", "td"):
            self._rows[-1].append(self._text or "")
        if tag in ("caption", "th", "td"):
            self._text = None
        if tag == "table":
            self._rows = []


def test_the_tables_behind_the_map_have_the_inventorys_numbers(tmp_path: Path) -> None:
    found = surveyed(sparse_megatron(tiny_spec(num_layers=8), tmp_path / "meg", tp=2, pp=4))
    parser = _Tables()
    parser.feed(page(found))
    folded_table, *tables = [rows for caption, rows in parser.found.items() if caption.endswith("bytes of weights")]
    held: dict[tuple[str, str], int] = {}
    for one in found.holdings:
        key = one.file.partition("/")[0], row_of(one).label
        held[key] = held.get(key, 0) + one.nbytes
    shown = {}
    for (_, *files), *rows, (_, *sums) in tables:
        for label, *numbers in rows:
            shown.update({(file, label): int(n.replace(",", "")) for file, n in zip(files, numbers, strict=True) if n})
        for file, total in zip(files, sums, strict=True):
            assert sum(n for (of, _), n in held.items() if of == file) == int(total.replace(",", ""))
    assert shown == held
    (_, *groups), *rows, (_, *sums) = folded_table
    assert groups == [f"{name} ranks alike, each" for name in ("stage 0, 2", "stages 1 to 2, 4", "stage 3, 2")]
    assert rows[0][0] == "embeddings" and rows[0][2] == "" and rows[-1][0] == "output"
    times = [2, 4, 2]
    assert sum(t * int(n.replace(",", "")) for t, n in zip(times, sums, strict=True)) == sum(held.values())


def test_every_bar_can_have_the_focus_and_has_a_name(tmp_path: Path) -> None:
    text = page(surveyed(sparse_megatron(tiny_spec(**_MOE), tmp_path / "meg", tp=2, ep=4, etp=1)))
    pictures = [ElementTree.fromstring(svg) for svg in re.findall(r'<svg class="map".*?</svg>', text, re.DOTALL)]
    names = []
    for picture in pictures:
        left, top, width, height = map(float, picture.get("viewBox").split())
        assert (left, top, width) == (0, 0, 1080) and height < 400
        for bar in picture.iter("rect"):
            assert 0 <= float(bar.get("x")) <= float(bar.get("x")) + float(bar.get("width")) <= width + 0.1
            assert 0 <= float(bar.get("y")) <= float(bar.get("y")) + float(bar.get("height")) <= height
        assert picture.get("role") == "group"  # an image's parts would be hidden from screen readers
        named = {group.find("title").text for group in picture.iter("g") if group.get("tabindex") == "0"}
        drawn = [group for group in picture.iter("g") if group.get("aria-hidden") is None]
        assert len(named) == len(drawn), "two bars of a picture have the same name, or one has none"
        assert {group.get("role") for group in drawn} == {"img"}
        names += named
    assert any(name.startswith("layer 1, mp_rank_01_003\n") for name in names)
    assert any(name.startswith("layer 1, 4 ranks alike\n") for name in names)
    for svg in re.findall(r"<svg.*?>", text):
        assert "role=" in svg or "aria-hidden" in svg


def test_facts_come_before_the_map_and_equal_ranks_are_closed(tmp_path: Path) -> None:
    text = page(surveyed(sparse_megatron(tiny_spec(num_layers=8), tmp_path / "meg", tp=2, pp=4)))
    order = [
        text.index(words) for words in ("parameters</dt>", ">model</h2>", ">Shard map</h2>", "drawn once", "<svg class")
    ]
    assert order == sorted(order)
    assert "Bar length = bytes; the longest = " in text
    details = text.index("<details><summary>Each of the 8 ranks</summary>")
    assert text.index("layer 3, mp_rank_01_001") > details
    assert "<details open" not in text


# --- plans


@pytest.mark.parametrize(
    ("family", "kind", "target"),
    [
        ("llama3.2-tied", MEGATRON, lambda path: MegatronTarget(path, MegatronOptions(tp=2, pp=2))),
        ("mixtral", MEGATRON, lambda path: MegatronTarget(path, MegatronOptions(tp=2, ep=4, etp=1, pp=2))),
        ("mixtral", MEGATRON, lambda path: MegatronTarget(path, MegatronOptions(ep=2, expert_layout="stacked"))),
        ("llama3", MEGATRON, lambda path: TorchDistTarget(path, MegatronOptions(tp=2, pp=2))),
        ("mixtral", HF, lambda path: HFTarget(path, HFOptions(max_shard_size=100_000))),
        ("llama3", MINDSPORE, lambda path: MindSporeTarget(path, MindSporeOptions())),
    ],
    ids=["ranks", "experts", "stacked", "torch_dist", "hf", "mindspore"],
)
def test_a_planned_folder_is_the_one_that_is_written(
    hf_model: HFModel, tmp_path: Path, family: str, kind: str, target: Callable[[Path], Target]
) -> None:
    source = HFSource(hf_model(family))
    place = target(tmp_path / "out")
    plan = planned(kind, source.spec, place, forecast(source, place, None))
    assert not (tmp_path / "out").exists()
    convert(HFSource(hf_model(family)), target(tmp_path / "out"), None, Silent())
    written = surveyed(tmp_path / "out")
    assert plan.kind == written.kind
    assert {file: plan.files[file] for file in plan.by_file} == {file: written.files[file] for file in written.by_file}
    assert (plan.cut is None, plan.padded_vocab) == (written.cut is None, written.padded_vocab)
    assert (plan.names, plan.expert_layout) == (written.names, written.expert_layout)

    def counted(found: Survey) -> list[tuple[Any, ...]]:
        return sorted(
            (one.file, str(one.ref), one.slot, str(one.dtype), one.nbytes, one.padding, one.copy)
            for one in found.holdings
        )

    assert counted(plan) == counted(written)
    drawn, real = grid(plan), grid(written)
    assert [panel.title for panel in drawn.panels] == [panel.title for panel in real.panels]
    assert [panel.rows for panel in drawn.panels] == [panel.rows for panel in real.panels]


def test_plan_writes_a_page_with_both_maps_and_nothing_else(
    hf_model: HFModel, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = ["plan", str(hf_model("llama3")), str(tmp_path / "out"), "--tp", "2", "--pp", "2"]
    argv += ["--no-measure", "--html", str(tmp_path / "page.html")]
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 0
    assert f"wrote the page {tmp_path / 'page.html'}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    text = (tmp_path / "page.html").read_text()
    assert "(planned; nothing is written)" in text
    before, after = text.index('id="before-h">Before</h2>'), text.index('id="after-h">After</h2>')
    assert before < text.index("model.safetensors", before) < after < text.index("4 ranks in 2 groups of equal ones")
    identifiers = re.findall(r' id="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    assert {name.lstrip("#") for name in re.findall(r'href="([^"]+)"', text)} <= set(identifiers)
    assert re.search(r"tensors read</th><td>\d+<", text) and "vocabulary padding</th>" in text


def test_a_page_of_a_plan_says_what_is_in_the_way(
    hf_model: HFModel, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "latest_checkpointed_iteration.txt").write_text("7")
    argv = [
        "plan",
        str(hf_model("llama3")),
        str(tmp_path / "out"),
        "--no-measure",
        "--html",
        str(tmp_path / "page.html"),
    ]
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 1
    assert "obstacle</th><td>" in (tmp_path / "page.html").read_text()


def test_a_page_of_a_plan_that_cannot_be_written_is_refused_first(
    hf_model: HFModel, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["plan", str(hf_model("llama3")), str(tmp_path / "out"), "--html", str(tmp_path / "no" / "page.html")])
    assert exit_.value.code == 2
    shown = capsys.readouterr()
    assert "there is no folder" in shown.err and shown.out == ""

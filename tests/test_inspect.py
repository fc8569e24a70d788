"""`inspect`: it says what torch, safetensors and transformers say of the same files; its page is sound and asks for nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_converters.basics.quantities import size
from megatron_converters.cli import main as cli
from megatron_converters.inspection import shard_map
from megatron_converters.inspection.inventory import count_parameters
from megatron_converters.inspection.shard_map.card import map_card
from megatron_converters.inspection.shard_map.grid import KINDS, grid
from megatron_converters.model.slots import SLOTS
from tests.conversions import hf_to_megatron
from tests.helpers import ROOT, args_of, edit_rank
from tests.sparse import PUBLISHED, sparse_hf, sparse_megatron, surveyed
from tests.tiny import tiny_spec

HFModel = Callable[..., Path]


def inspect(capsys: pytest.CaptureFixture[str], *options: Any, code: int = 0) -> str:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["inspect", *map(str, options)])
    shown = capsys.readouterr()
    assert exit_.value.code == code, shown
    return shown.out if code == 0 else shown.err


def as_json(capsys: pytest.CaptureFixture[str], *options: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(inspect(capsys, *options, "--json"))
    return found


# --- figures that others give


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        # safetensors' own counts on the models' pages; active: 12.9 B, 39 B and 3.3 B in their papers
        ("Llama-3.2-1B", 1_235_814_400, None),
        ("Llama-3.1-8B", 8_030_261_248, None),
        ("Llama-3.1-70B", 70_553_706_496, None),
        ("Llama-3.1-405B", 405_853_388_800, None),
        ("Mixtral-8x7B", 46_702_792_704, 12.9e9),
        ("Mixtral-8x22B", 140_630_071_296, 39e9),
        ("Qwen3-30B-A3B", 30_532_122_624, 3.3e9),
    ],
)
def test_parameters_are_those_that_are_published(name: str, total: int, active: float | None) -> None:
    found = count_parameters(PUBLISHED[name])
    assert found.total == total
    assert found.active == (total if active is None else pytest.approx(active, rel=0.02))


@pytest.mark.parametrize(
    "family", ["llama3.2-tied", "llama-bias", "qwen2", "qwen3", "qwen2-moe", "qwen3-moe-dense-layers"]
)
def test_parameters_are_those_of_transformers(
    hf_model: HFModel, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    folder = hf_model(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert as_json(capsys, folder)["parameters"]["total"] == model.num_parameters()


# --- what the files hold, as their own libraries read them


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama3", {"max_shard_size": "100KB", "dtype": "bfloat16"}),
        ("qwen2-tied", {"weights": "bin"}),
        ("mixtral", {"fused_experts": True}),
        ("qwen2-moe", {"max_shard_size": "100KB"}),
    ],
)
def test_hugging_face_files(
    hf_model: HFModel, capsys: pytest.CaptureFixture[str], family: str, options: dict[str, Any]
) -> None:
    import torch
    from safetensors.torch import load_file

    folder = hf_model(family, **options)
    found = as_json(capsys, folder)
    for file in found["files"]:
        path = folder / file["file"]
        held = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        assert file["tensors"] == len(held)
        assert file["weight_bytes"] == sum(tensor.nbytes for tensor in held.values())
        assert file["bytes"] == path.stat().st_size
        layers = {int(name.split(".")[2]) for name in held if name.startswith("model.layers.")}
        assert file["layers"] == sorted(layers)
    assert {file["file"] for file in found["files"]} == {
        path.name for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern)
    }
    assert found["weights"]["dtypes"].keys() == {options.get("dtype", "float32")}
    assert found["expert_layout"] == {"mixtral": "fused", "qwen2-moe": "separate"}.get(family)
    assert found["parallel"] is None and found["names"] is None


@pytest.mark.parametrize(
    ("family", "sizes", "names", "layout"),
    [
        ("llama3.1", dict(tp=2, pp=2, impl="local", divisor=16), "local", None),
        ("llama3.2-tied", dict(tp=2, pp=2), "transformer_engine", None),
        ("mixtral", dict(tp=2, ep=4, etp=1), "transformer_engine", "grouped"),
        ("qwen3-moe-dense-layers", dict(tp=1, pp=2, ep=2, expert_layout="stacked"), "transformer_engine", "stacked"),
        ("mixtral", dict(ep=2, expert_layout="dynamic", impl="local"), "local", "dynamic"),
    ],
)
def test_megatron_files(
    hf_model: HFModel,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    family: str,
    sizes: dict[str, Any],
    names: str,
    layout: str | None,
) -> None:
    import torch

    from tests.oracle.checkpoint import load_rank

    folder = hf_to_megatron(hf_model(family), tmp_path / "meg", **sizes)
    found = as_json(capsys, folder)
    directory = folder / "iter_0000001"
    assert {file["file"] for file in found["files"]} == {
        str(path.relative_to(directory)) for path in directory.glob("*/*.pt")
    }
    for file in found["files"]:
        model = load_rank(directory / file["file"])["model"]
        held = [value for value in model.values() if isinstance(value, torch.Tensor)]
        assert (file["tensors"], file["weight_bytes"]) == (len(held), sum(tensor.nbytes for tensor in held))
    args = args_of(folder)
    parallel = found["parallel"]
    assert (parallel["tensor"], parallel["pipeline"]) == (sizes.get("tp", 1), sizes.get("pp", 1))
    assert parallel["layers_of_stages"] == [args.num_layers // parallel["pipeline"]] * parallel["pipeline"]
    assert (parallel["expert"], parallel["expert_tensor"]) == (sizes.get("ep", 1), sizes.get("etp", sizes.get("tp", 1)))
    assert (found["names"], found["expert_layout"]) == (names, layout)
    assert found["vocabulary"] == {"size": 199, "rows": args.padded_vocab_size}
    assert found["iteration"] == 1
    once = found["parameters"]["total"] + (args.padded_vocab_size - 199) * args.hidden_size * (
        2 - (family == "llama3.2-tied")
    )
    assert found["weights"]["bytes"] - found["weights"]["copied_bytes"] == 4 * once


def test_virtual_stages(hf_model: HFModel, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from megatron_converters.sharding.stages import PipelineSplit

    folder = hf_to_megatron(hf_model("mixtral"), tmp_path / "meg", pp=2, split=PipelineSplit(virtual=2))
    found = as_json(capsys, folder)
    assert [file["layers"] for file in found["files"]] == [[0, 2], [1, 3]]
    assert (found["names"], found["expert_layout"]) == ("transformer_engine", "grouped")
    assert (found["parallel"]["virtual_stages"], found["parallel"]["layers_of_stages"]) == (2, [1, 1, 1, 1])
    shown = inspect(capsys, folder)
    assert "2 (layers 2 x 2, 2 virtual stages on each)" in shown and "mp_rank_00_001 (layers 1, 3)" in shown
    assert [panel.title.rpartition(",")[0] for panel in grid(surveyed(folder)).panels] == [
        "stage 0, layers 0, 2, 1 rank",
        "stage 1, layers 1, 3, 1 rank",
    ]


@pytest.mark.parametrize("family", ["llama3.2-tied", "mixtral"])
def test_distributed_files(hf_model: HFModel, capsys: pytest.CaptureFixture[str], tmp_path: Path, family: str) -> None:
    source, folder = hf_model(family), tmp_path / "meg"
    options = ["convert", str(source), str(folder), "--tp", "2", "--pp", "2", "--ckpt-format", "torch_dist", "--quiet"]
    with pytest.raises(SystemExit) as exit_:
        cli.main(options)
    assert exit_.value.code == 0
    found, theirs = as_json(capsys, folder), as_json(capsys, source)
    assert (found["format"], found["checkpoint_format"]) == ("megatron", "torch_dist")
    assert {file["file"] for file in found["files"]} == {path.name for path in folder.glob("*/*.distcp")}
    assert found["parameters"] == theirs["parameters"]
    padding = (found["vocabulary"]["rows"] - 199) * 64 * 4 * (2 - (family == "llama3.2-tied"))
    assert found["weights"]["bytes"] == theirs["weights"]["bytes"] + padding
    assert re.search(r"tensor parallel +2, when written", inspect(capsys, folder))
    assert len(grid(surveyed(folder)).panels) == 1


def test_metas_files(hf_model: HFModel, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from tests.test_meta_source import write

    source = hf_model("llama2", vocab_size=200)
    folder = write(source, tmp_path / "meta", 2, 1)
    found = as_json(capsys, folder)
    assert [file["file"] for file in found["files"]] == ["consolidated.00.pth", "consolidated.01.pth"]
    assert found["format"] == "meta"
    assert found["parameters"]["total"] == as_json(capsys, source)["parameters"]["total"]


def test_what_is_left_out_is_said(hf_model: HFModel, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = hf_to_megatron(hf_model("llama3"), tmp_path / "meg")
    edit_rank(folder, "mp_rank_00", optimizer={"step": 5})
    shown = inspect(capsys, folder)
    assert "left out of the conversion: optimizer" in shown
    assert "57 rows of vocabulary padding are left out (vocabulary 199)" in shown
    source = shutil.copytree(hf_model("llama3"), tmp_path / "hf")
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**tensors, frequencies: tensors["model.norm.weight"].clone()}, source / "model.safetensors")
    assert re.search(rf"left out +{frequencies}", inspect(capsys, source))


def test_capacity_bins_are_among_what_is_left_out(
    hf_model: HFModel, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from tests.test_capacity_bins import SMALL, add_bins, checkpoint

    folder = checkpoint(hf_model("mixtral", **SMALL), tmp_path / "meg", (1, 1, 2, 1))
    add_bins(folder, (1, 1, 2, 1), ((0, 1),))
    (left_out,) = as_json(capsys, folder)["left_out"]
    assert left_out.startswith("20 capacity-bin buffers of")
    assert re.search(r"left out +20 capacity-bin buffers", inspect(capsys, folder))


# --- text


def test_text_of_a_checkpoint(hf_model: HFModel, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = hf_to_megatron(hf_model("qwen2-moe"), tmp_path / "meg", tp=2, pp=2, ep=2)
    shown = inspect(capsys, folder)
    rows = dict(re.findall(r"^  (\S.*?)  +(.*)$", shown, re.MULTILINE))
    assert rows["architecture"] == "qwen2_moe (Qwen2MoeForCausalLM)"
    assert rows["attention"] == "8 heads of 8 in 4 query groups"
    assert rows["biases"] == "query, key and value"
    assert rows["experts"] == "8, of which 2 for a token"
    assert rows["shared expert"] == "MLP size 80, with a gate"
    assert rows["router's softmax"] == "over all experts"
    assert rows["pipeline parallel"] == "2 (layers 2 x 2)"
    assert rows["vocabulary padding"] == "57 rows (embeddings have 256)"
    assert "mp_rank_00_000_000 to mp_rank_01_000_001 (4 alike, layers 0 to 1)" in shown
    widths = {len(line) for line in shown.split("\nfiles\n")[1].splitlines()}
    assert len(widths) == 1, "the table of files is ragged"


def test_uneven_stages_are_spelled_out(hf_model: HFModel, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from megatron_converters.sharding.stages import PipelineSplit

    folder = hf_to_megatron(hf_model("llama3"), tmp_path / "meg", pp=3, split=PipelineSplit(first=2))
    assert re.search(r"pipeline parallel +3 \(layers 2 \+ 2 x 1\)", inspect(capsys, folder))
    counted = hf_to_megatron(hf_model("llama3"), tmp_path / "two", pp=3, split=PipelineSplit(embedding=True, loss=True))
    assert "(layers 1 + 2 + 1, counting the embedding and the loss)" in inspect(capsys, counted)


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 KB"), (999_600, "1 MB"), (16_060_522_496, "16.1 GB"), (5e18, "5000 PB")],
)
def test_sizes_in_words(nbytes: int, shown: str) -> None:
    assert size(nbytes) == shown


def test_a_page_for_a_link_or_a_pipe_leaves_it_what_it_is(hf_model: HFModel, tmp_path: Path) -> None:
    """Root, in a container, may else lose /dev/null or /dev/stdout."""
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    (tmp_path / "page.html").touch()
    link.symlink_to("page.html")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        for path in (link, pipe):
            with pytest.raises(SystemExit) as caught:
                cli.main(["inspect", str(hf_model("llama2")), "--html", str(path)])
            assert caught.value.code == 0
        assert os.read(reader, 9) == b"<!doctype"
    finally:
        os.close(reader)
    assert link.is_symlink() and pipe.is_fifo()
    assert (tmp_path / "page.html").read_text().startswith("<!doctype")


@pytest.mark.parametrize(
    ("html", "words"), [("", "is a folder"), ("nowhere/page.html", "there is no folder")], ids=["folder", "no folder"]
)
def test_a_page_that_cannot_be_written_is_refused(
    hf_model: HFModel, capsys: pytest.CaptureFixture[str], tmp_path: Path, html: str, words: str
) -> None:
    assert words in inspect(capsys, hf_model("llama3"), "--html", tmp_path / html, code=2)


def test_a_folder_of_no_known_format_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "is of no known format" in inspect(capsys, tmp_path, code=2)


# --- the page


class _Page(HTMLParser):
    """Balanced tags, and every attribute that could ask for something; a link within the page asks for nothing."""

    _VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.asked: list[tuple[str, str | None]] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.asked += [
            (name, value)
            for name, value in attrs
            if name in ("src", "href", "xlink:href", "srcset", "action") and not (value or "").startswith("#")
        ]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self._VOID:
            self.handle_endtag(tag)


def page_of(capsys: pytest.CaptureFixture[str], folder: Path, to: Path) -> str:
    inspect(capsys, folder, "--html", to)
    return to.read_text(encoding="utf-8")


def svgs(page: str) -> list[ElementTree.Element]:
    return [
        ElementTree.fromstring(svg)
        for svg in re.findall(r'<svg class="map" viewBox="0 0 1080 .*?</svg>', page, re.DOTALL)
    ]


def bars(picture: ElementTree.Element) -> list[ElementTree.Element]:
    return [group for group in picture.iter("g") if group.get("class") == "cell"]


def test_the_page_stands_alone(hf_model: HFModel, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = page_of(capsys, hf_to_megatron(hf_model("mixtral"), tmp_path / "meg", tp=2, ep=2), tmp_path / "page.html")
    parsed = _Page()
    parsed.feed(text)
    assert parsed.open == [] and parsed.asked == [] and parsed.handlers == []
    assert not {"img", "link", "iframe", "object"} & set(parsed.tags)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text
    for svg in svgs(text):
        assert svg.get("role") == "group" and svg.find("title") is not None and svg.find("desc") is not None
    identifiers = re.findall(r' id="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    assert "$" not in text


def test_names_of_a_checkpoint_are_text_and_nothing_else(
    hf_model: HFModel, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    evil = """<img src=x onerror="alert(1)">&'"$path"""
    folder = shutil.copytree(hf_to_megatron(hf_model("llama3"), tmp_path / "meg"), tmp_path / evil)
    args = args_of(folder)
    args.tokenizer_model = f"{evil}</script><script>alert(2)</script>"
    edit_rank(folder, "mp_rank_00", args=args)
    text = page_of(capsys, folder, tmp_path / "page.html")
    parsed = _Page()
    parsed.feed(text)
    assert parsed.open == [] and "img" not in parsed.tags and parsed.tags.count("script") == 1
    assert "&lt;img src=x onerror=" in text


def test_cells_show_what_the_ranks_hold(hf_model: HFModel, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = hf_to_megatron(hf_model("llama3.2-tied"), tmp_path / "meg", tp=2, pp=2)
    text = page_of(capsys, folder, tmp_path / "page.html")
    *_, totals, one, other = svgs(text)  # after those that are folded
    cells = [bars(panel) for panel in (one, other)]
    assert [len(of_panel) for of_panel in cells] == [
        2 * (1 + 2),
        2 * (2 + 1),
    ]  # embeddings and layers; layers and output
    titles = ["".join(cell.itertext()) for of_panel in cells for cell in of_panel]
    assert any(
        title.startswith("layer 2, mp_rank_00_001\n") and "layers.0.mlp.linear_fc1.weight [112, 64]" in title
        for title in titles
    )
    (tied,) = [title for title in titles if title.startswith("output, mp_rank_01_001\n")]
    assert "output_layer.weight [128, 64] float32, 32.8 KB" in tied
    assert len(bars(totals)) == 4


def test_bars_are_as_long_as_their_cells_have_bytes(
    hf_model: HFModel, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = hf_to_megatron(hf_model("mixtral"), tmp_path / "meg", ep=4)
    drawn = grid(surveyed(folder))
    *_, panel = svgs(page_of(capsys, folder, tmp_path / "page.html"))
    lengths = [[float(rect.get("width", "0")) for rect in cell.iter("rect")] for cell in bars(panel)]
    (cells,) = (panel.cells for panel in drawn.panels)
    longest = max(map(sum, lengths))
    for widths, cell in zip(lengths, cells, strict=True):
        assert sum(widths) == pytest.approx(longest * cell.nbytes / drawn.largest, abs=1.1)
        total = sum(segment.nbytes for segment in cell.segments)
        for width, segment in zip(widths, cell.segments, strict=True):
            assert width == pytest.approx(sum(widths) * segment.nbytes / total, rel=0.1, abs=1.1)
            assert width > 0


def test_every_slot_has_one_colour() -> None:
    slots = [slot for slots in KINDS.values() for slot in slots]
    assert sorted(slots) == sorted(SLOTS)
    style = (ROOT / "megatron_converters/inspection/shard_map/page.html").read_text()
    for index in range(len(KINDS)):
        assert f".k{index} {{ fill: var(--k{index}); }}" in style


def _luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_bars_stand_out(scheme: int) -> None:
    style = (ROOT / "megatron_converters/inspection/shard_map/page.html").read_text()
    colours = dict(re.findall(r"--(\w+): (#\w{6});", re.findall(r":root \{(.*?)\}", style, re.DOTALL)[scheme]))
    for ground in ("page", "surface", "stripe"):
        for text in ("text", "soft"):
            assert _contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for index in range(len(KINDS)):
            assert _contrast(colours[f"k{index}"], colours[ground]) >= 3.0, (index, ground)


# --- large models


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_a_405b_takes_seconds_and_little_memory(tmp_path: Path, kind: str) -> None:
    spec, page = PUBLISHED["Llama-3.1-405B"], tmp_path / "page.html"
    if kind == "hf":
        folder = sparse_hf(spec, tmp_path / "model", max_shard_size=4_800_000_000)
    else:
        folder = sparse_megatron(spec, tmp_path / "model", tp=8, pp=14)
    begun = time.monotonic()
    command = f"ulimit -v 1500000 && exec {sys.executable} -m megatron_converters inspect {folder} --html {page}"
    shown = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # each thread reserves address space
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert time.monotonic() - begun < 20
    assert "405,853,388,800" in shown
    assert ("191, 811" if kind == "hf" else "112, 811") in shown
    assert page.stat().st_size < 3_000_000


@pytest.mark.parametrize(("most", "detail"), [(400, "TENSORS"), (150, "KINDS"), (10, "CELLS")])
def test_many_ranks_share_columns_and_many_tensors_a_colour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, detail: str
) -> None:
    monkeypatch.setattr(shard_map.grid, "_RANKS", ("rank", 4, 10))
    monkeypatch.setattr(shard_map.grid, "_MAX_TENSOR_SEGMENTS", most)
    monkeypatch.setattr(shard_map.grid, "_MAX_KIND_SEGMENTS", most)
    experts: dict[str, Any] = dict(num_experts=20, moe_ffn_hidden_size=4, moe_router_topk=2)
    found = surveyed(sparse_megatron(tiny_spec(family="mixtral", **experts), tmp_path / "many", ep=20))
    assert len(found.by_file) == 20
    drawn = grid(found)
    assert drawn.detail.name == detail
    assert [len(panel.columns) for panel in drawn.panels] == [4, 4, 2]
    assert drawn.panels[1].title.startswith("ranks 9 to 16 of 20, ")
    assert drawn.panels[0].columns[0].name == "mp_rank_00_000 to mp_rank_00_001"
    weights = sum(holding.nbytes for holding in found.holdings)
    assert weights == sum(cell.nbytes for panel in drawn.panels for cell in panel.cells)
    assert weights == sum(column.nbytes for panel in drawn.panels for column in panel.columns)
    if detail == "CELLS":
        assert {len(cell.segments) for panel in drawn.panels for cell in panel.cells} == {1}
        assert "The colour of a bar is that of its largest part." in map_card(found, "Shard map", "map")


def test_the_page_is_installed_with_the_package() -> None:
    setup = (ROOT / "setup.py").read_text()
    for path in (ROOT / "megatron_converters/inspection/shard_map").iterdir():
        assert path.suffix in (".py", "") or f'"{path.name}"' in setup

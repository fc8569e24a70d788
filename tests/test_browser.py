"""Pages in headless Chromium: nothing is wrong on the console, the keyboard reaches every bar, a large model fits two screens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_converters.conversion.dry_run import forecast
from megatron_converters.formats.detect import HF, MEGATRON
from megatron_converters.formats.huggingface.source import HFSource
from megatron_converters.formats.megatron.rank_files_target import MegatronTarget
from megatron_converters.formats.megatron.writing import MegatronOptions
from megatron_converters.inspection.inventory import survey
from megatron_converters.inspection.planned import planned
from megatron_converters.inspection.shard_map.page import conversion_page, page
from megatron_converters.model.spec import ModelSpec
from tests.browser import CHROMIUM, Tab, chromium
from tests.sparse import PUBLISHED, sparse_hf, sparse_megatron, surveyed
from tests.tiny import tiny_spec

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
    pytest.mark.xdist_group("browser"),
]
_BARS = "[...document.querySelectorAll('g.cell')]"
_VISIBLE = f"{_BARS}.filter(bar => bar.checkVisibility({{contentVisibilityAuto: true}}))"
_FOCUS = f"{_BARS}.indexOf(document.activeElement)"


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with chromium() as opened:
        yield opened


def pages(spec: ModelSpec, folder: Path, max_shard_size: int, **sizes: int) -> dict[str, Path]:
    """Pages of a Hugging Face folder, of a checkpoint, and of the conversion from one to the other."""
    folder.mkdir(exist_ok=True)
    hf = sparse_hf(spec, folder / "hf", max_shard_size=max_shard_size)
    source, target = HFSource(hf), MegatronTarget(folder / "planned", MegatronOptions(**sizes))
    before, result = survey(HF, source), forecast(source, target, None)
    texts = {
        "hf": page(before),
        "megatron": page(surveyed(sparse_megatron(spec, folder / "megatron", **sizes))),
        "plan": conversion_page(before, planned(MEGATRON, spec, target, result), result),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return pages(tiny_spec(num_layers=4), tmp_path_factory.mktemp("small"), 2000, tp=2, pp=2)


def open_page(tab: Tab, path: Path) -> None:
    tab.errors.clear()
    tab.open(path)


def reached(tab: Tab) -> list[int]:
    """Numbers of the bars that Tab reaches, from the beginning of the page on."""
    found: list[int] = []
    for _ in range(500):
        tab.press("Tab")
        # After the last one the focus is the browser's, or begins anew.
        again = "document.activeElement === document.body || document.activeElement.dataset.seen"
        if tab.evaluate(f"Boolean({again}) || (document.activeElement.dataset.seen = 1, false)"):
            return found
        found.append(tab.evaluate(_FOCUS))
    raise AssertionError("the focus does not leave the page")


@pytest.mark.parametrize("name", ["hf", "megatron", "plan"])
def test_tab_reaches_every_bar(tab: Tab, small: dict[str, Path], name: str) -> None:
    open_page(tab, small[name])
    visible = tab.evaluate(f"{_VISIBLE}.map(bar => {_BARS}.indexOf(bar))")
    assert visible and [bar for bar in reached(tab) if bar >= 0] == visible
    total = tab.evaluate(f"{_BARS}.length")
    assert len(visible) < total or name == "hf"
    open_page(tab, small[name])
    tab.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    assert [bar for bar in reached(tab) if bar >= 0] == list(range(total))
    assert tab.errors == []


def test_a_bar_says_what_it_holds_to_eyes_and_to_screen_readers(tab: Tab, small: dict[str, Path]) -> None:
    open_page(tab, small["megatron"])
    names = tab.names("image")
    assert any(name.startswith("1st layer, stage 0, 2 ranks alike") for name in names)
    assert len(names) == tab.evaluate(f"{_VISIBLE}.length")
    assert any(name.startswith("Shard map, 4 ranks in 2 groups of equal ones") for name in tab.names("group"))
    tip = "document.getElementById('tip')"
    assert tab.evaluate(f"{tip}.hidden")
    tab.evaluate(f"{_VISIBLE}.at(-1).focus()")
    assert tab.evaluate(f"{tip}.textContent").startswith("output, stage 1, 2 ranks alike\n")
    box = tab.evaluate(
        f"(r => [r.left, r.top, innerWidth - r.right, innerHeight - r.bottom])({tip}.getBoundingClientRect())"
    )
    assert min(box) >= 0, "the text is cut off"
    tab.press("Escape")
    assert tab.evaluate(f"{tip}.hidden")
    assert tab.errors == []


def test_the_keyboard_opens_what_is_folded_and_skips_the_map(tab: Tab, small: dict[str, Path]) -> None:
    open_page(tab, small["megatron"])
    few = tab.evaluate(f"{_VISIBLE}.length")
    tab.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip the map"
    tab.press("Enter")
    tab.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Files"
    tab.evaluate("[...document.querySelectorAll('summary')].find(one => one.textContent.startsWith('Each of')).focus()")
    tab.press("Enter")
    assert tab.evaluate(f"{_VISIBLE}.length") == tab.evaluate(f"{_BARS}.length") > few
    assert tab.errors == []


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return pages(PUBLISHED["Llama-3.1-405B"], tmp_path_factory.mktemp("large"), 4_800_000_000, tp=8, pp=14)


@pytest.mark.parametrize("name", ["hf", "megatron", "plan"])
def test_the_page_of_a_405b_is_not_long(tab: Tab, large: dict[str, Path], name: str) -> None:
    open_page(tab, large[name])
    height, width = tab.evaluate("[document.documentElement.scrollHeight, document.documentElement.scrollWidth]")
    assert height < 1500 and width == 1280
    assert tab.errors == []

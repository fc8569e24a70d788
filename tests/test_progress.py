"""Progress: lines, bar or nothing, right from several threads."""

from __future__ import annotations

import builtins
import io
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from megatron_converters.conversion.progress import Bar, Lines, Silent, make_progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("megatron_converters.conversion.progress.time.monotonic", lambda: self.now)


def test_lines_show_bytes_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = Clock(monkeypatch), io.StringIO()
    lines = Lines(stream)
    lines.start(4 * 10**9)
    lines(10**9)
    assert stream.getvalue() == ""  # nothing for a run of seconds
    clock.now += 10
    lines(10**9)
    assert stream.getvalue() == "copied 2 GB of 4 GB (50 %) at 200 MB/s, 10 s left\n"
    clock.now += 5
    lines(10**9)
    assert stream.getvalue().count("\n") == 1
    clock.now += 5
    lines(10**9)
    lines.stop()
    assert stream.getvalue().splitlines()[1:] == [
        "copied 4 GB at 200 MB/s, 0.0 s left",
        "copied 4 GB in 20 s (200 MB/s)",
    ]


def test_the_log_of_a_day_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = Clock(monkeypatch), io.StringIO()
    lines = Lines(stream)
    lines.start(86400 * 10**6)
    for _ in range(86400):
        clock.now += 1
        lines(10**6)
    assert 100 <= stream.getvalue().count("\n") < 300
    stalled = io.StringIO()
    lines = Lines(stalled)
    lines.start(10**12)
    for _ in range(3600):
        clock.now += 1
        lines(1)
    assert stalled.getvalue().count("\n") == 6  # a sign of life every ten minutes


def test_lines_say_nothing_of_a_run_that_copied_nothing() -> None:
    stream = io.StringIO()
    for begun in (False, True):
        lines = Lines(stream)
        if begun:
            lines.start(0)
        lines.stop()
    assert stream.getvalue() == ""


def test_no_byte_is_lost_between_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    stream = io.StringIO()
    lines = Lines(stream)
    lines.start(8 * 10**9)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lines, [10**6] * 8000))
    lines.stop()
    assert "copied 8 GB in" in stream.getvalue()


def test_the_bar_counts_to_the_total() -> None:
    from tqdm import tqdm

    stream = Terminal()
    bar = Bar(lambda **options: tqdm(file=stream, **options))
    bar.stop()  # a run that failed before it began
    bar.start(2000)
    bar(500)
    bar(1500)
    bar.stop()
    shown = stream.getvalue().split("\r")[-1]
    assert "copying: 100%" in shown
    assert "2.00k/2.00k" in shown
    assert "B/s" in shown


def test_what_fits_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_progress(quiet=True), Silent)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(make_progress(quiet=False), Lines)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(make_progress(quiet=False), Bar)
    assert isinstance(make_progress(quiet=True), Silent)


def test_lines_stand_in_for_a_bar_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_tqdm(name: str, *rest: Any) -> Any:
        if name == "tqdm":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    assert isinstance(make_progress(quiet=False), Lines)


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    silent = Silent()
    silent.start(10)
    silent(10)
    silent.stop()
    assert capsys.readouterr() == ("", "")

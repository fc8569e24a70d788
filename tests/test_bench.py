"""The benchmark of scripts/bench: its rows can be run, pairs alternate, memory is seen, and the peer by hand is a fair one."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_converters.cli import main
from tests.conversions import hf_to_megatron
from tests.helpers import RANK_FILE, ROOT
from tests.oracle.hf import make_model


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of scripts/bench, as its scripts do."""
    monkeypatch.syspath_prepend(ROOT / "scripts/bench")
    return importlib.import_module


@pytest.mark.parametrize("name", ["rows", "tools"])
def test_rows_name_inputs_and_options_that_there_are(script: Any, name: str) -> None:
    table, inputs = script(name), script("inputs")
    paths = {name: Path("x") for name in (inputs.HF, "output", *inputs.INPUTS)}
    commands = list(inputs.INPUTS.values())
    for row in table.ROWS:
        assert row.section in table.TITLES
        commands += [row.run.command, *([row.partner.command] if row.partner else [])]
    assert len({row.name for row in table.ROWS} | set(table.TITLES)) == len(table.ROWS) + len(table.TITLES)
    verbs = 0
    for command in commands:
        words = inputs.words(command, paths)
        if words[:3] == [sys.executable, "-m", "megatron_converters"] and words[3] != "--help":
            main.parser_of(words[3:4]).parse_args(words[3:])
            verbs += 1
    assert verbs > len(inputs.INPUTS)


def test_pairs_alternate_and_the_first_is_not_counted(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, inputs = script("pairs"), script("inputs")
    monkeypatch.setattr(pairs, "settle", lambda *_: None)
    disk, source = inputs.Disk(tmp_path / "disk", quick=True), tmp_path / "source"
    source.mkdir()
    run, partner = (pairs.Run(name, f"sh -c 'echo {name} >> {{hf}}/log; touch {{output}}'") for name in ("run", "its"))
    row = pairs.Row("name", "section", inputs.Model("model", "", ""), run, partner)
    measured, label = pairs.run_row(row, disk, {"hf": source}, pairs.Settings(3, True, 0))
    assert (source / "log").read_text().split() == [*("run", "its", "its", "run"), *("run", "its", "its", "run")]
    assert len(measured) == 3 and label == "its"
    assert list(disk.folder.iterdir()) == [disk.log]


def test_the_partner_by_default_copies_what_was_written(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, inputs = script("pairs"), script("inputs")
    copied = []
    monkeypatch.setattr(pairs, "settle", lambda *_: None)
    monkeypatch.setattr(pairs, "measure", lambda command: copied.append(command) or pairs.Measured(2, 1, 0, 0))
    disk = inputs.Disk(tmp_path / "disk", quick=True)
    row = pairs.Row("name", "section", inputs.Model("model", "", ""), pairs.Run("a label", "program {output}"))
    measured, label = pairs.run_row(row, disk, {}, pairs.Settings(2, False, 0))
    output, copy = f"{disk.output}", f"{disk.beside}/made"
    flushed = ["sh", "-c", f"cp -r {output} {copy} && sync -f {copy}"]
    assert copied == [["program", f"{output}/made"], flushed, flushed, ["program", f"{output}/made"]]
    pairs.print_row("a label", label, measured)
    shown = "2.00 (2.00-2.00) | 1.00 (1.00-1.00)"
    assert capsys.readouterr().out == (
        f"| a label | {shown} | 0 (0-0) | cp of 0.00 GB in 0 files, flushed | {shown} | 1.00 (1.00-1.00) | 1.00 (1.00-1.00) |\n"
    )


def test_memory_of_all_processes_is_seen(script: Any) -> None:
    grown = "import time; grown = bytearray(b'x') * (64 << 20); time.sleep(0.2)"
    both = f"import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', {grown!r}]); {grown}"
    seen = script("measuring").measure([sys.executable, "-S", "-c", both])
    assert 128 <= seen.anonymous < 200 and seen.anonymous < seen.total
    assert seen.wall > 0.2 and seen.cpu > 0


def test_inputs_are_made_of_others_and_removed(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = script("inputs")
    monkeypatch.setattr(inputs, "PROGRAMS", {"make_model": ("cp", "-t"), "join": ("cp", "-r")})
    monkeypatch.setattr(inputs, "INPUTS", {"one": "join {hf} {output}", "two": "join {one} {output}"})
    monkeypatch.setattr(inputs, "run_unmeasured", lambda words: (tmp_path / "disk/output").mkdir())
    disk = inputs.Disk(tmp_path / "disk", quick=True)
    first, second = (inputs.Model(name, "", "") for name in ("first", "second"))

    def left() -> set[str]:
        return {str(path.relative_to(disk.folder)) for path in disk.folder.glob("*/*")}

    disk.prepare(first, ["one"], [first, second])
    assert left() == {"first/one"}
    disk.prepare(first, ["hf", "two"], [first, second])
    assert left() == {"first/hf", "first/two"}
    disk.prepare(second, ["hf"], [first, second])
    assert left() == {"second/hf"}


def test_a_folder_with_other_files_is_refused(script: Any, tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    with pytest.raises(SystemExit, match="name a new folder"):
        script("inputs").Disk(tmp_path, quick=True)
    assert (tmp_path / "output").exists()


def test_by_hand_has_the_same_tensors(script: Any, tmp_path: Path) -> None:
    by_hand = script("peer_by_hand")
    folder = make_model("llama2", tmp_path / "hf", dtype="bfloat16", vocab_size=200)
    ours = hf_to_megatron(folder, tmp_path / "ours", tp=2, pp=2, divisor=1)
    by_hand.convert(folder, tmp_path / "by_hand")
    assert by_hand.compare(tmp_path / "by_hand", ours) > 40
    (first, *_) = sorted((tmp_path / "by_hand").rglob(RANK_FILE))
    state = torch.load(first)
    state["model"]["decoder.layers.1.mlp.linear_fc2.weight"][0, 0] += 1
    torch.save(state, first)
    with pytest.raises(SystemExit, match=r"differ on mp_rank_00_000 in decoder\.layers\.1\.mlp\.linear_fc2\.weight$"):
        by_hand.compare(tmp_path / "by_hand", ours)

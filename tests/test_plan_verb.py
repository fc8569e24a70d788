"""`plan` says exactly what `convert` writes, and answers in seconds for models of hundreds of gigabytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megatron_converters as mc
from megatron_converters.basics.errors import ConversionError
from megatron_converters.cli.verbs import plan as plan_verb
from megatron_converters.conversion import estimate
from megatron_converters.conversion.dry_run import FilePlan
from megatron_converters.conversion.staging import Staging, check_place
from tests.helpers import ROOT, refused, succeeded, verb
from tests.sparse import PUBLISHED, sparse_hf
from tests.test_resume import FULL, site

HFModel = Callable[..., Path]


def plan(*options: Any) -> dict[str, Any]:
    """The JSON of a plan that can be carried out."""
    run = verb("plan", *options, "--json", "--no-measure")
    assert not run.err, run
    result: dict[str, Any] = json.loads(run.out)
    return result


@pytest.mark.parametrize("options", [("--tp", "2", "--pp", "2"), ("--to", "hf", "--max-shard-size", "100KB")])
@pytest.mark.parametrize("family", ["llama3.2-tied", "mixtral"])
def test_the_plan_is_what_is_written(family: str, options: tuple[str, ...], hf_model: HFModel, tmp_path: Path) -> None:
    source, out = hf_model(family), tmp_path / "out"
    before = sorted(tmp_path.rglob("*"))
    planned = plan(source, out, *options)
    assert sorted(tmp_path.rglob("*")) == before
    succeeded(verb("convert", source, out, *options, "--quiet"))
    written = {
        str(path.relative_to(out)).removeprefix("iter_0000001/"): path.stat().st_size
        for path in out.rglob("*")
        if path.suffix in (".pt", ".safetensors")
    }
    assert {file: entry["nbytes"] for file, entry in planned["files"].items()} == written
    manifest = json.loads(next(out.rglob("conversion.json")).read_text())
    tensors = [tensor for entry in manifest["files"].values() for tensor in entry["tensors"].values()]
    assert planned["target_tensors"] == len(tensors)
    assert planned["padding_rows"] == sum(tensor.get("padding rows", 0) for tensor in tensors)
    sources = {where for tensor in tensors for where in tensor["from"]}
    assert planned["source_tensors"] == len(sources)


@pytest.mark.parametrize("options", [("--tp", "4", "--etp", "1"), ("--tp", "2", "--ep", "2", "--pp", "2")])
def test_what_several_ranks_hold_is_counted(options: tuple[str, ...], hf_model: HFModel, tmp_path: Path) -> None:
    source, out = hf_model("mixtral", vocab_size=256), tmp_path / "out"  # copies of padding are none of the model
    planned = plan(source, out, *options)
    assert f"{planned['copies']:,} bytes of tensors (" in verb("plan", source, out, *options, "--no-measure").out
    succeeded(verb("convert", source, out, *options, "--quiet"))
    found = json.loads(verb("inspect", out, "--json").out)
    assert planned["copies"] == found["weights"]["copied_bytes"] > 0
    assert plan(out, tmp_path / "back", "--to", "hf")["copies"] == 0


def test_the_words_of_a_plan(hf_model: HFModel, tmp_path: Path) -> None:
    run = succeeded(verb("plan", hf_model("llama2"), tmp_path / "out", "--tp", "2", "--dtype", "bf16"))
    for words in (
        "mp_rank_01/model_optim_rng.pt",
        "are cast from float32 to bfloat16",
        "rows of vocabulary padding",
        "GB free: enough",
        "memory  about",
        "an estimate: a short sample, flushed to this disk, took ",
    ):
        assert words in run.out
    assert not (tmp_path / "out").exists()


def test_files_that_differ_in_nothing_but_their_names_have_one_row(hf_model: HFModel, tmp_path: Path) -> None:
    command = ("plan", hf_model("llama2"), tmp_path / "out", "--tp", "4", "--pp", "2", "--no-measure")
    rows = succeeded(verb(*command)).out.split("\n\n")[1].splitlines()
    assert rows[0].split() == ["file", "tensors", "bytes", "each", "padding", "rows"]
    names = [row.partition("  ")[0] for row in rows[1:]]
    assert names[0] == "mp_rank_00_000/model_optim_rng.pt"  # without padding
    assert [name.partition("/")[0] for name in names if name.endswith(" and 1 alike")] == [
        "mp_rank_02_000",
        "mp_rank_02_001",
    ]
    assert len(names) == 6
    listed = json.loads(verb(*command, "--json").out)["files"]
    assert len(listed) == 8


def test_many_kinds_of_files_are_counted() -> None:
    rows = list(plan_verb._table({str(number): FilePlan(1, number, number) for number in range(64)}))
    assert len(rows) == 34 and rows[-1] == "… and 32 more files (--json lists all)"
    assert [row.split()[0] for row in rows[1:4]] == ["0", "1", "2"]


class SlowDisk:
    """A disk that takes its time, and seconds that pass when it says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bytes_per_second: float) -> None:
        self.now, self._waiting, self._rate = 0.0, 0, bytes_per_second
        self.flushed: list[int] = []
        real = os.pwrite

        def pwrite(fd: int, data: bytes, at: int) -> int:
            self._waiting += len(data)
            return real(fd, data, at)

        monkeypatch.setattr(os, "pwrite", pwrite)
        monkeypatch.setattr(os, "fsync", self._fsync)
        monkeypatch.setattr(estimate.time, "monotonic", lambda: self.now)

    def _fsync(self, fd: int) -> None:
        self.now += self._waiting / self._rate
        self.flushed.append(self._waiting)
        self._waiting = 0


@pytest.mark.parametrize("megabytes", [10, 300, 2000])
def test_the_time_is_that_of_the_disk(megabytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the system's memory; a slow disk is asked for little."""
    source = sparse_hf(PUBLISHED["Llama-3.2-1B"], tmp_path / "hf")
    disk = SlowDisk(monkeypatch, megabytes * 1e6)
    planned = mc.plan(source, tmp_path / "out", tp=2, measured=True)
    assert planned.seconds_least is not None and planned.seconds_most is not None
    assert (planned.rate_least, planned.rate_most) == pytest.approx((megabytes * 1e6,) * 2, rel=0.01)
    assert planned.seconds_least <= 0.4 + planned.left / (megabytes * 1e6) * 1.01 < planned.seconds_most
    assert disk.now <= 0.45 and disk.flushed[0] >= 4 << 20
    assert len(disk.flushed) == {10: 1, 300: 4, 2000: 6}[megabytes]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_disk_that_is_nearly_full_is_not_measured(
    hf_model: HFModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_converters.conversion.dry_run.free_space", lambda _: 100 << 20)
    planned = mc.plan(hf_model("llama2"), tmp_path / "out", tp=2, measured=True)
    assert (planned.rate_most, planned.seconds_most) == (None, None)


def test_what_is_in_the_way_is_said(hf_model: HFModel, tmp_path: Path) -> None:
    source, out = hf_model("llama2"), tmp_path / "out"
    succeeded(verb("convert", source, out, "--tp", "2", "--quiet"))
    run = verb("plan", source, out, "--tp", "1", "--no-measure")
    assert run.code == 1
    assert "already exists" in run.out
    refused(verb("plan", source, out, "--tp", "3"), "cannot be cut over tp=3")
    refused(verb("plan", tmp_path, out), "is no model itself; it holds a checkpoint in out; give ", code=2)
    for name in ("plan", "convert"):
        refused(verb(name, source, source.parent / "." / source.name, "--tp", "2"), "is the source itself", code=2)
        inside = (out / "iter_0000001", out, "--tp", "1", "--overwrite")
        refused(verb(name, *inside), "lies in", "where --overwrite could replace it", code=2)


@pytest.mark.parametrize("name", ["file", "file/below", "link"])
def test_a_place_that_cannot_be_written_is_said_by_both(hf_model: HFModel, name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    run = verb("plan", hf_model("llama2"), tmp_path / name, "--tp", "2", "--no-measure")
    assert run.code == 1
    reason = next(line for line in run.out.splitlines() if line.startswith("obstacle: "))
    refused(verb("convert", hf_model("llama2"), tmp_path / name, "--tp", "2"), reason.removeprefix("obstacle: "))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_that_this_user_may_not_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConversionError, match=f"this user cannot write to {tmp_path}; save elsewhere"):
        check_place(tmp_path / "below")


def test_what_an_earlier_run_has_left_is_planned_with(hf_model: HFModel, tmp_path: Path) -> None:
    """Its finished files need no room; another conversion's are in the way."""
    source, out, options = hf_model("llama2"), tmp_path / "out", ("--tp", "2", "--pp", "2")
    whole = plan(source, out, *options)
    assert (whole["left"], whole["finished"], whole["complete"]) == (whole["nbytes"], [], False)
    env = site(tmp_path / "site", FULL, BYTES_LEFT=whole["nbytes"] * 3 // 4)
    refused(verb("convert", source, out, *options, env=env), "are finished and kept")
    rest = plan(source, out, *options)
    assert rest["finished"]
    assert rest["left"] == sum(file["nbytes"] for name, file in rest["files"].items() if name not in rest["finished"])
    words = succeeded(verb("plan", source, out, *options, "--no-measure")).out
    assert f"has finished {len(rest['finished'])} of 4 files" in words
    run = verb("plan", source, out, "--tp", "4", "--no-measure")
    assert run.code == 1
    assert "obstacle: " in run.out and "of another run, which differs in" in run.out
    succeeded(verb("convert", source, out, *options, "--quiet"))
    done = plan(source, out, *options)
    assert (done["left"], done["complete"], done["obstacle"]) == (0, True, None)
    assert "is complete already" in succeeded(verb("plan", source, out, *options)).out


def test_a_conversion_that_is_going_on_is_seen(hf_model: HFModel, tmp_path: Path) -> None:
    source, out = hf_model("llama2"), tmp_path / "out"
    staging = Staging(out, "iter_0000001")
    staging.open()
    for name in ("plan", "convert"):
        run = verb(name, source, out, "--tp", "2")
        assert run.code == 1
        assert "another conversion is writing to" in run.out + run.err
    staging.leave()
    plan(source, out, "--tp", "2")


LARGE = {
    "Llama-3.1-405B": (("--tp", 8, "--pp", 16, "--decoder-last-pipeline-num-layers", 6), 812),
    "Mixtral-8x22B": (("--tp", 8, "--pp", 8, "--ep", 8, "--etp", 1), 282),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_models_are_planned_in_seconds(name: str, tmp_path: Path) -> None:
    options, gigabytes = LARGE[name]
    source = sparse_hf(PUBLISHED[name], tmp_path / "hf")
    begun = time.monotonic()
    planned = plan(source, tmp_path / "out", *options)
    assert time.monotonic() - begun < 20
    assert planned["nbytes"] / 1e9 == pytest.approx(gigabytes, rel=0.02)
    assert planned["memory"] < 200e6


SHARE = """
import os, resource, sys
from pathlib import Path
limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from megatron_converters.conversion import staging
from megatron_converters.conversion.run import convert
from megatron_converters.conversion.crew import Alone
from megatron_converters.formats.huggingface.source import HFSource
from megatron_converters.formats.megatron.writing import MegatronOptions
from megatron_converters.formats.megatron.rank_files_target import MegatronTarget
from megatron_converters.conversion.progress import Silent

staging.check_space.__globals__["free_space"] = lambda folder: 10**15

class Crew(Alone):
    rank, size = 0, 8 * 126
    def exchange(self, report):
        return [report] * self.size

convert(HFSource(Path(sys.argv[1])), MegatronTarget(Path(sys.argv[2]), MegatronOptions(tp=8, pp=126)), None, Silent(), crew=Crew())
"""


def test_a_share_of_405b_needs_little_memory(tmp_path: Path) -> None:
    """One of 1008 workers fills the largest file, 1.3 GB; then it finds the others' files missing, which nobody fills here."""
    if os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize < 5e9:
        pytest.skip("needs 5 GB of disk")
    source = sparse_hf(PUBLISHED["Llama-3.1-405B"], tmp_path / "hf")
    command = [sys.executable, "-c", SHARE, source, tmp_path / "out", 200 << 20]
    run = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "should be finished and are not" in run.stderr, run.stderr[-2000:]
    missing = run.stderr.rpartition("ConversionError")[2]
    assert "mp_rank_00_125/" not in missing and "mp_rank_01_125/" in missing  # the last stage has the output layer too

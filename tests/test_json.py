"""`--json` of every verb: what it prints is what docs/json.md documents, no field more and none less, also of errors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import megatron_converters.cli.main as cli
from megatron_converters.basics.json_values import finite
from megatron_converters.logits.compare import LogitsReport
from megatron_converters.model.rotary import RopeScaling
from megatron_converters.model.spec import PROPERTIES, PerLayer
from tests.helpers import RANK_FILE, Run, rank_content, succeeded, verb
from tests.json_reports import KEYWORDS, OBJECTS, REPORTS, Check, Field, documented_fields, fields_of
from tests.plain_llama import cast, weights, write_llama
from tests.tiny import KINDS, tiny_spec

VERBS = ("convert", "plan", "verify", "diff", "inspect", "args", "families")
NORM, HEAD = "model.norm.weight", "lm_head.weight"


def printed(*options: Any, code: int = 0) -> dict[str, Any]:
    """The one object that a verb prints."""
    run = verb(*options, "--json")
    assert run.code == code and "Traceback" not in run.err, run
    value: dict[str, Any] = json.loads(run.out, parse_constant=pytest.fail)
    return value


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models and checkpoints that differ in all ways that a report can tell, and a damaged output."""
    root = tmp_path_factory.mktemp("json")
    tensors = weights()
    places = {"hf": write_llama(root / "hf", tensors), "half": write_llama(root / "half", cast(tensors, torch.half))}
    odd = {**tensors, NORM: tensors[NORM].clone(), HEAD: tensors[HEAD].clone()}
    odd[NORM][2], odd[HEAD][1, 1] = math.nan, 2.5
    places["odd"] = write_llama(root / "odd", odd)
    for name, source, options in (("meg", "hf", ("--tp", "2", "--pp", "2")), ("other", "odd", ("--tp", "1"))):
        places[name] = root / name
        succeeded(verb("convert", places[source], places[name], *options, "--quiet"))
    places["damaged"] = root / "damaged"
    succeeded(verb("convert", places["meg"], places["damaged"], "--to", "hf", "--quiet"))
    written = load_file(places["damaged"] / "model.safetensors")
    save_file({**written, NORM: written[NORM] + 1}, places["damaged"] / "model.safetensors", {"format": "pt"})
    return places


def reports(places: dict[str, Path], out: Path) -> list[tuple[str, dict[str, Any]]]:
    """Real reports of every verb that reads or writes files, with the names of their objects in the schema."""
    hf, half, odd, meg, other, damaged = (places[name] for name in ("hf", "half", "odd", "meg", "other", "damaged"))
    return [
        ("convert", printed("convert", hf, out / "meg", "--tp", "2")),
        ("convert", printed("convert", hf, out / "meg", "--tp", "2")),  # complete already
        ("convert", printed("convert", meg, out / "hf", "--dtype", "bf16")),
        ("plan", printed("plan", hf, out / "plan", "--tp", "2", "--dtype", "bf16")),  # with a measured rate
        ("plan", printed("plan", hf, meg, "--tp", "1", "--no-measure", code=1)),
        ("verify", printed("verify", hf, meg)),
        ("verify", printed("verify", hf, half, "--as-cast")),
        ("verify", printed("verify", hf, odd, code=1)),
        ("verify_output", printed("verify", meg)),
        ("verify_output", printed("verify", damaged, code=1)),
        ("diff", printed("diff", hf, odd, code=1)),
        ("diff", printed("diff", meg, other, code=1)),
        ("inspect", printed("inspect", hf)),
        ("inspect", printed("inspect", meg)),
        ("args", printed("args", meg)),
        ("families", printed("families")),
        ("error", printed("verify", hf, "--as-cast", code=2)),
    ]


def test_every_field_is_documented_and_every_documented_field_comes(places: dict[str, Path], tmp_path: Path) -> None:
    seen: set[Field] = set()
    for name, report in reports(places, tmp_path):
        seen |= fields_of(report, name)
    own = ("model", "per_layer", "rope_scaling", "scaling", "verify_logits")  # which have tests of their own
    left = {field for field in documented_fields() - seen if field[0] not in own}
    assert left == set()


def test_the_report_of_logits(monkeypatch: pytest.MonkeyPatch, places: dict[str, Path]) -> None:
    """As the verb prints it; tests of `verify` compute one."""
    report = LogitsReport(0.5, (0, 1, 2), (1.0, 1.5), 2.0, 0.75, 32, 1e-4, ("a note",))
    monkeypatch.setattr("megatron_converters.logits.compare_logits", lambda *_, **__: report)
    found = fields_of(printed("verify", places["hf"], places["hf"], "--logits", code=1), "verify_logits")
    assert found == {field for field in documented_fields() if field[0] == "verify_logits"}


def test_every_property_of_a_model_is_documented() -> None:
    scaling = RopeScaling("longrope", 4.0, short_factor=(1.0,), long_factor=(2.0,))
    specs = [
        *KINDS.values(),
        tiny_spec(rope_scaling=scaling),
        tiny_spec(sliding_window=PerLayer([None, 3]), rope_scaling=PerLayer([None, scaling])),
    ]
    seen: set[Field] = set()
    for spec in specs:
        seen |= fields_of(json.loads(json.dumps(finite(spec.to_dict()))), "model")
    assert {field for name, field in seen if name == "model"} == OBJECTS["model"]["properties"].keys() == PROPERTIES
    assert {field for name, field in seen if name == "scaling"} == OBJECTS["scaling"]["properties"].keys()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda report: report.update(new=1), "plan.new is not documented"),
        (lambda report: report.pop("free"), "plan lacks free"),
        (lambda report: report.update(free=True), "plan.free: True is no integer"),
        (lambda report: report.update(files={"a": {}}), "plan.files.a lacks tensors"),
        (lambda report: report.update(obstacle=3), "plan.obstacle: 3 is no ['string', 'null']"),
    ],
)
def test_the_check_sees_what_is_wrong(change: Callable[[dict[str, Any]], Any], fault: str) -> None:
    report: dict[str, Any] = dict.fromkeys(OBJECTS["plan"]["properties"])
    report |= {"obstacle": None, "rate_least": 0.5}
    change(report)
    check = Check()
    check.value(report, {"$ref": "#/$defs/plan"}, "plan")
    assert fault in check.faults


def test_the_schema_is_plain_and_complete() -> None:
    assert set(REPORTS) == {*VERBS, "verify_output", "verify_logits", "error"}
    for name, one in OBJECTS.items():
        assert one.keys() <= KEYWORDS
        if "properties" in one:
            assert one["additionalProperties"] is False, name
            assert set(one["required"]) <= one["properties"].keys(), name
            assert all(field["description"].endswith((".", "?")) for field in one["properties"].values()), name
    titles = [one["title"] for one in OBJECTS.values() if "title" in one]
    assert len(set(titles)) == len(titles)  # the page links to them


# --- convert


def test_a_conversion_tells_what_it_wrote(places: dict[str, Path], tmp_path: Path) -> None:
    run = succeeded(verb("convert", places["hf"], tmp_path / "out", "--tp", "2", "--dtype", "bf16", "--json"))
    report = json.loads(run.out)
    out = tmp_path / "out" / "iter_0000001"
    assert report["result"] == str(out) and report["manifest"] == str(out / "conversion.json")
    files = {path.relative_to(out).as_posix(): path.stat().st_size for path in out.rglob("*.pt")}
    assert {file["file"]: file["bytes"] for file in report["files"]} == files
    assert report["bytes"] == sum(files.values())
    model = rank_content(tmp_path / "out", "mp_rank_01")["model"]
    tensors = {name for name, value in model.items() if isinstance(value, torch.Tensor)}
    assert report["files"][1] == {
        "file": f"mp_rank_01/{RANK_FILE}",
        "bytes": files[f"mp_rank_01/{RANK_FILE}"],
        "tensors": len(tensors),
    }
    assert 0 < report["seconds"] < 60
    assert report["source"] == {"path": str(places["hf"]), "format": "hf", "family": "llama"}
    flags = report["flags"]
    assert flags[flags.index("--tensor-model-parallel-size") + 1] == "2"
    assert any(note.startswith("wrote 30 tensors") for note in report["notes"]), report["notes"]
    assert "pretrain_gpt.py needs" not in run.out
    for words in ("reading ", "writing ", "wrote 30 tensors", "copied ", "pretrain_gpt.py needs"):
        assert words in run.err


def test_warnings_are_apart_from_notes(places: dict[str, Path], tmp_path: Path) -> None:
    """A model whose scaling Megatron-LM computes otherwise, which has to be allowed."""
    constants = {"low_freq_factor": 2.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    scaling = {"rope_type": "llama3", "factor": 8.0, **constants}
    source = write_llama(tmp_path / "hf", weights(), rope_scaling=scaling)
    refused = printed("convert", source, tmp_path / "out", code=1)
    assert refused["error"]["kind"] == "failed"
    run = succeeded(verb("convert", source, tmp_path / "out", "--allow-inexpressible", "--json"))
    report = json.loads(run.out)
    assert report["warnings"] and not any(line.startswith("warning") for line in report["warnings"])
    assert all(f"warning: {line}" in run.err for line in report["warnings"])
    assert not any(line.startswith("warning") for line in report["notes"])


def test_several_processes_print_one_object(places: dict[str, Path], tmp_path: Path) -> None:
    run = succeeded(verb("convert", places["hf"], tmp_path / "out", "--tp", "2", "--workers", "2", "--json"))
    report = json.loads(run.out)
    fields_of(report, "convert")
    assert len(report["files"]) == 2


@pytest.mark.parametrize(("rank", "prints"), [("0", True), ("1", False)])
def test_of_several_processes_the_first_prints_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: str, prints: bool
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = verb("convert", tmp_path / "nowhere", tmp_path / "out", "--json")
    assert (run.code, bool(run.out)) == (2, prints)
    assert "error: " in run.err


# --- errors


ERRORS: dict[str, tuple[tuple[str, ...], int, str, str]] = {
    "an option that there is not": (("inspect", "x", "--no-such"), 2, "usage", "--no-such"),
    "an operand that is missing": (("diff", "x"), 2, "usage", "required"),
    "a verb that there is not": (("verfy",), 2, "usage", "verfy"),
    "a folder that is missing": (("args", "/no/such"), 2, "usage", "/no/such does not exist"),
    "a folder that cannot be compared": (("verify", "{broken}", "{hf}"), 2, "failed", "model.safetensors"),
    "the same that cannot be read": (("inspect", "{broken}"), 1, "failed", "model.safetensors"),
    "a plan that is not sound": (("plan", "{hf}", "{hf}"), 2, "usage", "is the source itself"),
}


@pytest.mark.parametrize(("options", "code", "kind", "words"), ERRORS.values(), ids=ERRORS)
def test_an_error_is_an_object(
    options: tuple[str, ...], code: int, kind: str, words: str, places: dict[str, Path], tmp_path: Path
) -> None:
    broken = write_llama(tmp_path / "broken", weights())
    (broken / "model.safetensors").write_bytes(b"\xff" * 100)
    named = [option.format(broken=broken, hf=places["hf"]) for option in options]
    report = printed(*named, code=code)
    fields_of(report, "error")
    error = report["error"]
    assert (error["kind"], error["exit_code"]) == (kind, code)
    assert words in error["message"].lower()
    silent: Run = verb(*named)
    assert (silent.code, silent.out) == (code, "") and error["message"] in silent.err


@pytest.mark.parametrize(
    ("error", "kind", "codes"),
    [(KeyboardInterrupt(), "interrupted", (130, 130)), (RuntimeError("a mistake"), "fault", (1, 2))],
)
@pytest.mark.parametrize("name", VERBS)
def test_what_interrupts_a_verb_is_an_object(
    name: str,
    error: BaseException,
    kind: str,
    codes: tuple[int, int],
    places: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: Any) -> int:
        raise error

    monkeypatch.setattr(cli._module(name), "run", fail)
    folders = {"inspect": 1, "args": 1, "families": 0}.get(name, 2)
    run = verb(name, *[places["hf"]] * folders, "--json")
    report = json.loads(run.out)
    fields_of(report, "error")
    code = codes[name in ("verify", "diff")]
    assert (run.code, report["error"]["exit_code"], report["error"]["kind"]) == (code, code, kind)
    assert ("RuntimeError: a mistake" in run.err) == (kind == "fault")

"""Exit codes of every verb and script: each code of its row of the table is reached, and its help prints the row."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megatron_converters.cli.main as verbs
import model_converter_tool.cli.main as tool
from megatron_converters.basics.errors import ConversionError, Interrupted, UsageError
from megatron_converters.basics.exit_codes import ANY, DONE, EXIT_CODES, FAILED, INTERRUPTED, USAGE, ExitCodes
from megatron_converters.cli import mlm_to_hf, queue_convert, tensor_parallel
from tests.helpers import Run, convert, run_here, succeeded, verb
from tests.plain_llama import GROUPS, HEADS, LAYERS, weights, write_llama

Command = Callable[[list[str]], None]
_BY_NUMBERS = f"--tp_size 1 --pp_size 1 --num_layer {LAYERS} --num_query_heads {HEADS} --num_kv_heads {GROUPS}"
#: Scripts by their row of the table.
SCRIPTS: dict[str, Command] = {
    "convert_mlm_to_hf_checkpoint.py": mlm_to_hf.main,
    "python -m megatron_converters.tp_pp_converter": tensor_parallel.main,
    "ckpt_to_hf_minicpm_with_tp_pp.py": tensor_parallel.main_direct,
}
#: By row of the table: command lines, and the code that each ends with. Words in braces are folders of `places`.
CASES: dict[str, list[tuple[str, int]]] = {
    "convert": [("{hf} {out}", 0), ("{broken} {out}", 1), ("{other} {full}", 1), ("{hf} {hf}", 2), ("{gone} {out}", 2)],
    "plan": [("{hf} {out}", 0), ("{broken} {out}", 1), ("{other} {full}", 1), ("{hf} {hf}", 2), ("{gone} {out}", 2)],
    "verify": [
        ("{hf} {meg}", 0),
        ("{hf} {other}", 1),
        ("{hf} {wide}", 1),
        ("{hf} {broken}", 2),
        ("{hf} {gone}", 2),
        ("{hf} {empty}", 2),
        ("{hf} {meg} --limit x", 2),
        ("{hf} {other} --logits --family-file {gone}", 2),
        ("{meg}", 0),
        ("{damaged}", 1),
        ("{hf}", 2),
        ("{gone}", 2),
    ],
    "diff": [("{hf} {meg}", 0), ("{hf} {other}", 1), ("{hf} {broken}", 2), ("{gone} {hf}", 2), ("{hf}", 2)],
    "inspect": [("{hf}", 0), ("{meg} --json", 0), ("{broken}", 1), ("{gone}", 2)],
    "args": [("{hf}", 0), ("{meg} --json", 0), ("{broken}", 1), ("{gone}", 2)],
    "families": [("", 0), ("--json", 0), ("--family-file {broken}/config.json", 1), ("--no-such", 2)],
    "completion": [("bash", 0), ("zsh", 0), ("none", 2)],
    "help": [("", 0), ("convert", 0), ("none", 2)],
    "convert.py": [
        ("--load-dir {hf} --save-dir {out}", 0),
        ("--load-dir {broken} --save-dir {out}", 1),
        ("--load-dir {hf} --save-dir {out} --loader none", 2),
    ],
    "convert_mlm_to_hf_checkpoint.py": [
        ("--load-path {meg} --save-path {out}", 0),
        ("--load-path {meg} --save-path {hf}", 1),
        ("--load-path {gone} --save-path {out}", 2),
    ],
    "python -m megatron_converters.tp_pp_converter": [
        ("--in_dir {meg} --save_path {out}/w.pt", 0),
        ("--in_dir {empty} --save_path {out}/w.pt", 1),
        ("--in_dir {gone} --save_path {out}/w.pt", 2),
    ],
    "ckpt_to_hf_minicpm_with_tp_pp.py": [
        (f"--in_dir {{bare}} --save_path {{out}}/w.pt {_BY_NUMBERS}", 0),
        ("--in_dir {empty} --save_path {out}/w.pt", 1),
        ("--in_dir {gone} --save_path {out}/w.pt", 2),
    ],
    "modelconvert": [("config show", 0), ("config get none", 2), ("", 2), ("--no-such", 2)],
    "modelconvert convert": [
        ("{hf} hf2megatron -o {out}", 0),
        ("{broken} hf2megatron -o {out}", 1),
        ("{hf} nonsense -o {out}", 2),
    ],
    "modelconvert batch": [("{twice}", 2)],
    "modelconvert inspect": [("{hf}", 0), ("{broken}", 1), ("{hf} --no-such", 2)],
    "modelconvert check": [("{hf}", 0), ("{damaged}", 1), ("{broken}", 1), ("{hf} --no-such", 2)],
    "modelconvert history": [("", 0), ("--no-such", 2)],
    "modelconvert config": [("show", 0), ("get none", 2), ("get", 2)],
}


def run(row: str, *options: Any) -> Run:
    """Run the command of a row of the table in this process; convert.py, which starts others, in a forked one."""
    if row == "convert.py":
        return convert(*options)
    if row in SCRIPTS:
        return run_here(SCRIPTS[row], options)
    program, _, command = row.rpartition(" ")
    if program or row == "modelconvert":
        return run_here(tool.main, (*([command] if program else []), *options))
    return verb(row, *options)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that the cases name."""
    root = tmp_path_factory.mktemp("codes")
    names = ("hf", "other", "broken", "wide", "meg", "damaged", "empty", "gone", "bare", "full")
    places = {name: root / name for name in names}
    write_llama(places["hf"], weights())
    write_llama(places["other"], weights(1))
    write_llama(places["wide"], {name: tensor.double() for name, tensor in weights().items()})
    write_llama(places["broken"], weights())
    (places["broken"] / "model.safetensors").write_bytes(b"\xff" * 100)
    places["empty"].mkdir()
    succeeded(verb("convert", places["hf"], places["meg"], "--quiet"))
    for copy in ("damaged", "full"):
        shutil.copytree(places["meg"], places[copy])
    shutil.copytree(places["meg"] / "iter_0000001", places["bare"])
    path = next(places["damaged"].rglob("*.pt"))
    content = bytearray(path.read_bytes())
    content[-2000] ^= 1
    path.write_bytes(content)
    return places


@pytest.fixture
def named(places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The same, a folder to write to, and a batch that is not sound."""
    monkeypatch.setenv("MODELCONVERT_HOME", str(tmp_path / "workspace"))
    monkeypatch.chdir(tmp_path)
    found = {**places, "out": tmp_path / "out"}
    good = {"model_path": str(places["hf"]), "output_format": "hf2megatron", "output_path": str(tmp_path / "good")}
    found["twice"] = tmp_path / "twice.json"
    found["twice"].write_text(json.dumps({"tasks": [good, good]}))
    return found


@pytest.mark.parametrize(
    ("row", "options", "code"),
    [(row, options, code) for row, cases in CASES.items() for options, code in cases],
    ids=lambda value: str(value)[:60],
)
def test_each_code_is_reached(row: str, options: str, code: int, named: dict[str, Path]) -> None:
    done = run(row, *options.format(**named).split())
    assert done.code == code, done
    assert "Traceback" not in done.err
    assert done.out or done.err or not code  # says why


def test_the_table_is_complete_and_so_are_these_tests() -> None:
    commands = {f"modelconvert {command}" for command in tool.COMMANDS} | {"modelconvert"}
    assert set(EXIT_CODES) == {*verbs.VERBS, *SCRIPTS, "convert.py", *commands} == set(CASES)
    for row, cases in CASES.items():
        reached = {code for _, code in cases}
        assert reached | _OTHERS.get(row, set()) == {DONE, FAILED, USAGE}, row


#: Codes that are not reached here: of a batch in tests/test_modelconvert_batch.py, of others only where a disk fails.
_OTHERS = {
    "modelconvert batch": {DONE, FAILED},
    **{row: {FAILED} for row in ("completion", "help", "modelconvert", "modelconvert history", "modelconvert config")},
}


@pytest.mark.parametrize("row", EXIT_CODES)
def test_help_prints_the_row(row: str) -> None:
    shown = succeeded(run(row, "--help")).out
    assert str(EXIT_CODES[row]) in " ".join(shown.split())


def test_help_of_the_command_covers_all_verbs() -> None:
    assert str(ANY) in " ".join(succeeded(run_here(verbs.main, ("--help",))).out.split())


def test_the_words_of_a_row() -> None:
    row = "Exit codes: 0 equal; 1 different; 2 could not compare; 130 interrupted."
    assert str(EXIT_CODES["verify"]) == str(EXIT_CODES["diff"]) == row


@pytest.mark.parametrize(
    ("codes", "expected"),
    [(EXIT_CODES["verify"], (2, 2, 130)), (EXIT_CODES["convert"], (1, 2, 130)), (ANY, (1, 2, 130))],
)
def test_the_code_of_an_error(codes: ExitCodes, expected: tuple[int, int, int]) -> None:
    kinds = (ConversionError, UsageError, Interrupted)
    assert tuple(codes.of_error(kind.exit_code) for kind in kinds) == expected
    assert (DONE, FAILED, USAGE, INTERRUPTED) == (0, 1, 2, 130)


# --- what comes from outside

#: By kind of command, the module and the function that fails in these tests.
INNER = {
    "convert.py": (queue_convert, "_main"),
    "convert_mlm_to_hf_checkpoint.py": (mlm_to_hf, "open_checkpoint"),
    "python -m megatron_converters.tp_pp_converter": (tensor_parallel, "to_hf"),
    "ckpt_to_hf_minicpm_with_tp_pp.py": (tensor_parallel, "to_hf"),
    **{name: (verbs._module(name), "run") for name in verbs.VERBS},
    **{f"modelconvert {name}": (tool._module(name), "run") for name in tool.COMMANDS},
}
_COMPARISONS = ("verify", "diff")


@pytest.mark.parametrize("row", INNER)
@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (OSError(5, "Input/output error", "x"), 1), (UsageError("x"), 2)]
)
def test_what_comes_from_outside(
    row: str, error: BaseException, code: int, named: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(*INNER[row], fail)
    options = next(options for options, _ in CASES[row])
    done = run(row, *options.format(**named).split())
    assert done.code == (USAGE if row in _COMPARISONS and code == FAILED else code), done
    assert "Traceback" not in done.err and "error: " in done.err


@pytest.mark.parametrize("name", _COMPARISONS)
def test_a_fault_of_the_program_is_no_difference(
    name: str, named: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> int:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(verbs._module(name), "run", fail)
    done = verb(name, named["hf"], named["meg"])
    assert done.code == 2 and "Traceback" in done.err and done.err.endswith("RuntimeError: a mistake\n")


def test_a_fault_of_a_conversion_ends_as_python_does(named: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> int:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(verbs._module("convert"), "run", fail)
    with pytest.raises(RuntimeError, match="a mistake"):
        verb("convert", named["hf"], named["out"])

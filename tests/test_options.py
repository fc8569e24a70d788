"""Words of command lines: typos, names of other programs, help by need with examples that run, `help`, `--dry-run`."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_converters.cli import mlm_to_hf, queue_convert, tensor_parallel
from megatron_converters.cli.main import VERBS, verb_parser
from megatron_converters.cli.options.groups import GROUPS, REST
from megatron_converters.cli.parser import Parser
from model_converter_tool.cli import main as modelconvert
from tests.helpers import Run, convert_back, refused, run_here, succeeded, tp_pp_converter, verb

HFModel = Callable[..., Path]


def convert_script(*options: Any) -> Run:
    return run_here(queue_convert.main, options)


def parsers() -> dict[str, Parser]:
    plugins = [
        queue_convert.parser(queue_convert.load_plugin("loader", loader), queue_convert.load_plugin("saver", saver))
        for loader, saver in (("hf", "mcore"), ("core", "hf"), ("core_mf", "mf"))
    ]
    named = {name: verb_parser(name) for name in VERBS}
    return {**named, "back": mlm_to_hf.parser(), **{str(number): parser for number, parser in enumerate(plugins)}}


# --- typos

TYPOS = [
    (("convrt", "a", "b"), "'convrt' is not one of convert, plan", "did you mean convert?"),
    (("import", "a", "b"), "did you mean convert?"),
    (("check", "a"), "did you mean verify?"),
    (("--tp", "2", "convert", "a", "b"), "no option --tp here; options stand behind the verb"),
    ((), "a verb is missing"),
    (("convert", "a", "b", "--tpp", "2"), "usage: megatron-converters convert SRC DST", "did you mean --tp or --pp?"),
    (("convert", "a", "b", "-tp", "2"), "no option -tp; did you mean --tp"),
    (("convert", "a", "b", "--max-shard=5GB"), "no option --max-shard; did you mean --max-shard-size"),
    (
        ("convert", "a", "b", "--overwrit", "--quite"),
        "mean --overwrite?; there is no option --quite; did you mean --quiet",
    ),
    (
        ("convert", "--src", "a", "--dst", "b"),
        "no option --src: folders are named without one, such as SRC DST",
        "--dst",
    ),
    (("convert", "a", "b", "--trust-remote-code"), "a model's own code is never run"),
    (("convert", "a", "b", "--to", "mcore"), "argument --to: 'mcore' is not one of", "did you mean megatron?"),
    (("convert", "a", "b", "--dtype", "bf61"), "'bf61' is not one of bf16, fp16, fp32; did you mean bf16?"),
    (("convert", "a", "b", "--dtype", "int8"), "'int8' is not one of bf16, fp16, fp32"),
    (("convert", "a", "b", "--ckpt-format", "torch-dist"), "did you mean torch_dist"),
    (("convert", "a", "b", "c"), "c: more than this command takes"),
    (("convert", "a"), "usage: megatron-converters convert SRC DST", "required: DST"),
    (("verify", "a", "b", "--tollerance", "1"), "usage: megatron-converters verify A [B]", "did you mean --tolerance?"),
    (("inspect", "a", "--tp", "2"), "there is no option --tp"),
    (("inspect", "a", "--force"), "there is no option --force; "),
    (("convert", "a", "b", "--force"), "--force: --overwrite replaces what is there"),
    (("convert", "a", "b", "--bf16=1"), "there is no option --bf16"),
    (("help", "convrt"), "did you mean convert?"),
    (("completion", "zhs"), "did you mean zsh?"),
]


@pytest.mark.parametrize(("words", "expected"), [(words, expected) for words, *expected in TYPOS])
def test_a_typo_is_named_with_what_is_meant(words: tuple[str, ...], expected: list[str]) -> None:
    run = refused(verb(*words), *expected, code=2)
    assert run.err.startswith("usage: megatron-converters") and len(run.err.splitlines()) <= 4


@pytest.mark.parametrize(
    ("command", "words", "expected"),
    [
        (convert_script, ("--lod-dir", "a", "--save-dir", "b"), "no option --lod-dir; did you mean --load-dir"),
        (convert_script, ("--loader", "llama_mistrl"), "no loader 'llama_mistrl'; ours are llama_mistral"),
        (convert_script, ("--saver", "mcoer"), "did you mean mcore"),
        (convert_script, ("--load-dir", "a", "--save-dir", "b", "--dry-run"), "`megatron-converters plan SRC DST` says"),
        (convert_script, ("--load-dir", "a", "--save-dir", "b", "--target-tensor-size", "2"), "--target-tensor-parallel-size"),
        (convert_back, ("--load-pth", "a", "--save-path", "b"), "no option --load-pth; did you mean --load-path"),
        (convert_back, ("--load-path", "a", "--save-path", "b", "--target-params-dtype", "fp61"), "did you mean fp16"),
        (tp_pp_converter, ("--in_dir", "a", "--save_pth", "b"), "no option --save_pth; did you mean --save_path"),
    ],
)  # fmt: skip
def test_the_scripts_suggest_too(command: Callable[..., Run], words: tuple[str, ...], expected: str) -> None:
    run = refused(command(*words), expected, code=2)
    assert len(run.err.splitlines()) <= 3


# --- names of other programs

SIZES = "--tp 2 --pp 4 --ep 8 --etp 1"
SAME = [
    ("convert", "a b " + SIZES, "a b --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 "
     "--expert-model-parallel-size 8 --expert-tensor-parallel-size 1"),
    ("convert", "a b " + SIZES, "a b --tensor-parallel-size=2 --pipeline-parallel-size=4 --ep-size 8 --etp=1"),
    ("plan", "a b " + SIZES, "a b --target_tensor_parallel_size 2 --pp_size 4 --expert_parallel_size 8 --etp 1"),
    ("convert", "a b --dtype bf16", "a b --bf16"),
    ("convert", "a b --dtype fp16", "a b --fp16"),
    ("convert", "a b --dtype bf16", "a b --dtype bfloat16"),
    ("plan", "a b --dtype fp32", "a b --torch-dtype torch.float32"),
    ("plan", "a b --dtype fp16", "a b --target-params-dtype HALF"),
    ("convert", "a b --dtype bf16", "a b --bf16 --dtype bfloat16"),
    ("convert", "a b --saver-transformer-impl local", "a b --transformer-impl local"),
    ("convert", "a b --target-num-layers-per-virtual-pipeline-stage 2", "a b --num-layers-per-virtual-pipeline-stage 2"),
    ("convert", "a b --tp 4", "a b --tp 2 --tp 4"),  # as in a script's "$@": the last one counts
    ("back", "--load-path a --save-path b --target-params-dtype bf16", "--load-dir a --save-dir b --bf16"),
    ("back", "--load-path a --save-path b --target-params-dtype fp32", "--load-path a --save-path b --dtype float32"),
    ("0", "--load-dir a --save-dir b --dtype fp32", "--load-path a --save-path b --target-params-dtype float"),
    ("0", "--load-dir a --save-dir b --target-tensor-parallel-size 2", "--load-dir a --save-dir b --tensor-model-parallel-size 2"),
]  # fmt: skip


@pytest.fixture(scope="module")
def known() -> dict[str, Parser]:
    return parsers()


@pytest.mark.parametrize(("command", "ours", "theirs"), SAME)
def test_other_names_mean_the_same(known: dict[str, Parser], command: str, ours: str, theirs: str) -> None:
    first, second = (known[command].parse_args(shlex.split(words)) for words in (ours, theirs))
    assert first == second


@pytest.mark.parametrize(
    "words",
    [
        "--tp 2 --tensor-model-parallel-size 4",
        "--target-tensor-parallel-size=2 --tp=1",
        "--bf16 --fp16",
        "--bf16 --dtype float32",
        "--dtype bf16 --target-params-dtype fp32",
        "--bf16 --fp16 --",
    ],
)
def test_two_names_with_two_values_are_refused(words: str) -> None:
    refused(verb("convert", "a", "b", *words.split()), "say the same thing differently; give only one of them", code=2)


@pytest.mark.parametrize("words", ["--bf16 --dtype fp32", "--bf16 --fp16", "--fp16 --target-params-dtype bf16"])
def test_a_loader_refuses_two_types(words: str, hf_model: HFModel, tmp_path: Path) -> None:
    run = convert_script("--load-dir", hf_model("llama2"), "--save-dir", tmp_path / "out", *words.split())
    refused(run, "exclude each other", code=2)
    assert not list(tmp_path.rglob("*.pt"))


# --- help


def test_every_option_has_a_place_in_help(known: dict[str, Parser]) -> None:
    """A new option needs a row in cli/options/groups.py."""
    for name, parser in known.items():
        assert f"\n{REST}:" not in parser.format_help(), name
    rows = [option for group in GROUPS for option in group.options]
    assert len(rows) == len(set(rows))


def test_help_shows_each_option_once_and_what_most_need_first(known: dict[str, Parser]) -> None:
    shown = known["convert"].format_help()
    for action in known["convert"].actions:
        if action.option_strings:
            names = ", ".join(sorted(action.option_strings, key=len))
            assert len(re.findall(rf"\n  {names}(?= [A-Z{{]|  |\n)", shown)) == 1, names
    order = (
        "what to name:",
        "what most need:",
        "casting,",
        "layout of a",
        "pipeline stages:",
        "resuming",
        "weights of MindSpore T",
    )
    assert [shown.index(f"\n{words}") for words in order] == sorted(shown.index(f"\n{words}") for words in order)
    assert "--dtype: --target-params-dtype, --torch-dtype" in shown and "--dtype bf16: --bf16" in shown


def test_help_ends_with_two_examples(known: dict[str, Parser]) -> None:
    for name, parser in known.items():
        lines = parser.format_help().rstrip().splitlines()
        assert lines[-3] == "examples:", name
        for line in lines[-2:]:
            words = shlex.split(line.partition(" > ")[0])
            if "--loader" in words:
                plugins = [(kind, words[words.index(f"--{kind}") + 1]) for kind in ("loader", "saver")]
                parser = queue_convert.parser(*(queue_convert.load_plugin(*plugin) for plugin in plugins))
            assert parser.parse_args(words[2:]), line


def test_the_examples_of_verbs_run(hf_model: HFModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink(hf_model("llama2", num_hidden_layers=2), "llama-hf")
    for name, entry in VERBS.items():
        for line in entry.examples:
            words = shlex.split(line.partition(" > ")[0])
            run = verb(*words)
            assert run.code == (1 if name == "diff" and "llama-back" in words else 0), (line, run)
    assert Path("shards.html").exists()


@pytest.mark.parametrize("name", [None, "convert", "help"])
def test_help_is_a_verb(name: str | None) -> None:
    words = () if name is None else (name,)
    asked, shown = succeeded(verb("help", *words)).out, succeeded(verb(*words, "--help")).out
    assert asked == shown and asked.startswith("usage: megatron-converters")
    assert succeeded(verb("convert", "a", "--nonsense", "--help")).out == succeeded(verb("help", "convert")).out


def test_the_command_s_help_lists_the_verbs() -> None:
    shown = succeeded(verb("help")).out
    for name, entry in VERBS.items():
        assert f"\n    {name}" in shown and entry.line.split(":")[0][:40] in " ".join(shown.split())


def test_the_direct_converter_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for main in (tensor_parallel.main, tensor_parallel.main_direct):
        run = succeeded(run_here(main, ("--help",)))
        assert run.out.rstrip().splitlines()[-3] == "examples:" and "\nmore options:" not in run.out


def test_a_dry_run_is_a_plan(hf_model: HFModel, tmp_path: Path) -> None:
    source, out = hf_model("llama2"), tmp_path / "out"
    dry = succeeded(verb("convert", source, out, "--tp", 2, "--dry-run"))
    plan = succeeded(verb("plan", source, out, "--tp", 2))
    assert [line for line in dry.out.splitlines() if not line.startswith("time")] == [
        line for line in plan.out.splitlines() if not line.startswith("time")
    ]
    assert not out.exists()


def test_a_stock_parser_takes_our_plugins() -> None:
    """Under Megatron-LM's own convert.py, whose parser is argparse's."""
    parser = argparse.ArgumentParser(allow_abbrev=False, conflict_handler="resolve")
    for kind, name in (("loader", "llama_mistral"), ("saver", "mcore")):
        queue_convert.load_plugin(kind, name).add_arguments(parser)
    assert parser.parse_args(["--target-expert-paralell-size", "2", "--dtype", "bfloat16"]).dtype == "bf16"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("convrt",), "'convrt' is not one of convert, batch, inspect, check, history, config; did you mean convert?"),
        (("convert", "a", "hf", "--ovewrite"), "there is no option --ovewrite; did you mean --overwrite?"),
        (("convert", "a", "hf", "--dtype", "int3"), "'int3' is not one of bf16, fp16, fp32"),
    ],
)
def test_modelconvert_suggests_too(words: tuple[str, ...], expected: str) -> None:
    assert expected in refused(run_here(modelconvert.main, words), code=2).err


def test_a_short_option_takes_its_value_along(tmp_path: Path) -> None:
    run = run_here(modelconvert.main, ("convert", "/no/such", "hf", f"-o{tmp_path}/x"))
    assert run.code != 0 and "there is no option" not in run.err


def test_modelconvert_takes_torch_s_names_of_types() -> None:
    from model_converter_tool.options import Task

    assert Task.of({"model_path": "a", "output_format": "hf", "dtype": "bfloat16"}).options["dtype"] == "bf16"

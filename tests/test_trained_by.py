"""What releases of Megatron-LM made of args that they accept: said on the way back, and chosen with `--trained-by`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_converters.basics.errors import UsageError
from megatron_converters.formats.megatron.describing import spec_and_notes
from megatron_converters.formats.megatron.reading import AS_STORED, MegatronReadOptions
from megatron_converters.formats.megatron.trained_by import program
from megatron_converters.model.rotary import RopeScaling
from megatron_converters.model.spec import ModelSpec
from tests.conversions import hf_to_megatron
from tests.helpers import edit_rank, rank_content, refused, succeeded, verb
from tests.test_megatron_args import all_args
from tests.tiny import tiny_spec

SPEC = tiny_spec(vocab_size=250)
LINEAR = {"rotary_seq_len_interpolation_factor": 4}
LLAMA3 = {"use_rope_scaling": True, "rope_scaling_factor": 32.0}


def described(options: MegatronReadOptions = AS_STORED, /, **changes: Any) -> tuple[ModelSpec, list[str]]:
    """Spec and warnings for the args of a training run, which has no recorded configuration."""
    args = argparse.Namespace(**{**all_args(SPEC), **changes})
    spec, notes = spec_and_notes(args, 256, SPEC.dtype, options)
    return spec, [note for note in notes if note.startswith("warning")]


def by(program: str) -> MegatronReadOptions:
    return MegatronReadOptions(trained_by=program)


@pytest.mark.parametrize(
    ("tokenizer", "more", "trained_by", "vocab"),
    [
        ("NullTokenizer", {}, None, 251),
        ("NullTokenizer", {"null_tokenizer_eod_id": 249}, None, 250),
        ("NullTokenizer", {"null_tokenizer_eod_id": None}, None, 250),  # 0.18 sets the attribute in every run
        ("NullTokenizer", {"null_tokenizer_eod_id": 249}, "0.17", 251),
        ("NullTokenizer", {}, "0.18", 250),
        ("NullTokenizer", {}, "args", 251),
        ("NullMultimodalTokenizer", {"null_tokenizer_eod_id": None}, None, 251),
        ("HuggingFaceTokenizer", {"null_tokenizer_eod_id": None}, None, 250),
        (None, {}, None, 250),
    ],
)
def test_the_end_of_a_document_counts_from_0_18_on(
    tokenizer: str | None, more: dict[str, Any], trained_by: str | None, vocab: int
) -> None:
    options = MegatronReadOptions(trained_by=trained_by)
    assert described(options, tokenizer_type=tokenizer, **more)[0].vocab_size == vocab


@pytest.mark.parametrize(
    ("changes", "trained_by", "scaling", "last"),
    [
        (LINEAR, None, RopeScaling("linear", 4.0), "0.18"),
        (LINEAR, "0.18", None, ""),
        (LINEAR, "0.19", RopeScaling("linear", 4.0), ""),
        (LINEAR, "args", RopeScaling("linear", 4.0), ""),
        ({"rotary_seq_len_interpolation_factor": 1}, None, None, ""),
        ({"rotary_seq_len_interpolation_factor": 1.0}, "0.19", None, ""),
        (LLAMA3, None, RopeScaling("llama3", 32.0), "0.19"),
        (LLAMA3, "0.12", RopeScaling("llama3", 8.0), ""),
        (LLAMA3, "0.19", RopeScaling("llama3", 8.0), ""),
        (LLAMA3, "args", RopeScaling("llama3", 32.0), ""),
        ({**LLAMA3, "rope_scaling_factor": 1.0}, None, RopeScaling("llama3", 1.0), "0.19"),
        ({**LLAMA3, "rope_scaling_factor": 8.0}, None, RopeScaling("llama3", 8.0), ""),
        ({**LLAMA3, "use_rope_scaling": False}, None, None, ""),  # the factor alone is nothing
    ],
)
def test_what_is_accepted_and_ignored(
    changes: dict[str, Any], trained_by: str | None, scaling: RopeScaling | None, last: str
) -> None:
    spec, warnings = described(MegatronReadOptions(trained_by=trained_by), **changes)
    assert spec.values["rope_scaling"] == scaling
    assert len(warnings) == bool(last)
    assert all(f"up to {last} trains" in warning and "--trained-by args" in warning for warning in warnings)


@pytest.mark.parametrize(("text", "known"), [("core_v0.16.1", "0.16"), ("args", "args"), (None, None)])
def test_programs(text: str | None, known: str | None) -> None:
    assert program(text) == known


def test_no_program() -> None:
    with pytest.raises(UsageError, match=r"'0\.7' is no release of Megatron-LM that is known here"):
        program("0.7")


def test_inspect_plan_and_conversion_say_it(hf_model: Callable[..., Path], tmp_path: Path) -> None:
    """A conversion's own record is no training run, and is not doubted."""
    checkpoint = hf_to_megatron(hf_model("llama3.2-tied"), tmp_path / "megatron")
    doubt = "rope_scaling_factor=32.0, which is taken as it stands"
    assert doubt not in succeeded(verb("inspect", checkpoint)).out
    args = vars(rank_content(checkpoint)["args"])
    trained = {name: value for name, value in args.items() if not name.startswith("hf_")}
    edit_rank(checkpoint, "mp_rank_00", args=argparse.Namespace(**trained))
    assert doubt in succeeded(verb("inspect", checkpoint)).out
    assert doubt in succeeded(verb("plan", checkpoint, tmp_path / "hf", "--no-measure")).out
    run = succeeded(verb("convert", checkpoint, tmp_path / "hf"))
    assert doubt in run.err + run.out
    run = succeeded(verb("convert", checkpoint, tmp_path / "hf8", "--trained-by", "0.16"))
    assert doubt not in run.err + run.out
    factors = []
    for folder in ("hf", "hf8"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        factors.append((config.get("rope_parameters") or config["rope_scaling"])["factor"])
    assert factors == [32.0, 8.0]
    refused(verb("inspect", hf_model("llama3.2-tied"), "--trained-by", "0.16"), "--trained-by is for reading", code=2)


def test_a_comparison_of_logits_reads_by_the_same_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[MegatronReadOptions] = []

    def compare(*_: Any, options: MegatronReadOptions, **__: Any) -> Any:
        seen.append(options)
        raise UsageError("enough")

    monkeypatch.setattr("megatron_converters.logits.compare_logits", compare)
    given = ("--trained-by", "0.16", "--ignore-args", "a,b", "--mup", "fold", "--without-mtp", "--hf-config", tmp_path)
    refused(verb("verify", tmp_path, tmp_path, "--logits", "--prefer-args", *given), "enough", code=2)
    said = dict(trained_by="0.16", prefer_args=True, ignore_args=("a", "b"), mup="fold", without_mtp=True)
    assert seen == [MegatronReadOptions(hf_config=tmp_path, **said)]

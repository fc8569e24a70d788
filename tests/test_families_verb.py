"""`families`: what is said of each family, in a table that fits a terminal, as JSON and by the API."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_converters as mc
from megatron_converters.families import FAMILIES
from megatron_converters.families.config_json import spec_from_config
from megatron_converters.families.typical import required_config
from megatron_converters.families.wrappers import WRAPPERS
from tests.helpers import succeeded, verb

#: A Llama with other names, as docs/adding-a-family.md has it.
FILE = "name: renamed\nmodel_type: renamed\narchitecture: RenamedForCausalLM\nbase: llama\n"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of a family that was made from Llama's table, proof and all."""
    monkeypatch.setattr(FAMILIES, "_registered", {})
    own = dataclasses.replace(FAMILIES["llama"], name="own", model_type="own", architecture="OwnForCausalLM")
    mc.register_family(own)
    return own.name


def test_json_says_what_the_api_says(tmp_path: Path) -> None:
    (tmp_path / "family.yaml").write_text(FILE)
    for options in ((), ("--family-file", str(tmp_path / "family.yaml"))):
        shown = json.loads(succeeded(verb("families", "--json", *options)).out)["families"]
        found = mc.supported_families(*options[1:])
        assert shown == json.loads(json.dumps([family._asdict() for family in found]))
        wrappers = [row.model_type for row in WRAPPERS]
        assert [family.name for family in found] == [*(["renamed"] if options else []), *FAMILIES, *wrappers]


def test_the_table_fits_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = succeeded(verb("families")).out.partition("\n\n")[0].splitlines()
    assert max(map(len, lines)) <= 80
    (granite,) = (line.split() for line in lines if line.startswith("granite "))
    assert granite == ["granite", "GraniteForCausalLM", "dense", "mindspore", "0.17", "logits"]


def test_what_is_derived_from_tables() -> None:
    found = {family.name: family for family in mc.supported_families()}
    kinds = {
        "llama": "dense",
        "olmoe": "MoE",
        "deepseek_v3": "MLA, MoE",
        "minicpm3": "MLA",
        "minicpm": "dense, MoE",
        "qwen3_next": "hybrid, MoE",
    }
    assert {name: found[name].kind for name in kinds} == kinds
    assert found["llama"].formats == ("hf", "megatron", "meta", "mindspore")
    assert found["qwen3_next"].formats == found["phi"].formats == found["olmoe"].formats == ("hf", "megatron")
    assert (found["phi"].since, found["olmoe"].since) == (None, "0.16")
    assert found["deepseek_v3"].aliases == ("kimi_k2",)
    wrappers = {row.model_type: (found[row.model_type].kind, found[row.model_type].since) for row in WRAPPERS}
    assert wrappers["llava"] == ("VL, dense", "0.8") and wrappers["qwen3_vl_moe"] == ("VL, MoE", "0.11")
    assert all(
        found[name].models and found[name].covers and found[name].formats == ("hf", "megatron") for name in wrappers
    )


def test_built_in_families_say_it_all_and_those_from_outside_have_no_proof(registered: str, tmp_path: Path) -> None:
    (tmp_path / "family.yaml").write_text(FILE)
    found = {family.name: family for family in mc.supported_families(tmp_path / "family.yaml")}
    for name in FAMILIES.built_in:
        assert found[name].models and found[name].covers and found[name].proof != "not stated", name
    for name in (registered, "renamed"):
        assert (found[name].proof, found[name].since, found[name].kind) == ("not stated", None, "dense")
    assert found["renamed"].covers == ""


@pytest.mark.parametrize("name", FAMILIES.built_in)
def test_sizes_are_all_that_a_family_requires(name: str) -> None:
    assert spec_from_config(required_config(FAMILIES[name])).family == name

"""YaRN outside multi-latent attention: flags of Megatron-LM 0.19, the same scaling as transformers computes, and the way back."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_converters.families.config_json import spec_from_config
from megatron_converters.formats.megatron.arguments import model_args, spec_fields
from megatron_converters.formats.megatron.config_fields import args_of_fields
from megatron_converters.model.rotary import RopeScaling
from tests.helpers import args_of, nothing_complete, refused, succeeded, verb
from tests.oracle.checkpoint import iteration_directory
from tests.plain_llama import weights, write_llama

_TABLE: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
#: `rope_scaling` of config.json, as models are published with it, and as transformers allows it.
TABLES: dict[str, dict[str, Any]] = {
    "as Qwen says it": _TABLE,
    "an attention factor": {**_TABLE, "attention_factor": 1.25},
    "no attention factor": {**_TABLE, "attention_factor": 1.0},
    "vLLM's factor": {**_TABLE, "attn_factor": 0.8},
    "betas": {**_TABLE, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    "two mscales": {**_TABLE, "mscale": 2.0, "mscale_all_dim": 0.5},
    "one mscale, which is not heeded": {**_TABLE, "mscale": 2.0},
}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "hf", weights(), rope_scaling=_TABLE)


def configured(folder: Path, **fields: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def test_the_release_that_has_it_is_needed_and_said(llama: Path, tmp_path: Path) -> None:
    older = verb("convert", llama, tmp_path / "meg", "--megatron-version", "0.18")
    flag = (
        "--yarn-original-max-position-embeddings 16, --yarn-beta-fast 32.0, --yarn-beta-slow 1.0, which exist and have"
    )
    refused(older, "Megatron-LM 0.18, as --megatron-version says, does not know or heed", flag)
    nothing_complete(tmp_path / "meg")
    run = succeeded(verb("convert", llama, tmp_path / "meg"))
    assert "needs Megatron-LM 0.19 or later" in run.out
    for words in ("--rotary-scaling-factor 4.0", "--mscale 1.0", "--yarn-beta-fast 32.0", "--yarn-beta-slow 1.0"):
        assert f"{words} \\" in run.out
    assert "--no-yarn-correction-range-round-to-int" not in run.out
    assert args_of(tmp_path / "meg").position_embedding_type == "yarn"
    every = succeeded(verb("args", tmp_path / "meg")).out
    assert "--position-embedding-type yarn" in every


@pytest.mark.parametrize("name", TABLES)
def test_scaling_is_that_of_transformers_and_comes_back(name: str, llama: Path, tmp_path: Path) -> None:
    """Also from args alone, as a training run leaves them."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    configured(llama, rope_scaling=TABLES[name])
    succeeded(verb("convert", llama, tmp_path / "meg"))
    args = args_of(tmp_path / "meg")
    config = AutoConfig.from_pretrained(llama)
    table = dict(config.rope_parameters)
    if "attn_factor" in table:  # which vLLM multiplies the usual factor by, and transformers does not read
        table["attention_factor"] = table["attn_factor"] * (0.1 * math.log(table["factor"]) + 1)
    config.rope_parameters = table
    _, wanted = ROPE_INIT_FUNCTIONS["yarn"](config)
    over, under = (
        0.1 * mscale * math.log(args.rotary_scaling_factor) + 1 for mscale in (args.mscale, args.mscale_all_dim)
    )
    assert math.isclose(over / under, wanted, rel_tol=1e-12)
    succeeded(verb("convert", tmp_path / "meg", tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (llama / "config.json").read_text()
    )
    path = iteration_directory(tmp_path / "meg") / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    del content["args"].hf_config
    torch.save(content, path)
    succeeded(verb("convert", tmp_path / "meg", tmp_path / "alone"))
    alone = AutoConfig.from_pretrained(tmp_path / "alone")
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](alone)
    assert math.isclose(factor, wanted, rel_tol=1e-12)
    assert torch.equal(frequencies, ROPE_INIT_FUNCTIONS["yarn"](config)[0])


def test_args_and_providers_say_the_same(llama: Path) -> None:
    """Megatron-Bridge's provider has the attributes that GPTModel reads, Megatron-LM's args those of its flags."""
    spec = spec_from_config(json.loads((llama / "config.json").read_text()))
    args = model_args(spec)
    shared = ("rotary_scaling_factor", "mscale", "mscale_all_dim")
    fields = {name: value for name, value in args.items() if name not in shared}
    fields |= {f"yarn_{name}": args[name] for name in shared}
    assert spec_fields(Namespace(**args_of_fields(fields))) == spec_fields(Namespace(**args))
    assert spec_fields(Namespace(**args))["rope_scaling"] == spec.values["rope_scaling"]


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        (RopeScaling("linear", 2.0), "linear, factor 2"),
        (RopeScaling("llama3", 8.0), "llama3, factor 8, low 1, high 4, from 8192 positions"),
        (
            RopeScaling("yarn", 4.0, attention_factor=1.5, truncate=False, mscale=0.7),
            "yarn, factor 4, fast 32, slow 1, mscales 0.7 and 0, attention factor 1.5, not truncated, from 8192 positions",
        ),
        (
            RopeScaling("longrope", 4.0, short_factor=(1.0, 1.5), long_factor=(2.0, 3.0)),
            "longrope, factor 4, divisors 1 to 1.5 and beyond 2 to 3, from 8192 positions",
        ),
    ],
)
def test_scaling_in_words(scaling: RopeScaling, words: str) -> None:
    assert str(scaling) == words

"""`--hf-config`: where a reference differs from what the args say, it is a warning, an error, or the args are right."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_converters.bridge import AutoBridge
from tests.conversions import different, hf_to_megatron
from tests.helpers import edit_rank, hf_tensors, rank_content, refused, succeeded, verb
from tests.oracle.hf import make_model

SIZES = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=48)
Edit = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama2", tmp_path_factory.mktemp("hf") / "llama2", **SIZES)


@pytest.fixture(scope="module")
def edited(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Edit:
    """The model's checkpoint, as a training run leaves it, with other args; None removes an attribute."""
    checkpoint = hf_to_megatron(model, tmp_path_factory.mktemp("megatron"))
    args = vars(rank_content(checkpoint)["args"])
    trained = {name: value for name, value in args.items() if not name.startswith("hf_")}

    def edit(**changes: Any) -> Path:
        kept = {
            name: value for name, value in {**trained, **changes}.items() if name not in changes or value is not None
        }
        edit_rank(checkpoint, "mp_rank_00", args=argparse.Namespace(**kept))
        return checkpoint

    return edit


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"rotary_base": 500000}, "rotary_base: 10000.0, not 500000.0"),
        ({"norm_epsilon": 1e-6, "layernorm_epsilon": 1e-6}, "norm_epsilon: 1e-05, not 1e-06"),
        ({"window_size": (6, 0)}, "sliding_window: None, not 7"),
        ({"use_rope_scaling": True}, "rope_scaling: None, not llama3, factor 8"),
        ({"rotary_percent": 0.5}, "rotary_percent: 1.0, not 0.5"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_a_reference_overrides_is_a_warning(
    changes: dict[str, Any], difference: str, model: Path, edited: Edit
) -> None:
    out = succeeded(verb("inspect", edited(**changes), "--hf-config", model)).out
    (warning,) = [line for line in out.splitlines() if "warning" in line]
    assert f"warning: taken from {model}: {difference}" in warning
    assert warning.endswith("of the args; --prefer-args takes what they say")


def test_autobridge_logs_it(model: Path, edited: Edit, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = edited(rotary_base=500000)
    AutoBridge.from_hf_pretrained(model).export_ckpt(checkpoint, tmp_path / "hf", show_progress=False)
    assert f"taken from {model}: rotary_base: 10000.0, not 500000.0 of the args" in caplog.text


def test_what_matters_to_training_alone_is_a_note(model: Path, edited: Edit) -> None:
    checkpoint = edited(max_position_embeddings=4096, init_method_std=0.006, attention_dropout=0.1)
    out = succeeded(verb("inspect", checkpoint, "--hf-config", model)).out
    assert f"taken from {model}: max_position_embeddings: 512, not 4096 of the args" in out
    assert "warning" not in out


def test_args_may_be_right(model: Path, edited: Edit, tmp_path: Path) -> None:
    """The reference then gives what args lack: family, names, tokens."""
    checkpoint = edited(rotary_base=500000, norm_epsilon=1e-6, layernorm_epsilon=1e-6, vocab_size=200)
    options = ("--hf-config", model, "--prefer-args")
    run = succeeded(verb("convert", checkpoint, tmp_path / "hf", *options))
    assert [line for line in (run.err + run.out).splitlines() if "warning" in line and "tokenizer" not in line] == []
    assert f"taken from the args: rotary_base: 500000.0, not 10000.0 of {model / 'config.json'}" in run.err + run.out
    ours, written = (json.loads((folder / "config.json").read_text()) for folder in (model, tmp_path / "hf"))
    theta = (written.get("rope_parameters") or written)["rope_theta"]
    assert (theta, written["rms_norm_eps"], written["vocab_size"]) == (500000.0, 1e-6, 200)
    assert written["bos_token_id"] == ours["bos_token_id"] == 1
    rows = {name: tensor.shape[0] for name, tensor in hf_tensors(tmp_path / "hf").items() if tensor.shape[0] == 200}
    assert len(rows) == 2
    same = [name for name in hf_tensors(model) if name not in rows]
    assert not {*different(hf_tensors(model), hf_tensors(tmp_path / "hf"))} & {*same}


def test_nothing_to_prefer_them_to(model: Path, edited: Edit) -> None:
    refused(verb("inspect", edited(), "--prefer-args"), "--prefer-args", "--hf-config DIR", code=2)
    refused(verb("inspect", model, "--prefer-args"), "--prefer-args is for reading", code=2)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"max_position_embeddings": None}, "no valid max_position_embeddings"),
        ({"norm_epsilon": 1e-6}, "norm_epsilon=1e-06 and layernorm_epsilon=1e-05"),
    ],
)
def test_heads_are_checked_whatever_args_lack(
    changes: dict[str, Any], note: str, model: Path, edited: Edit, tmp_path: Path
) -> None:
    """Else shapes alone would let a model of other heads pass, and scramble queries, keys and values."""
    other = make_model("llama2", tmp_path / "other", **SIZES, num_attention_heads=4, num_key_value_heads=2)
    words = ("num_attention_heads: 4, not 8", "by which queries, keys and values are packed")
    refused(verb("inspect", edited(**changes), "--hf-config", other), *words)
    refused(verb("inspect", edited(), "--hf-config", other), *words)
    out = succeeded(verb("inspect", edited(**changes), "--hf-config", model)).out
    assert f"taken from {model} where the args do not say it: the checkpoint's args have {note}" in out

"""`source_megatron_args.json`: typed both ways, and what a new checkpoint inherits."""

from __future__ import annotations

import argparse
import enum
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_converters.assets.training_args import inheritable, margs_from_json, margs_to_json
from megatron_converters.basics.dtypes import BY_NAME, dtype_named
from megatron_converters.basics.errors import ConversionError


def stored(tmp_path: Path, **values: Any) -> dict[str, Any]:
    path = tmp_path / "source_megatron_args.json"
    path.write_text(json.dumps(margs_to_json(argparse.Namespace(**values))))
    return vars(margs_from_json(path))


def test_plain_values_and_dtypes_come_back(tmp_path: Path) -> None:
    values = {"a": 1, "b": 0.5, "c": None, "d": True, "e": "text", "f": [1, [2]], "g": {"h": 1}, "i": 1e-5}
    dtypes = dict(BY_NAME)
    assert stored(tmp_path, **values, **dtypes) == {**values, **dtypes}


def test_dtypes_go_out_as_torch_names_them() -> None:
    assert margs_to_json(argparse.Namespace(params_dtype=dtype_named("bf16"))) == {"params_dtype": "torch.bfloat16"}


def test_text_that_only_looks_like_a_dtype_stays_text(tmp_path: Path) -> None:
    values = {"a": "torch.nonsense", "b": "bfloat16", "c": "torch.", "d": "torch.bf16"}
    assert stored(tmp_path, **values) == values


class Backend(enum.Enum):
    AUTO = 1


def test_other_objects_go_out_as_text_and_tuples_as_lists(tmp_path: Path) -> None:
    assert stored(tmp_path, a=Backend.AUTO, b=(4095, 0), c=Path("/x"), d={1: 2}) == {
        "a": "Backend.AUTO",
        "b": [4095, 0],
        "c": "/x",
        "d": {"1": 2},
    }


def test_names_are_in_order() -> None:
    assert list(margs_to_json(argparse.Namespace(b=1, a=2, c=3))) == ["a", "b", "c"]


def test_a_file_of_habana_s_converter_is_read(tmp_path: Path) -> None:
    """It writes every value that is no JSON as its `str`."""
    path = tmp_path / "margs.json"
    path.write_text('{"params_dtype": "torch.bfloat16", "attention_backend": "AttnBackend.auto", "num_layers": 2}')
    margs = margs_from_json(path)
    assert (margs.params_dtype, margs.attention_backend, margs.num_layers) == (
        BY_NAME["bfloat16"],
        "AttnBackend.auto",
        2,
    )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"margs\.json is missing"):
        margs_from_json(tmp_path / "margs.json")


def test_what_belongs_to_one_run_is_not_inherited() -> None:
    margs = argparse.Namespace(lr=1e-4, save="/old", load="/old", rank=3, tokenizer_type="X", consumed_train_samples=9)
    assert inheritable(margs) == {"lr": 1e-4}
    assert inheritable(None) == {}
    assert margs.save == "/old"  # the source's own are left alone

"""Forms in which programs keep args, and objects beside them that Megatron-LM's own list of safe classes allows."""

from __future__ import annotations

import argparse
import signal
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_converters.basics.errors import ConversionError
from megatron_converters.formats.megatron.arguments import spec_fields
from megatron_converters.formats.megatron.reading import args_in
from megatron_converters.storage import torch_zip
from tests.test_megatron_args import all_args
from tests.tiny import tiny_spec

PLAIN = {name: value for name, value in all_args(tiny_spec()).items() if name != "params_dtype"}


def stored(tmp_path: Path, **content: Any) -> dict[str, Any]:
    """What is read of a file of `torch.save`."""
    torch.save(content, tmp_path / "model_optim_rng.pt")
    read: dict[str, Any] = torch_zip.read(tmp_path / "model_optim_rng.pt")
    return read


def nested(**more: Any) -> types.SimpleNamespace:
    """Args as `--yaml-cfg` makes them: groups, with the names of a configuration's fields."""
    language = {
        **{"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 4, "num_attention_heads": 4, "num_query_groups": 2},
        **{"kv_channels": 2, "activation_func": "swiglu", "gated_linear_unit": False, "add_bias_linear": False},
        **{"normalization": "RMSNorm", "layernorm_epsilon": 1e-5, "num_moe_experts": None, "window_size": None},
    }
    groups = {
        "language_model": types.SimpleNamespace(**{**language, **more}),
        "model_parallel": types.SimpleNamespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1),
    }
    top = {"max_position_embeddings": 64, "seq_length": 32, "untie_embeddings_and_output_weights": True}
    top |= {"position_embedding_type": "rope", "rotary_base": 10000, "rotary_percent": 1.0, "rotary_interleaved": False}
    top |= {"yaml_cfg": "/c.yaml", "hidden_size": None}
    return types.SimpleNamespace(**groups, **top)


@pytest.mark.parametrize("form", [types.SimpleNamespace, dict, argparse.Namespace])
def test_args_of_any_form(form: Any, tmp_path: Path) -> None:
    """As AMD's Primus, and programs without argparse, save them."""
    args = args_in(stored(tmp_path, args=form(**PLAIN)), tmp_path)
    assert args is not None and vars(args) == PLAIN


def test_groups_are_merged(tmp_path: Path) -> None:
    args = args_in(stored(tmp_path, args=nested()), tmp_path)
    assert args is not None
    assert (args.hidden_size, args.tensor_model_parallel_size, args.seq_length) == (8, 1, 32)
    usual = spec_fields(argparse.Namespace(**PLAIN))
    of_training = ("attention_dropout", "initializer_range")
    assert spec_fields(args) == {name: value for name, value in usual.items() if name not in of_training}


@pytest.mark.parametrize(
    ("more", "fields"),
    [
        ({"num_moe_experts": 4, "moe_router_topk": 3}, {"num_experts": 4, "moe_router_topk": 3, "feed": "moe"}),
        ({"num_query_groups": None}, {"num_query_groups": 4}),
        ({"activation_func": "squaredrelu"}, {"activation": "squared_relu", "gated": False}),
        ({"activation_func": "gelu", "add_bias_linear": True, "bias_activation_fusion": True}, {"activation": "gelu"}),
        ({"layernorm_zero_centered_gamma": True}, {"zero_centred": True}),
    ],
)
def test_fields_of_a_group_have_other_names(more: dict[str, Any], fields: dict[str, Any], tmp_path: Path) -> None:
    args = args_in(stored(tmp_path, args=nested(**more)), tmp_path)
    assert args is not None
    read = spec_fields(args)
    assert {name: read[name] for name in fields} == fields


def test_groups_that_contradict_the_args(tmp_path: Path) -> None:
    content = stored(tmp_path, args=nested(rotary_base=500000))
    with pytest.raises(ConversionError, match=r"rotary_base=10000 and, in language_model, 500000"):
        args_in(content, tmp_path)
    args = args_in(stored(tmp_path, args=nested(yaml_cfg="elsewhere")), tmp_path)  # which is no argument of a model
    assert args is not None and args.yaml_cfg == "/c.yaml"


def test_states_that_are_not_read(tmp_path: Path) -> None:
    """Each is allowed by megatron-core 0.19's safe_globals.py, or is what torch and numpy save beside it."""
    generator = torch.Generator()
    generator.manual_seed(7)
    state = {
        "torch_generator": generator,
        "cuda_rng_states": {"model-parallel-rng": torch.get_rng_state()},
        "numpy": np.random.default_rng(0).bit_generator.state["state"]["state"],
        "legacy": np.random.get_state(),
        "uint32": np.dtypes.UInt32DType(),
        "class": np.dtypes.UInt32DType,
        "signal": signal.SIGTERM,
        "path": Path("/x"),
        "device": torch.device("cpu"),
        "size": torch.Size([2]),
        "more": types.SimpleNamespace(seed=1),
    }
    read = stored(tmp_path, rng_state=[state], args=argparse.Namespace(**PLAIN), iteration=3)
    assert read["iteration"] == 3 and read["rng_state"][0].keys() == state.keys()
    args = args_in(read, tmp_path)
    assert args is not None and vars(args) == PLAIN
    shown = repr(read["rng_state"][0]["torch_generator"])
    assert shown.startswith("<torch._C.Generator")

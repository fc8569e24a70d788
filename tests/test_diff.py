"""`diff`: its figures are torch's, its order is by relative difference; and the arithmetic below it, on arrays by hand."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_converters.basics.casting import values
from megatron_converters.basics.dtypes import BY_NAME, dtype_named
from megatron_converters.cli.main import main
from megatron_converters.comparison.measure import Measure, Tally
from tests.conversions import hf_to_megatron, reshard
from tests.test_verify import FILE

HFModel = Callable[..., Path]


INF, NAN = math.inf, math.nan


def run(capsys: pytest.CaptureFixture[str], *arguments: Any, verb: str = "diff") -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_:
        main([verb, *map(str, arguments)])
    return int(exit_.value.code or 0), capsys.readouterr().out


@pytest.fixture
def pair(hf_model: HFModel, tmp_path: Path) -> tuple[Path, Path]:
    """A folder, and a checkpoint of a model that was trained a little further in some of its tensors."""
    source = hf_model("qwen3", dtype="bfloat16")
    other = shutil.copytree(source, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for scale, name in ((0.5, "layers.0.mlp.down_proj"), (0.1, "layers.2.self_attn.q_proj"), (0.01, "norm")):
        weight = tensors[f"model.{name}.weight"]
        noise = torch.randn(weight.shape, generator=generator) * scale * weight.float().std()
        tensors[f"model.{name}.weight"] = (weight.float() + noise + 0.01).bfloat16()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    return source, hf_to_megatron(other, tmp_path / "meg", tp=2, pp=2)


def test_figures_are_those_of_torch(pair: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    source, meg = pair
    code, out = run(capsys, source, meg, "--json")
    report = json.loads(out, parse_constant=pytest.fail)
    assert (code, report["equal"]) == (1, False)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "other/model.safetensors")
    names = {
        "layer 0 fc2": ["layers.0.mlp.down_proj"],
        "layer 2 qkv": [f"layers.2.self_attn.{part}_proj" for part in "qkv"],
        "final_norm": ["norm"],
    }
    found = {row["tensor"]: row for row in report["tensors"]}
    for tensor, parts in names.items():
        one, other = (
            torch.cat([side[f"model.{part}.weight"].flatten().double() for part in parts]) for side in (before, after)
        )
        row = found[tensor]
        assert row["distance"] == pytest.approx(float((one - other).norm()), rel=1e-12)
        assert row["norm"] == pytest.approx(float(one.norm()), rel=1e-12)
        assert row["relative"] == pytest.approx(float((one - other).norm() / one.norm()), rel=1e-12)
        assert row["largest"] == float((one - other).abs().max())
        assert (row["differing"], row["elements"]) == (int((one != other).sum()), one.numel())
    assert [row["tensor"] for row in report["tensors"]][:3] == sorted(names, key=lambda name: -found[name]["relative"])
    assert {row["tensor"] for row in report["tensors"] if row["differing"]} == set(names)
    assert sum(row["norm"] for row in report["tensors"]) > 100  # of equal tensors, too


def test_the_table_lists_what_differs_most(pair: tuple[Path, Path], capsys: Any) -> None:
    code, out = run(capsys, *pair)
    lines = out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("relative"))
    assert code == 1
    assert [line.split("  ")[-1] for line in lines[start + 1 : start + 4]] == [
        "layer 0 fc2",
        "layer 2 qkv",
        "final_norm",
    ]
    assert lines[-2:] == ["3 of 35 compared tensors differ in their elements", "DIFFERENT"]
    assert "… and 2 more tensors that differ (--top N, --all)" in run(capsys, *pair, "--top", 1)[1]
    assert len([line for line in run(capsys, *pair, "--all")[1].splitlines() if "layer 1 " in line]) == 8


def test_equal_checkpoints(hf_model: HFModel, tmp_path: Path, capsys: Any) -> None:
    source = hf_model("llama3")
    meg = hf_to_megatron(source, tmp_path / "meg", tp=2)
    code, out = run(capsys, source, meg)
    assert (code, out.splitlines()[-1]) == (0, "EQUAL")
    assert run(capsys, meg, meg)[0] == 0


def test_arguments_and_sizes_that_differ_are_listed(hf_model: HFModel, tmp_path: Path, capsys: Any) -> None:
    meg = hf_to_megatron(hf_model("llama3"), tmp_path / "meg", tp=2)
    other = reshard(meg, tmp_path / "other", tp=1)
    for path in other.glob(f"iter_*/mp_rank_*/{FILE}"):
        content = torch.load(path, weights_only=False)
        content["args"].rotary_base = 5
        content["args"].load = "/elsewhere"
        content["args"].hf_config["transformers_version"] = "0"
        content["args"].hf_config["pad_token_id"] = 7
        torch.save(content, path)
    code, out = run(capsys, meg, other)
    assert code == 1
    assert "model: rotary_base: A has 500000.0, B has 5" in out
    assert "arguments: tensor_model_parallel_size: A has 2, B has 1" in out
    assert "config.json: pad_token_id: A has None, B has 7" in out
    assert "/elsewhere" not in out
    assert "transformers_version" not in out
    assert "0 of 27 compared tensors differ" in out
    settings = json.loads(run(capsys, meg, other, "--json")[1])["settings"]
    assert settings["model"] == ["rotary_base: A has 500000.0, B has 5.0"]


def test_shapes_and_dtypes_that_differ_are_listed(hf_model: HFModel, tmp_path: Path, capsys: Any) -> None:
    wide, narrow = hf_model("llama3", head_dim=16), hf_model("llama3")
    code, out = run(capsys, wide, narrow)
    assert code == 1
    assert "layer 0 qkv, layer 1 qkv, layer 2 qkv and 1 more tensors: A has shape [256, 64], B [128, 64]" in out
    assert "layer 3 qkv: A has shape [256, 64], B [128, 64]" in run(capsys, wide, narrow, "--all")[1]
    half = shutil.copytree(narrow, tmp_path / "half")
    tensors = load_file(half / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    save_file(tensors, half / "model.safetensors")
    assert "final_norm: A is float32, B is bfloat16" in run(capsys, narrow, half)[1]
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, half / "model.safetensors")
    assert "final_norm: A is float32, B is float8_e4m3fn" in run(capsys, narrow, half)[1]


def test_tensors_with_odd_numbers_come_first(hf_model: HFModel, tmp_path: Path, capsys: Any) -> None:
    """A NaN has no place in an order; what differs by it is what differs most."""
    source, other = hf_model("llama3"), shutil.copytree(hf_model("llama3"), tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    for layer in range(4):
        norm = tensors[f"model.layers.{layer}.input_layernorm.weight"]
        norm[:] = norm * (1.1 + layer)
    for layer, value in ((1, NAN), (2, INF)):
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"][0, 0] = value
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    for pair in ((source, other), (other, source)):
        rows = json.loads(run(capsys, *pair, "--json")[1])["tensors"]
        assert [row["tensor"] for row in rows[:2]] == ["layer 1 fc2", "layer 2 fc2"]
        assert [row["relative"] for row in rows[:2]] == ["inf", "inf"]
        rest = [row["relative"] for row in rows[2:]]
        assert rest == sorted(rest, reverse=True) and rest[3] > 0 == rest[4]
        assert "some because only one side is a finite number" in run(capsys, *pair, verb="verify")[1]


# --- the arithmetic


@pytest.mark.parametrize("name", [name for name in BY_NAME if name != "bool"])
def test_values_are_those_of_torch(name: str) -> None:
    dtype = dtype_named(name)
    bits = np.random.default_rng(0).integers(0, 256, (64, 8, dtype.itemsize), np.uint8)
    carriers = bits.reshape(64, -1).view(dtype.carrier)
    wanted = torch.from_numpy(bits.copy()).view(dtype.torch).reshape(64, 8).to(torch.float64).numpy()
    np.testing.assert_array_equal(values(carriers, dtype), wanted)
    np.testing.assert_array_equal(values(carriers[:, ::2], dtype), wanted[:, ::2])


def _measured(left: Any, right: Any, rows: Any = None, tolerance: float = 0.0) -> Measure:
    one, other = (np.array(side, np.float32).view(np.uint32) for side in (left, right))
    tally = Tally(tolerance, norms=True)
    tally.add(np.arange(len(one)) if rows is None else np.array(rows), 10, one, other, dtype_named("float32"))
    return tally.measure(())


@pytest.mark.parametrize(
    ("left", "right", "differing", "largest"),
    [
        ([[1, 2]], [[1, 2]], 0, 0),
        ([[1, 2]], [[1, 4]], 1, 2),
        ([[0.0, 2]], [[-0.0, 2]], 1, 0),
        ([[NAN, 2]], [[NAN, 2]], 0, 0),
        ([[NAN, 2]], [[1, 2]], 1, INF),
        ([[INF, 2]], [[INF, 5]], 1, 3),
        ([[INF, 2]], [[-INF, 2]], 1, INF),
        ([[NAN, 2]], [[INF, 2]], 1, INF),
    ],
)
def test_differences_of_odd_numbers(left: Any, right: Any, differing: int, largest: float) -> None:
    measure = _measured(left, right)
    assert (measure.differing, measure.largest) == (differing, largest)
    json.dumps(measure.to_json(), allow_nan=False)


def test_padding_is_neither_counted_nor_compared() -> None:
    measure = _measured([[1], [9], [3]], [[1], [7], [5]], rows=[4, -1, 6])
    assert (measure.elements, measure.differing, measure.largest, measure.first) == (2, 1, 2, (6, 10))
    assert measure.norm == pytest.approx(math.sqrt(10))


def test_within_the_tolerance_nothing_differs() -> None:
    measure = _measured([[1, 2], [3, 4]], [[1.25, 2], [3, 4.5]], tolerance=0.25)
    assert (measure.differing, measure.first, measure.largest) == (1, (1, 11), 0.5)
    assert _measured([[1, NAN]], [[1.25, NAN]], tolerance=0.25).differing == 0
    assert _measured([[1.0]], [[NAN]], tolerance=1e30).differing == 1


def test_a_tensor_of_zeros_differs_beyond_measure() -> None:
    assert _measured([[0.0]], [[1.0]]).relative == INF
    assert _measured([[0.0]], [[0.0]]).relative == 0
    assert _measured([[3.0]], [[4.5]]).relative == 0.5
    assert "only in bits" in str(_measured([[0.0]], [[-0.0]]))

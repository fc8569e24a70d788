"""Checkpoints written by the real mindspore: those kept in the repository, and more of them where mindspore is installed."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import megatron_converters as mc
from tests.helpers import hf_tensors
from tests.oracle.by_hand_mindspore import converted
from tests.oracle.mindspore import load_in_mindspore, run_in_mindspore
from tests.oracle.mindspore_fixtures import FIXTURES, FOLDER, RUN_STATE, Fixture
from tests.oracle.mindspore_models import Layout, Model, bfloat16_bits, hf_weights, mindspore_weights

COMMITTED = [name for name, fixture in FIXTURES.items() if fixture.committed]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All fixtures, made by the mindspore that is installed."""
    folder = tmp_path_factory.mktemp("mindspore")
    run_in_mindspore("scripts/make_mindspore_fixtures.py", "--all", folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors(*paths: Path) -> dict[str, torch.Tensor]:
    """Tensors of several files, in which each name occurs once."""
    found: dict[str, torch.Tensor] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            assert {**file.metadata(), "crc_num": ""} == {"format": "ms", "crc_num": ""}
            assert not found.keys() & set(file.keys())
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return found


def whole(fixture: Fixture, folder: Path) -> Iterator[Path]:
    """Files with the whole tensors of a fixture."""
    yield from sorted((folder / "unified" if fixture.cut else folder).glob("*.safetensors"))


def stored(fixture: Fixture) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes that a fixture's weights must have."""
    found = {}
    for name, array in fixture.weights().items():
        dtype = fixture.dtype_of(name)
        raw = bfloat16_bits(array).tobytes() if dtype == "bfloat16" else array.tobytes()
        found[name] = (dtype, array.shape, raw)
    return found


def check(fixture: Fixture, folder: Path) -> None:
    found = tensors(*whole(fixture, folder))
    expected = stored(fixture)
    assert set(found) == set(expected) | fixture.state_names()
    for name, (dtype, shape, raw) in expected.items():
        assert (str(found[name].dtype), tuple(found[name].shape)) == (f"torch.{dtype}", shape), name
        assert found[name].view(torch.uint8).numpy().tobytes() == raw, name
    for name in RUN_STATE.keys() & found.keys():
        assert found[name].item() == RUN_STATE[name], name


@pytest.mark.parametrize("name", [name for name in COMMITTED if FIXTURES[name].format == "safetensors"])
def test_the_repository_s_fixtures_hold_the_values_that_tests_compute(name: str) -> None:
    check(FIXTURES[name], FOLDER / name)


def test_the_repository_has_these_fixtures_and_they_are_small() -> None:
    assert sorted(path.name for path in FOLDER.iterdir() if path.is_dir()) == sorted(COMMITTED)
    assert sum(map(len, files(FOLDER).values())) < 300_000


def test_maps_of_names_name_the_files() -> None:
    parts, unified = FOLDER / "qwen2-parts", FOLDER / "glm4_moe-tp2/unified"
    flat = json.loads((parts / "param_name_map.json").read_text())
    assert {name: {key for key, file in flat.items() if file == name} for name in set(flat.values())} == {
        path.name: set(tensors(path)) for path in parts.glob("*.safetensors")
    }
    content = json.loads((unified / "param_name_map.json").read_text())
    expected = stored(FIXTURES["glm4_moe-tp2"])
    assert content["weight_map"] == dict.fromkeys(expected, "part0.safetensors")
    assert content["metadata"]["total_size"] == sum(len(raw) for _, _, raw in expected.values())
    assert set(tensors(unified / "hyper_param.safetensors")) == set(RUN_STATE)


def test_layouts_by_hand() -> None:
    """The oracle's own rules, on rows that say what they are."""
    model = Model(layers=1, hidden=2, heads=4, groups=2, dim=1, ffn=2, experts=2, shared_ffn=2, expert_ffn=2)
    hf = {name.removeprefix("model.layers.0."): array for name, array in hf_weights(model).items()}
    q, k, v = (hf[f"self_attn.{part}_proj.weight"] for part in "qkv")
    gate, up = (hf[f"mlp.shared_experts.{part}_proj.weight"] for part in ("gate", "up"))
    grouped, contiguous = (
        {
            name.removeprefix("decoder.layers.0."): array.tolist()
            for name, array in mindspore_weights(model, layout).items()
        }
        for layout in (Layout(), Layout("contiguous", "contiguous"))
    )
    name = "self_attention.linear_qkv.weight"
    assert grouped[name] == [row.tolist() for row in (q[0], q[1], k[0], v[0], q[2], q[3], k[1], v[1])]
    assert contiguous[name] == [row.tolist() for row in (*q, *k, *v)]
    name = "mlp.shared_experts.linear_fc1.weight"
    assert grouped[name] == [row.tolist() for row in (gate[0], up[0], gate[1], up[1])]
    assert contiguous[name] == [row.tolist() for row in (*gate, *up)]
    first, second = grouped["mlp.experts.weight1"], grouped["mlp.experts.weight2"]
    assert first == contiguous["mlp.experts.weight1"] and (len(first), len(second)) == (2 * 2, 2 * 2)
    expert = {part: hf[f"mlp.experts.1.{part}_proj.weight"] for part in ("gate", "up", "down")}
    assert first[2 + 1] == [expert["gate"][0, 1], expert["gate"][1, 1], expert["up"][0, 1], expert["up"][1, 1]]
    assert second[2 + 1] == [expert["down"][0, 1], expert["down"][1, 1]]


def test_bfloat16_is_rounded_as_by_torch() -> None:
    array = np.array([1 + 1 / 256, 1 + 3 / 256, 1.7, -0.1, 3e-39], np.float32)
    expected = torch.from_numpy(array).to(torch.bfloat16).view(torch.uint16).numpy()
    assert bfloat16_bits(array).tolist() == expected.tolist()


@pytest.mark.mindspore
@pytest.mark.parametrize("name", COMMITTED)
def test_the_repository_s_fixtures_are_made_again_byte_for_byte(name: str, made: Path) -> None:
    again, kept = files(made / name), files(FOLDER / name)
    assert again.keys() == kept.keys()
    for file, data in kept.items():
        assert again[file] == data or json_equal(file, again[file], data), file


def json_equal(file: str, one: bytes, other: bytes) -> bool:
    """mindspore writes the map of names in the order of a set."""
    return file.endswith(".json") and json.loads(one) == json.loads(other)


@pytest.mark.mindspore
@pytest.mark.parametrize("name", [name for name, fixture in FIXTURES.items() if fixture.format == "safetensors"])
def test_all_fixtures_hold_the_values_that_tests_compute(name: str, made: Path) -> None:
    """For distributed ones this includes that mindspore joins what it has cut by the strategies that we wrote."""
    check(FIXTURES[name], made / name)


@pytest.mark.mindspore
@pytest.mark.parametrize("name", ["llama-ckpt", "llama-model-ckpt", "qwen3-float32", "qwen2-parts", "glm4_moe-tp2"])
def test_mindspore_loads_the_values_that_tests_compute(name: str, made: Path) -> None:
    fixture, folder = FIXTURES[name], made / name
    folder = folder / "unified" if fixture.cut else folder
    path = folder if fixture.cut or fixture.parts > 1 else next(folder.iterdir())
    found = load_in_mindspore(path)
    expected = {key: (dtype, shape, zlib.crc32(raw)) for key, (dtype, shape, raw) in stored(fixture).items()}
    assert {key: found[key] for key in expected} == expected
    assert found.keys() - expected.keys() == fixture.state_names()


@pytest.mark.mindspore
def test_mindspore_refuses_a_map_that_names_a_ghost(tmp_path: Path) -> None:
    """The check of our own writer's folders can fail: a missing part, and a name that the map lacks."""
    source = FOLDER / "qwen2-parts"
    names: dict[str, Any] = json.loads((source / "param_name_map.json").read_text())
    for path in source.glob("*.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    del names["output_layer.weight"]
    (tmp_path / "param_name_map.json").write_text(json.dumps(names))
    with pytest.raises(AssertionError, match=r"has not loaded \['output_layer.weight'\]"):
        load_in_mindspore(tmp_path)


@pytest.mark.mindspore
@pytest.mark.parametrize(
    ("family", "dtype", "mlp"),
    [
        ("qwen3", "bfloat16", "interleaved"),
        ("qwen3-moe", "float32", "contiguous"),
        ("deepseek-v3", "bfloat16", "interleaved"),
    ],
)
def test_mindspore_loads_what_we_write(
    family: str, dtype: str, mlp: str, hf_model: Callable[..., Path], tmp_path: Path
) -> None:
    """In parts with their map, by `load_checkpoint` and by way of the map into a network: values by hand, bit for bit."""
    model = hf_model(family, dtype=dtype)
    options = mc.MindSporeOptions(mlp_layout=mlp, max_shard_size=150_000)
    mc.convert(model, tmp_path / "ms", to="mindspore", mindspore=options)
    assert len(list((tmp_path / "ms").glob("part*.safetensors"))) > 1
    groups, dim = (4, 16) if family != "deepseek-v3" else (8, 8)
    tensors = converted(hf_tensors(model), groups, dim, mlp=mlp, qkv="grouped")
    tensors |= {name: tensor.float() for name, tensor in tensors.items() if name.endswith("expert_bias")}
    assert load_in_mindspore(tmp_path / "ms") == {name: described(tensor) for name, tensor in tensors.items()}


def described(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], int]:
    raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), zlib.crc32(raw)

"""MindSpore's weights on disk: every form is read with the values that numpy wrote, and damaged ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_converters.basics.errors import ConversionError, UsageError
from megatron_converters.formats.mindspore.files import read_weight_files
from megatron_converters.formats.mindspore.nonweights import group_of
from megatron_converters.formats.mindspore.recognising import is_mindspore
from megatron_converters.formats.mindspore.tensors import Placed, assembled

from .mindspore_bytes import array, ckpt, joined, metadata, record, refused, same, save, with_header

NORM, FC1 = "decoder.final_layernorm.weight", "decoder.layers.0.mlp.linear_fc1.weight"


# One file


def test_one_file_of_safetensors(tmp_path: Path) -> None:
    weights = {NORM: array(4), FC1: array(6, 4, seed=1, dtype="float16")}
    others = {
        "adam_m.x": array(4),
        "adam_v.x": array(4),
        "global_step": np.array([7], "int32"),
        "a.mlp.router.fi_accu": array(2),
    }
    found = read_weight_files(save(tmp_path / "a.safetensors", weights | others))
    same(found, weights)
    assert found.dropped == {"optimizer": 2, "run state": 1, "router buffers": 1}
    assert (found.root, found.files, found.form) == (tmp_path, (tmp_path / "a.safetensors",), "one file")


def test_bfloat16_keeps_its_bits(tmp_path: Path) -> None:
    bits = np.array([0x3F80, 0xC000, 0x7FC1], "uint16")
    header = {"a": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}, "__metadata__": {"format": "ms"}}
    found = read_weight_files(with_header(tmp_path / "a.safetensors", header, bits.tobytes()))
    assert found.tensors["a"].dtype.name == "bfloat16"
    assert joined(found.tensors["a"]).tolist() == bits.tolist()


def test_packed_integers_are_refused(tmp_path: Path) -> None:
    refused(save(tmp_path / "a.safetensors", {"a": array(2)}, a="qint4x2"), "4-bit")


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", {"a": array(8)})
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, "truncated")


def test_other_paths_are_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    for path in (tmp_path / "a.txt", tmp_path, tmp_path / "absent"):
        with pytest.raises(UsageError):
            read_weight_files(path)
    save(tmp_path / "inner" / "a.safetensors", {"a": array(2)})
    refused(tmp_path, "inner")


# What is no weight


@pytest.mark.parametrize(
    "name",
    "adam_m.embedding.word_embeddings.weight exp_avg_sq.x muon_m.x main_param.x accu_grads.x beta1_power loss_scale scale_window "
    "scale_window_up_count _device_local_norm_x decoder.layers.0.mlp.router.expert_load decoder.layers.0.attention.dropout.seed "
    "decoder.layers.0.self_attention.core_attention.max_logits_val mtp.layers.0.transformer_layer.mlp.router.fi_accu "
    "decoder.layers.0.mlp.tokens_per_expert decoder.layers.0.mlp.experts.num_tokens_per_expert model.layers.0.key_cache".split(),
)
def test_non_weights_have_a_group(name: str) -> None:
    assert group_of(name) is not None


@pytest.mark.parametrize(
    "name",
    "embedding.word_embeddings.weight decoder.layers.0.mlp.router.weight decoder.layers.0.mlp.router.expert_bias "
    "decoder.layers.0.mlp.expert_bias decoder.layers.0.mlp.experts.weight1 decoder.layers.0.mlp.router.tid2eid "
    "model.layers.0.feed_forward.routed_experts.router.dense.weight lora_a.adam_m unknown "
    "decoder.layers.0.self_attention.k_layernorm.weight model.tok_embeddings.embedding_weight "
    "decoder.layers.0.mlp.shared_experts.shared_experts_gate.weight".split(),
)
def test_weights_and_unknown_names_have_none(name: str) -> None:
    assert group_of(name) is None


def test_order_of_experts_must_be_the_identity(tmp_path: Path) -> None:
    name = "decoder.layers.3.mlp.expert_mapping"
    found = read_weight_files(save(tmp_path / "a.safetensors", {"a": array(2), name: np.arange(5, dtype="int32")}))
    assert (list(found.tensors), found.dropped) == (["a"], {"expert order": 1})
    refused(save(tmp_path / "b.safetensors", {"a": array(2), name: np.array([0, 2, 1], "int32")}), name, "relocated")
    refused(save(tmp_path / "b.safetensors", {name: np.zeros((2, 2), "int32")}), name)
    halves = [record(name, [4], "Int32", np.array(half, "int32").tobytes()) for half in ([0, 1], [2, 3], [0, 1])]
    (tmp_path / "c.ckpt").write_bytes(b"".join(halves[:2]))
    assert read_weight_files(tmp_path / "c.ckpt").dropped == {"expert order": 1}
    (tmp_path / "c.ckpt").write_bytes(halves[0] + halves[2])
    refused(tmp_path / "c.ckpt", name)


# Slices


@pytest.mark.parametrize(
    ("offsets", "word"),
    [
        ([(0, 0), (2, 0)], "2 of 4 slices"),
        ([(0, 0), (0, 3), (2, 0), (4, 3)], "overlaps others or leaves"),
        ([(0, 0), (0, 3), (2, 0), (1, 3)], "overlaps others or leaves"),
        ([], "no file holds it"),
    ],
)
def test_slices_fill_the_tensor_once(tmp_path: Path, offsets: list[tuple[int, int]], word: str) -> None:
    part = read_weight_files(save(tmp_path / "a.safetensors", {"a": array(2, 3)})).tensors["a"]
    with pytest.raises(ConversionError, match=word):
        assembled("a", (4, 6), [Placed(part, offset) for offset in offsets])
    with pytest.raises(ConversionError, match="do not tile"):
        assembled("a", (5, 6), [Placed(part, (0, 0))])


# A directory of parts


def parts(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    weights = {f"w{index}": array(3, 2, seed=index) for index in range(4)}
    save(folder / "part0.safetensors", {name: weights[name] for name in ("w0", "w1")})
    save(folder / "part1.safetensors", {name: weights[name] for name in ("w2", "w3")} | {"adam_m.w0": array(3)})
    return weights, {"w0": "part0.safetensors", "w1": "part0.safetensors"} | dict.fromkeys(
        ("w2", "w3"), "part1.safetensors"
    )


@pytest.mark.parametrize("kind", ["none", "flat", "unified"])
def test_directory_of_parts(tmp_path: Path, kind: str) -> None:
    weights, files = parts(tmp_path)
    save(tmp_path / "hyper_param.safetensors", {"global_step": np.array(3), "some_scalar": np.array([1.0])})
    if kind != "none":
        value = files if kind == "flat" else {"metadata": {"total_size": 1}, "weight_map": files}
        (tmp_path / "param_name_map.json").write_text(json.dumps(value))
    found = read_weight_files(tmp_path)
    same(found, weights)
    assert found.dropped == {"optimizer": 1, "run state": 2}
    assert len(found.files) == 3 + (kind != "none")


def test_weight_that_the_strategy_did_not_name_is_kept(tmp_path: Path) -> None:
    save(tmp_path / "part0.safetensors", {"w0": array(2)})
    save(tmp_path / "hyper_param.safetensors", {"bias": array(4)})
    assert set(read_weight_files(tmp_path).tensors) == {"w0", "bias"}


def test_map_is_checked_both_ways(tmp_path: Path) -> None:
    _, files = parts(tmp_path)
    del files["w1"]
    (tmp_path / "param_name_map.json").write_text(
        json.dumps(files | {"ghost": "part0.safetensors", "w3": "part0.safetensors", "w4": "part2.safetensors"})
    )
    refused(
        tmp_path,
        "it lists part2.safetensors, which is not in the folder",
        "it lists ghost, which part0.safetensors does not hold",
        "it lists w3, which part0.safetensors does not hold",
        "it does not list w1 of part0.safetensors",
        "it does not list w3 of part1.safetensors",
    )


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1}', '{"weight_map": []}', "[" * 100_000, '{"a\\n": "b"}'])
def test_broken_map_is_refused(tmp_path: Path, text: str) -> None:
    parts(tmp_path)
    (tmp_path / "param_name_map.json").write_text(text)
    refused(tmp_path, "param_name_map.json")


def test_name_in_two_parts_is_refused(tmp_path: Path) -> None:
    parts(tmp_path)
    save(tmp_path / "part2.safetensors", {"w2": array(3, 2)})
    refused(tmp_path, "w2 (again in part2.safetensors)")


# Checkpoint 2.0

A, B = "model-0000000-0000002.safetensors", "model-0000001-0000002.safetensors"


def iteration(root: Path, contents: dict[str, dict[str, Any]], described: str | None) -> Path:
    folder = root / "iteration_00000012"
    for name, tensors in contents.items():
        save(folder / name, tensors)
    if described is not None:
        (folder / "metadata.json").write_text(described)
    (root / "latest_checkpointed_iteration.txt").write_text("12")
    return folder


def sliced(root: Path, **changes: Any) -> Path:
    """A checkpoint of two files: w in two rows and two columns of slices, b on both, an optimizer's moment."""
    w, b = array(4, 6), array(3, seed=1)
    contents = {
        A: {"w0": b, "w": w[:2, :3], "b": b},
        B: {"w": w[:2, 3:], "b": b, "a.mlp.router.fi_accu": b},
        "x-model-0000002-0000002.safetensors": {"w": w[2:, :3]},
        "x-model-0000003-0000002.safetensors": {"w": w[2:, 3:]},
        "opt-0000000-0000002.safetensors": {"adam_m.w": w, "other": w},
    }
    c, d, opt = list(contents)[2:]
    described = metadata(
        {
            "w": ((4, 6), (2, 2), {0: [A], 1: [B], 2: [c], 3: [d]}),
            "b": ((3,), (1,), {0: [A, B]}),
            "w0": ((3,), (1,), {0: [A]}),
            "a.mlp.router.fi_accu": ((3,), (1,), {0: [B]}),
            "adam_m.w": ((4, 6), (1, 1), {0: [opt]}),
            "other": ((4, 6), (1, 1), {0: [opt]}),
        }
    )
    return iteration(root, contents, changes.get("described", described))


def test_checkpoint_2_of_slices(tmp_path: Path) -> None:
    folder = sliced(tmp_path)
    for path in (tmp_path, folder):
        found = read_weight_files(path)
        same(found, {"w": array(4, 6), "b": array(3, seed=1), "w0": array(3, seed=1)})
        assert (found.root, found.form) == (folder, "checkpoint 2.0")
        assert found.dropped == {"optimizer": 2, "router buffers": 1}
        assert len(found.tensors["b"].copies) == 1
        assert not any(file.name.startswith("opt") for file in found.files)


def test_checkpoint_2_with_whole_tensors_where_slices_are_listed(tmp_path: Path) -> None:
    w = array(4, 6)
    described = metadata({"w": ((4, 6), (2, 1), {0: [A], 1: [B]})})
    found = read_weight_files(iteration(tmp_path, {A: {"w": w}, B: {"w": w}}, described))
    same(found, {"w": w})
    assert len(found.tensors["w"].copies) == 1


def test_slices_are_numbered_by_rows(tmp_path: Path) -> None:
    w = array(4, 6)
    names = [f"model-{index:07d}-0000006.safetensors" for index in range(6)]
    places = [(row, column) for row in (0, 2) for column in (0, 2, 4)]
    contents = {
        name: {"w": w[row : row + 2, column : column + 2]} for name, (row, column) in zip(names, places, strict=True)
    }
    files = {index: [name] for index, name in enumerate(names)}
    same(read_weight_files(iteration(tmp_path, contents, metadata({"w": ((4, 6), (2, 3), files)}))), {"w": w})


def test_index_of_a_numpy_number(tmp_path: Path) -> None:
    described = metadata({"w": ((4,), (2,), {0: [A], 1: [B]})}).replace("(1,)", "(np.int64(1),)")
    iteration(tmp_path, {A: {"w": array(4)[:2]}, B: {"w": array(4)[2:]}}, described)
    same(read_weight_files(tmp_path), {"w": array(4)})


def test_checkpoint_2_of_one_card(tmp_path: Path) -> None:
    iteration(tmp_path, {"p-model-0000000-0000001.safetensors": {"w": array(4)}}, None)
    same(read_weight_files(tmp_path), {"w": array(4)})


def test_checkpoint_2_without_its_metadata(tmp_path: Path) -> None:
    refused(iteration(tmp_path, {A: {"w": array(2)}, B: {"w": array(2)}}, None), "metadata.json", "- w")
    (tmp_path / "iteration_00000012" / B).unlink()
    refused(tmp_path, "lacks model files")


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        (f'"file_name": "{B}"', '"file_name": "model-0000009-0000010.safetensors"', "which is not there"),
        ("('w', (3,))", "('w', (4,))", "[0, 1, 2, 3] are listed and [0, 1, 2, 4] stored"),
        ("('w', (3,))", "('ghost', (3,))", "does not list w of"),
        ("('w', (3,))", "__import__('os')", "is no slice"),
        ("('w', (3,))", "(" * 5000, "is no slice"),
        ('"global_offset": [3]', '"global_offset": [2]', "slices"),
        ('"global_offset": [3]', '"global_offset": ["3"]', "whole numbers"),
        ('"axis_fragmentations": [2, 2]', '"axis_fragmentations": [4, 1]', "even cut"),
        ('"axis_fragmentations": [2, 2]', '"axis_fragmentations": [0, 2]', "divide"),
        ('"axis_fragmentations": [2, 2]', f'"axis_fragmentations": [2, {1 << 62}]', "divide"),
        ('"global_shape": [4, 6]', '"global_shape": [8, 6]', "even cut"),
        ('"local_shape": [3]', '"local_shape": [4]', "even cut"),
        ('"global_shape": [3]', '"global_shape": [-3]', "whole numbers"),
        ('"storage_data"', '"data"', "storage_data"),
        ('"chunk"', '"chunks"', "lists no slices"),
        ("{", "[", "cannot read"),
        ("{", "[" * 100_000, "cannot read"),
    ],
)  # fmt: skip
def test_damaged_metadata_is_refused(tmp_path: Path, old: str, new: str, word: str) -> None:
    path = sliced(tmp_path) / "metadata.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    refused(tmp_path, word)


def test_damaged_checkpoint_2_is_refused(tmp_path: Path) -> None:
    folder = sliced(tmp_path)
    save(folder / A, {"w0": array(3), "w": array(2, 4), "b": array(3)})
    refused(tmp_path, "(2, 4) instead of (2, 3)")
    save(folder / A, {"w0": array(3), "b": array(3)})
    refused(tmp_path, f"lists w in {A}, which does not hold it")
    save(folder / A, {"w0": array(3), "w": array(2, 3, dtype="float16"), "b": array(3)})
    refused(tmp_path, "do not agree")
    save(folder / A, {"w0": array(3), "w": array(2, 3), "b": array(3), "extra": array(1)})
    refused(tmp_path, f"does not list extra of {A}")


def test_tracker_names_an_iteration_that_is_there(tmp_path: Path) -> None:
    sliced(tmp_path)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    for text, word in (("13", "iteration_00000013"), ("release", "'release'"), ("9" * 30, "instead of an iteration")):
        tracker.write_text(text)
        refused(tmp_path, word)


@pytest.mark.parametrize("kind", ["iteration", "parts"])
def test_one_of_several_files_is_refused(tmp_path: Path, kind: str) -> None:
    if kind == "iteration":
        path = sliced(tmp_path) / A
    else:
        (tmp_path / "param_name_map.json").write_text(json.dumps(parts(tmp_path)[1]))
        path = tmp_path / "part0.safetensors"
    refused(path, "one of several files", f"give their folder, {path.parent}")


# Recognising


def test_recognises_paths(tmp_path: Path) -> None:
    ms = save(tmp_path / "a" / "x.safetensors", {"a": array(2)})
    hf = save(tmp_path / "b" / "x.safetensors", {"a": array(2)}, format="pt")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.ckpt").write_bytes(ckpt({"a": array(2)}))
    (tmp_path / "c" / "lightning.ckpt").write_bytes(b"PK\x03\x04")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "latest_checkpointed_iteration.txt").write_text("1")
    (tmp_path / "d" / "iter_0000001").mkdir()
    (tmp_path / "e.safetensors").write_bytes(b"damaged")
    sliced(tmp_path / "f")
    save(tmp_path / "g" / "rank_0" / "x.safetensors", {"a": array(2)})
    (tmp_path / "h" / "rank_0").mkdir(parents=True)
    right = [
        ms,
        ms.parent,
        tmp_path / "c" / "x.ckpt",
        tmp_path / "f",
        tmp_path / "f" / "iteration_00000012",
        tmp_path / "g",
    ]
    wrong = [
        hf,
        hf.parent,
        tmp_path / "c" / "lightning.ckpt",
        tmp_path / "d",
        tmp_path / "e.safetensors",
        tmp_path / "h",
    ]
    assert [is_mindspore(path) for path in right] == [True] * len(right)
    assert [is_mindspore(path) for path in [*wrong, tmp_path / "absent"]] == [False] * (len(wrong) + 1)

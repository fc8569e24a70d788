"""MindSpore's .ckpt files: tensors are mapped where they lie, and damaged files are refused without filling the memory."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_converters.basics.errors import ConversionError
from megatron_converters.formats.mindspore.files import read_weight_files

from .mindspore_bytes import array, arrays, ckpt, content, joined, number, record, refused, same, varint


def test_ckpt_by_an_independent_encoder(tmp_path: Path) -> None:
    weights = {"norm": array(5, dtype="float16"), "fc1": array(6, 4), "x": array(2, 3, 4, seed=2), "one": array()}
    others = {"epoch_num": np.array(3, "int64"), "global_step": np.array([2], "uint64")}
    text = record("note", [0], "str", "abc".encode("utf-32-le"))
    path = tmp_path / "a.ckpt"
    path.write_bytes(ckpt(weights) + text + ckpt(others))
    found = read_weight_files(path)
    same(found, weights)
    assert (found.form, found.dropped) == (".ckpt", {"run state": 3})
    path.write_bytes(path.read_bytes() + b"crc_num" + bytes(10))
    same(read_weight_files(path), weights)


def test_ckpt_by_google_protobuf(tmp_path: Path) -> None:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="test_checkpoint.proto", package="test_mindspore")
    types = {"int64": field.TYPE_INT64, "string": field.TYPE_STRING, "bytes": field.TYPE_BYTES}
    for name, fields in {
        "TensorProto": (("dims", "int64", True), ("tensor_type", "string", False), ("tensor_content", "bytes", False)),
        "Value": (("tag", "string", False), ("tensor", "TensorProto", False)),
        "Checkpoint": (("value", "Value", True),),
    }.items():
        message = file.message_type.add(name=name)
        for index, (called, kind, repeated) in enumerate(fields, 1):
            label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            added = message.field.add(name=called, number=index, label=label, type=types.get(kind, field.TYPE_MESSAGE))
            if kind not in types:
                added.type_name = f".test_mindspore.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    checkpoint = message_factory.GetMessageClass(pool.FindMessageTypeByName("test_mindspore.Checkpoint"))()
    weights = {"a": array(300, 7), "b": array(2, 2, 2, seed=1)}
    for name, values in weights.items():
        value = checkpoint.value.add(tag=name)
        value.tensor.dims.extend(values.shape)
        value.tensor.tensor_type, value.tensor.tensor_content = "Float32", values.tobytes()
    path = tmp_path / "a.ckpt"
    path.write_bytes(checkpoint.SerializeToString())
    same(read_weight_files(path), weights)
    assert path.read_bytes() == ckpt(weights)  # and the encoder of these tests writes the same


def test_scalar_of_older_releases(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(record("one", [0], "Float32", np.float32(2.5).tobytes()) + record("none", [0, 3], "Float32", b""))
    found = arrays(read_weight_files(path))
    assert (found["one"].shape, found["one"].item(), found["none"].shape) == ((), 2.5, (0, 3))


@pytest.mark.parametrize("shape", [(50,), (10, 5), (5, 2, 5), (1, 50), (2, 1, 25)])
@pytest.mark.parametrize("size", [4, 12, 20, 28, 60, 100, 200])
def test_large_tensor_in_several_values(tmp_path: Path, shape: tuple[int, ...], size: int) -> None:
    values = array(*shape)
    data = values.tobytes()
    chunks = [record("a", shape, "Float32", data[at : at + size]) for at in range(0, len(data), size)]
    (tmp_path / "a.ckpt").write_bytes(ckpt({"b": array(3)}) + b"".join(chunks) + ckpt({"c": array(2)}))
    found = read_weight_files(tmp_path / "a.ckpt")
    same(found, {"b": array(3), "a": values, "c": array(2)})


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"\xd8\x5e\x3a\x7f" + bytes(60), "encrypted"),
        (b"PK\x03\x04" + bytes(60), "no checkpoint of MindSpore"),
        (content(1, content(1, "a") + content(3, b"")), "MapParameter"),
        (record("a", [2], "Int4", bytes(1)), "Int4"),
        (record("a", [2], "Float32", bytes(7)), "7 are stored"),
        (record("a", [1 << 62, 1 << 62], "Float32", bytes(8)), "8 are stored"),
        (record("a", [-1], "Float32", bytes(4)), "shape"),
        (record("a\n", [1], "Float32", bytes(4)), "names a tensor"),
        (record("a" * 5000, [1], "Float32", bytes(4)), "malformed"),
        (record("a", [2], "Float32", bytes(6)) + record("a", [2], "Float32", bytes(2)), "within an element"),
        (record("a", [2], "Float32", bytes(4)) + record("a", [1, 2], "Float32", bytes(4)), "different shapes"),
        (b"".join(record(name, [1], "Float32", bytes(4)) for name in "aba"), "occurs twice"),
        (varint(10) + varint(1 << 62), "malformed"),
        (b"\x0a" + b"\xff" * 11, "malformed"),
        (
            content(1, content(1, "a") + content(2, content(1, bytes(1 << 17)) + content(2, "Int8") + content(3, b""))),
            "malformed",
        ),
        (content(1, content(1, "a")), "lacks its name or tensor"),
        (content(1, number(1, 3)), "lacks its name or tensor"),
        (content(1, content(1, "a") + content(2, content(2, "Float32"))), "lacks its type or content"),
        (b"\x0b", "malformed"),
        # Content that ends in the next value.
        (
            content(1, content(1, "a") + content(2, number(1, 3) + content(2, "Int8") + varint(26) + varint(3) + b"ab"))
            + ckpt({"b": array(9)}),
            "malformed",
        ),
    ],
)
def test_damaged_ckpt_is_refused(tmp_path: Path, data: bytes, word: str) -> None:
    (tmp_path / "a.ckpt").write_bytes(data)
    refused(tmp_path / "a.ckpt", str(tmp_path / "a.ckpt"), word)


def test_every_truncation_of_a_ckpt_is_refused(tmp_path: Path) -> None:
    first = ckpt({"a": array(2, 2)})
    data = first + ckpt({"b": array(1)})
    path = tmp_path / "a.ckpt"
    for length in {*range(len(data))} - {len(first)}:  # a whole message is a whole file
        path.write_bytes(data[:length])
        refused(path)


def test_random_damage_never_ends_otherwise(tmp_path: Path) -> None:
    generator = random.Random(5)
    data = ckpt({"a": array(2, 2), "b": array(3), "global_step": np.array(1, "int64")})
    path = tmp_path / "a.ckpt"
    for _ in range(1500):
        damaged = bytearray(data)
        for _ in range(generator.randint(1, 3)):
            damaged[generator.randrange(len(damaged))] = generator.choice(
                [0, 1, 10, 127, 128, 255, generator.randrange(256)]
            )
        path.write_bytes(damaged)
        try:
            found = read_weight_files(path)
        except ConversionError:
            continue
        for tensor in found.tensors.values():
            joined(tensor)


def test_sparse_ckpt_of_a_gigabyte_takes_no_memory(tmp_path: Path) -> None:
    path, rows, half = tmp_path / "a.ckpt", 75_000, 512 << 20
    nbytes = rows * 3584 * 4
    with open(path, "wb") as file:
        for size in (half, nbytes - half):  # 512 MiB is not a whole number of these rows
            tensor = (
                b"".join(number(1, dim) for dim in (rows, 3584)) + content(2, "Float32") + varint(26) + varint(size)
            )
            value = content(1, "a") + varint(18) + varint(len(tensor) + size)
            file.write(varint(10) + varint(len(value) + len(tensor) + size) + value + tensor)
            file.truncate(file.tell() + size)
            file.seek(0, 2)
    tracemalloc.start()
    found = read_weight_files(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert [(data.shape, offset) for data, offset in found.tensors["a"].slices] == [
        ((37449, 3584), (0, 0)),
        ((1, 512), (37449, 0)),
        ((1, 3072), (37449, 512)),
        ((37550, 3584), (37450, 0)),
    ]

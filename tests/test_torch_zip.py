"""Files of torch.save, read and written without torch, against torch itself."""

from __future__ import annotations

import argparse
import enum
import io
import random
import shutil
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.serialization import config

from megatron_converters.basics.dtypes import BY_NAME, DType
from megatron_converters.basics.errors import ConversionError
from megatron_converters.storage import torch_zip
from megatron_converters.storage.tensor import StoredTensor
from megatron_converters.storage.torch_zip import NewTensor
from megatron_converters.storage.zip_layout import Record, ZipLayout

BF16 = BY_NAME["bfloat16"]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(shape: tuple[int, ...], dtype: DType, seed: int = 0) -> torch.Tensor:
    count = int(np.prod(shape)) * dtype.itemsize
    data = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return ((data % 2).bool() if dtype.name == "bool" else data.view(dtype.torch)).reshape(shape)


def saved(path: Path, value: Any, **kwargs: Any) -> Any:
    torch.save(value, path, **kwargs)
    return torch_zip.read(path)


def assert_equal(stored: Any, tensor: torch.Tensor) -> None:
    assert isinstance(stored, StoredTensor)
    assert stored.dtype.torch == tensor.dtype and stored.shape == tuple(tensor.shape)
    assert np.ascontiguousarray(stored.array()).tobytes() == raw(tensor)


# Reading


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_a_checkpoint(tmp_path: Path, protocol: int) -> None:
    tensors = {name: random_tensor((3, 4), dtype, seed) for seed, (name, dtype) in enumerate(BY_NAME.items())}
    args = argparse.Namespace(
        params_dtype=torch.bfloat16, bf16=True, lr=1e-5, layers=[1, (2, None)], name="ü", empty=b""
    )
    state = {"args": args, "model": OrderedDict(tensors), "checkpoint_version": 3.0, "big": 2**70, "names": {"a"}}
    found = saved(tmp_path / "model_optim_rng.pt", state, pickle_protocol=protocol)
    assert type(found["args"]) is argparse.Namespace and type(found["model"]) is OrderedDict
    assert found["args"].params_dtype == BF16
    assert vars(found["args"]) | {"params_dtype": torch.bfloat16} == vars(args)
    assert (found["checkpoint_version"], found["big"], found["names"]) == (3.0, 2**70, {"a"})
    for name, tensor in tensors.items():
        assert_equal(found["model"][name], tensor)


def test_reads_views_and_shared_storages(tmp_path: Path) -> None:
    base = random_tensor((6, 8), BF16)
    views = {
        "base": base,
        "transposed": base.t(),
        "row": base[3],
        "part": base[2:5, 1::3],
        "expanded": base[:1].expand(4, 8),
        "scalar": base[5, 7],
        "empty": base[6:],
    }
    found = saved(tmp_path / "a.pt", views)
    for name, tensor in views.items():
        assert_equal(found[name], tensor)
        assert found[name].strides == tensor.stride()


def test_reads_parameters_and_tensors_with_attributes(tmp_path: Path) -> None:
    plain, parameter, both = torch.ones(3), torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.zeros(4))
    plain.partition_dim = 0  # type: ignore[attr-defined]
    both.partition_dim = 1  # type: ignore[attr-defined]
    for stored, tensor in zip(
        saved(tmp_path / "a.pt", [plain, parameter, both]), (plain, parameter, both), strict=True
    ):
        assert_equal(stored, tensor)


def test_reads_what_else_checkpoints_hold(tmp_path: Path) -> None:
    generator = np.random.RandomState(3)
    value: dict[str, Any] = {
        "size": torch.Size([2, 3]),
        "device": [torch.device("cpu"), torch.device("cuda", 1)],
        "layout": torch.strided,
        "scalars": [np.float32(1.5), np.int64(-3), np.bool_(True)],
        "numpy": generator.get_state(),
        "matrix": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "python": random.Random(3).getstate(),
        "fp8": io.BytesIO(b"extra state"),
        "complex": 1j,
        "frozen": frozenset([1]),
    }
    found = saved(tmp_path / "a.pt", value)
    assert found["size"] == (2, 3) and found["device"] == ["cpu", "cuda:1"] and found["layout"] == "torch.strided"
    assert found["scalars"] == value["scalars"] and type(found["scalars"][0]) is np.float32
    assert np.array_equal(found["numpy"][1], generator.get_state()[1])  # type: ignore[index]
    assert np.array_equal(found["matrix"], value["matrix"])
    assert found["python"] == value["python"]
    assert found["fp8"].qualname == "BytesIO" and found["fp8"].state[0] == b"extra state"
    assert (found["complex"], found["frozen"]) == (1j, frozenset([1]))


def test_reads_the_smallest_tree_and_unusual_archives(tmp_path: Path) -> None:
    assert saved(tmp_path / "a.pt", None) is None
    buffer = io.BytesIO()
    torch.save({"x": 1}, buffer)
    (tmp_path / "b.pt").write_bytes(b"a prefix, as of a self-extracting file" + buffer.getvalue())
    assert torch_zip.read(tmp_path / "b.pt") == {"x": 1}
    torch.serialization.set_crc32_options(False)
    try:
        assert saved(tmp_path / "c.pt", {"x": 1}) == {"x": 1}
    finally:
        torch.serialization.set_crc32_options(True)


def rezipped(source: Path, target: Path, compression: int = zipfile.ZIP_STORED, **replace: bytes | None) -> Path:
    """A copy of the archive with some records replaced, or removed where the replacement is None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            short = info.filename.partition("/")[2].replace("/", "_").replace(".", "_")
            content = replace.get(short, old.read(info))
            if content is not None:
                new.writestr(info.filename, content)
    return target


def test_faulty_files(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    torch.save({"w": torch.ones(100)}, good)
    data = good.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(ConversionError, match=message) as raised:
            torch_zip.read(bad)
        assert str(bad) in str(raised.value)

    for content, message in (
        (b"", "is empty"),
        (b"hello", "not a file of torch.save"),
        (data[: len(data) // 2], "truncated.*copy it again"),
        (data[:-1], "truncated.*copy it again"),
        (data.replace(b"data.pkl", b"date.pkl"), "zip file without data.pkl"),
        (data.replace(b"FloatStorage", b"FloatStoragE"), "does not match its checksum"),
    ):
        bad.write_bytes(content)
        refused(message)
    torch.save({"w": 1}, bad, _use_new_zipfile_serialization=False)
    refused("torch < 1.6")
    rezipped(good, bad, byteorder=b"big")
    refused("big-endian")
    rezipped(good, bad, zipfile.ZIP_DEFLATED)
    refused("compressed")
    rezipped(good, bad, data_0=b"1234")
    refused("storage 0 should hold 100 elements of float32, but is 4 bytes long")
    rezipped(good, bad, data_0=None)
    refused("lacks its record data/0")
    with pytest.raises(ConversionError, match="cannot open"):
        torch_zip.read(tmp_path / "absent.pt")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_unsupported_tensors_are_refused(tmp_path: Path) -> None:
    for tensor in (
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, device="meta"),
    ):
        with pytest.raises(ConversionError, match=r"asks for torch\.?\w*\.\w+, which"):
            saved(tmp_path / "a.pt", tensor)


def test_a_view_that_torch_reads_negated_is_refused(tmp_path: Path) -> None:
    """The stored elements of `conj().imag` have the other sign."""
    ones = torch.ones(3)
    negated = torch.complex(ones, ones).conj().imag
    assert negated.is_neg()
    with pytest.raises(
        ConversionError, match=r"stored as a view with \{'neg': True\}; save it again after \.clone\(\)"
    ):
        saved(tmp_path / "a.pt", negated)


def test_a_record_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """Readers differ in which of them they take."""
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(100)}, path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a/data/0", bytes(400))
    with pytest.raises(ConversionError, match="several records with the same name"):
        torch_zip.read(path)


def test_damage_is_never_another_error(tmp_path: Path) -> None:
    """Whatever byte is wrong, the reader returns or raises ConversionError."""
    torch.save({"args": argparse.Namespace(a=[np.float32(1), np.arange(3)]), "w": torch.ones(3)}, tmp_path / "good.pt")
    data = (tmp_path / "good.pt").read_bytes()
    directory = data.index(b"PK\1\2")
    start, end = data.index(b"\x80\x02"), data.index(b"PK\7\10")
    generator = random.Random(5)
    for trial in range(600):
        damaged = bytearray(data)
        low, high = (start, end) if trial % 2 else (directory, len(data))
        for _ in range(generator.randint(1, 3)):
            damaged[generator.randrange(low, high)] = generator.randrange(256)
        if trial % 2:  # a checksum of 0 is not compared, so that the damage reaches the unpickler
            damaged[directory + 16 : directory + 20] = bytes(4)
        (tmp_path / "bad.pt").write_bytes(damaged)
        try:
            torch_zip.read(tmp_path / "bad.pt")
        except ConversionError as error:
            assert "bad.pt" in str(error)


# Writing


class Plain(enum.IntEnum):
    ONE = 1


def full_tree() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A tree with everything that can be written, and the tensors to fill it with."""
    tensors = {name: random_tensor((5, 7), dtype, seed) for seed, (name, dtype) in enumerate(BY_NAME.items())}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "vector": torch.arange(9)}
    args = argparse.Namespace(
        params_dtype=BF16,
        integers=[0, -1, 255, 2**31 - 1, -(2**31), 2**31, 2**63, -(2**80)],
        floats=(1e-5, float("inf"), 0.0),
        nothing=None,
        flags=[True, False],
        text="ü\ud800",
        nested={"a": {1: ()}, (1, 2): []},
    )
    new = {name: NewTensor(name, BY_NAME[str(value.dtype)[6:]], tuple(value.shape)) for name, value in tensors.items()}
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 1,
        "model": OrderedDict(new, _extra_state=None),
    }, tensors


def write(path: Path, step: int = 13) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    tree, tensors = full_tree()
    file = torch_zip.lay_out(path, tree)
    for name, tensor in tensors.items():
        data = raw(tensor)
        for start in range(0, len(data), step):
            file.write(name, start, memoryview(data)[start : start + step])
    file.close()
    assert path.stat().st_size == file.nbytes == torch_zip.layout(path, tree).nbytes
    return tree, tensors


def assert_tree(found: dict[str, Any], tree: dict[str, Any], dtype: Any) -> None:
    assert list(found) == list(tree) and list(found["model"]) == list(tree["model"])
    assert type(found["args"]) is argparse.Namespace and type(found["model"]) is OrderedDict
    assert vars(found["args"]) == vars(tree["args"]) | {"params_dtype": dtype}
    assert (found["checkpoint_version"], found["iteration"], found["model"]["_extra_state"]) == (3.0, 1, None)


@pytest.mark.parametrize("kwargs", [{"weights_only": True}, {"weights_only": False}, {"mmap": True}])
@pytest.mark.parametrize("calculate", [False, True])
def test_torch_reads_what_is_written(
    tmp_path: Path, kwargs: dict[str, bool], calculate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")  # torch then compares its offsets with the zip's
    tree, tensors = write(tmp_path / "model_optim_rng.pt")
    offsets = config.patch("load.calculate_storage_offsets", calculate)  # type: ignore[attr-defined]
    with offsets, torch.serialization.safe_globals([argparse.Namespace]):
        found = torch.load(tmp_path / "model_optim_rng.pt", **kwargs)  # type: ignore[arg-type]
    assert_tree(found, tree, torch.bfloat16)
    for name, tensor in tensors.items():
        loaded = found["model"][name]
        assert (loaded.dtype, loaded.shape, loaded.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
        assert raw(loaded) == raw(tensor)


def test_reads_what_it_writes(tmp_path: Path) -> None:
    tree, tensors = write(tmp_path / "model_optim_rng.pt.tmp")
    found = torch_zip.read(tmp_path / "model_optim_rng.pt.tmp")
    assert_tree(found, tree, BF16)
    for name, tensor in tensors.items():
        assert_equal(found["model"][name], tensor)


def test_the_zip_file_is_right(tmp_path: Path) -> None:
    path = tmp_path / "model_optim_rng.pt"
    write(path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
    torch.save({"w": torch.ones(1)}, tmp_path / "model_optim_rng.pth")
    with zipfile.ZipFile(tmp_path / "model_optim_rng.pth") as theirs:
        assert [name for name in names if "/data/" not in name] == [n for n in theirs.namelist() if "/data/" not in n]
    if unzip := shutil.which("unzip"):
        subprocess.run([unzip, "-tq", path], check=True, stdout=subprocess.DEVNULL)


def test_equals_torch_byte_for_byte(tmp_path: Path) -> None:
    """All but the pickle and the serialization id, which are given: headers, alignment, descriptors, directory."""
    torch.save([random_tensor((n,), BF16, n) for n in (0, 1, 31, 32, 33, 1000)], tmp_path / "some.name.pt")
    data = (tmp_path / "some.name.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "some.name.pt") as archive:
        records = [Record(info.filename, info.file_size, archive.read(info)) for info in archive.infolist()]
    layout = ZipLayout(records)
    assert b"".join(piece for _, piece in layout.writes({})) == data
    assert layout.nbytes == len(data)


def test_large_files_equal_torch(tmp_path: Path) -> None:
    """Records and offsets beyond 4 GiB, against the (sparse) file that torch lays out."""
    with FakeTensorMode():
        sizes = (3, 5 << 30, 5, 5 << 30, 0)
        tensors = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    path = tmp_path / "big.pt"
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(tensors, path)
    assert [stored.shape for stored in torch_zip.read(path)] == [(size,) for size in sizes]
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        infos = archive.infolist()
        hollow = {info.filename for info in infos if "/data/" in info.filename}
        layout = ZipLayout(
            [
                Record(info.filename, info.file_size, None if info.filename in hollow else archive.read(info))
                for info in infos
            ]
        )
        assert layout.nbytes == path.stat().st_size
        for offset, piece in layout.writes(dict.fromkeys(hollow, 0)):
            file.seek(offset)
            assert file.read(len(piece)) == piece


def test_many_records(tmp_path: Path) -> None:
    """More than the 65,535 that the old directory record can count."""
    layout = ZipLayout([Record(f"a/data/{number}", 1, b"x") for number in range(66_000)])
    (tmp_path / "a.zip").write_bytes(b"".join(piece for _, piece in layout.writes({})))
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert len(archive.infolist()) == 66_000 and archive.read("a/data/65999") == b"x"


def test_an_unfinished_file_is_not_readable(tmp_path: Path) -> None:
    tree, _ = full_tree()
    file = torch_zip.lay_out(tmp_path / "a.pt", tree)
    with pytest.raises(ConversionError):
        torch_zip.read(tmp_path / "a.pt")
    with pytest.raises(ConversionError, match="float32: 0 of 140 bytes written"):
        file.close()
    file.discard()
    assert not (tmp_path / "a.pt").exists()


def test_the_serialization_id_follows_the_content(tmp_path: Path) -> None:
    ids = []
    for value in (1, 2):
        file = torch_zip.lay_out(tmp_path / "a.pt", NewTensor("w", BY_NAME["uint8"], (1,)))
        file.write("w", 0, np.array([value], "u1"))
        file.close()
        ids.append(torch._C.PyTorchFileReader(str(tmp_path / "a.pt")).serialization_id())
    assert ids[0] != ids[1] and all(len(found) == 40 for found in ids)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"args": argparse.Namespace(foo=Plain.ONE)}, r"args\.foo is a .*Plain"),
        ({"args": argparse.Namespace(foo=[1, np.float64(1)])}, r"args\.foo\[1\] is a numpy.float64"),
        ({"model": {"a.b": np.zeros(1)}}, r"model\.a\.b is a numpy.ndarray"),
        ({Plain.ONE: 1}, r"\(the key\) is a .*Plain"),
        (object(), r"the object is a builtins.object"),
        ({"x": 1 << 4000}, r"x is an integer of 4001 bits"),
        ([NewTensor("w", BF16, (1,)), NewTensor("w", BF16, (1,))], r"two tensors of one file are called w"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, tree: Any, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        torch_zip.lay_out(tmp_path / "a.pt", tree)
    assert not (tmp_path / "a.pt").exists()

"""safetensors files and the filling of laid-out files, against the safetensors library."""

from __future__ import annotations

import copy
import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_converters.basics.dtypes import BY_NAME, DType
from megatron_converters.basics.errors import ConversionError
from megatron_converters.storage import output_file, safetensors
from megatron_converters.storage.tensor import StoredTensor

TensorMap = dict[str, torch.Tensor]


def example() -> TensorMap:
    """One tensor of every dtype, an empty one and a scalar, with random bytes."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for dtype in BY_NAME.values():
        data = torch.randint(0, 256, (3, 5 * dtype.itemsize), generator=generator, dtype=torch.uint8)
        tensors[f"layer.{dtype.name}"] = (data % 2).bool() if dtype.name == "bool" else data.view(dtype.torch)
    return {**tensors, "empty": torch.empty(0, 4, dtype=torch.bfloat16), "scalar": torch.tensor(1.5)}


def described(tensors: TensorMap) -> dict[str, tuple[DType, tuple[int, ...]]]:
    return {name: (BY_NAME[str(value.dtype)[6:]], tuple(value.shape)) for name, value in tensors.items()}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def fill(file: output_file.OutputFile, tensors: TensorMap, step: int = 7) -> None:
    """Write each tensor in pieces of `step` bytes."""
    for name, tensor in tensors.items():
        data = raw(tensor)
        for start in range(0, len(data), step):
            file.write(name, start, memoryview(data)[start : start + step])


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data)
    return path


def entry(start: int, stop: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = example()
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt", "note": "ü"})
    found = safetensors.read(tmp_path / "a.safetensors")
    assert found.metadata == {"format": "pt", "note": "ü"}
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found.tensors[name].dtype, found.tensors[name].shape) == described(tensors)[name]
        assert found.tensors[name].array().tobytes() == raw(tensor)
        assert found.tensors[name].nbytes == tensor.nbytes


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = example()
    file = safetensors.lay_out(tmp_path / "a.safetensors", described(tensors), {"format": "pt"})
    fill(file, tensors)
    file.close()
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert raw(loaded[name]) == raw(tensor)
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    read_back = safetensors.read(tmp_path / "a.safetensors").tensors
    assert all(stored.offset % stored.dtype.itemsize == 0 for stored in read_back.values())


def test_equals_the_library_byte_for_byte(tmp_path: Path) -> None:
    tensors = {f"layer.{i}.weight": torch.full((i + 1, 3), i, dtype=torch.bfloat16) for i in range(9)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    layout = safetensors.layout(described(tensors), {"format": "pt"})
    file = layout.create(tmp_path / "ours")
    fill(file, tensors)
    file.close()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert layout.nbytes == file.nbytes == (tmp_path / "theirs").stat().st_size


def test_keeps_the_order_of_one_dtype(tmp_path: Path) -> None:
    dtype = BY_NAME["float32"]
    file = safetensors.lay_out(tmp_path / "a", {"z": (dtype, (1,)), "a": (dtype, (1,))}, {})
    fill(file, {"z": torch.ones(1), "a": torch.zeros(1)})
    file.close()
    found = safetensors.read(tmp_path / "a")
    assert list(found.tensors) == ["z", "a"] and found.metadata == {}
    assert found.tensors["z"].offset < found.tensors["a"].offset


def test_a_file_without_tensors(tmp_path: Path) -> None:
    safetensors.lay_out(tmp_path / "a", {}, {}).close()
    assert safetensors.read(tmp_path / "a") == safetensors.SafetensorsFile({}, {})
    assert load_file(tmp_path / "a") == {}


@pytest.mark.parametrize("cut", [1, 30, 59])
def test_truncated(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"first": torch.zeros(2), "second": torch.zeros(13)}, path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ConversionError, match=rf"a\.safetensors is truncated: {cut} bytes are missing .*copy it again"):
        safetensors.read(path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 4)}, b"12345", r"1 bytes follow a"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, b"123456", r"b overlaps a"),
        ({"a": entry(0, 4), "b": entry(6, 8)}, b"12345678", r"b leaves 2 unused bytes after a"),
        ({"a": entry(2, 4)}, b"1234", r"a leaves 2 unused bytes after the header"),
        ({"a": entry(0, 4, shape=[5])}, b"1234", r"a is uint8 \(5,\), 5 bytes, but its offsets 0 to 4 span 4"),
        ({"a": entry(0, 4, dtype="F4")}, b"1234", r"a has dtype F4"),
        ({"a": entry(0, 4, dtype=[])}, b"1234", r"a has dtype \[\]"),  # type: ignore[arg-type]
        ({"a": entry(0, 4, shape=[-2, -2])}, b"1234", r"a has a shape or offset that is not a whole number"),
        ({"a": entry(0, 4, shape=[True, 4])}, b"1234", r"not a whole number"),
        ({"a": {"dtype": "U8"}}, b"", r"entry for a is not dtype, shape, data_offsets"),
        ({"a": 3}, b"", r"entry for a"),
        ({"__metadata__": {"a": 1}}, b"", r"not a map of strings"),
        (b'{"a": {}, "a": {}}', b"", r"a occurs twice"),
        (b"[]", b"", r"not a JSON object"),
        (b"{", b"", r"not JSON"),
        (b"\xff", b"", r"not JSON"),
        (b"[" * 100_000, b"", r"not JSON"),
    ],
)
def test_faults_name_file_and_tensor(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    path = raw_file(tmp_path / "m.safetensors", header, data)
    with pytest.raises(ConversionError, match=message) as raised:
        safetensors.read(path)
    assert str(path) in str(raised.value)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="header"):
        safetensors.read(raw_file(tmp_path / "a", {}, length=1000))
    for content, message in (
        (b"", "is empty"),
        (b"PK\3\4 this is a zip file", "not a safetensors file"),
        (b"{}", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    ):
        (tmp_path / "b").write_bytes(content)
        with pytest.raises(ConversionError, match=message):
            safetensors.read(tmp_path / "b")
    with pytest.raises(ConversionError, match=r"cannot open .*No such file"):
        safetensors.read(tmp_path / "absent")
    with pytest.raises(ConversionError, match="__metadata__"):
        safetensors.layout({"__metadata__": (BY_NAME["int8"], (1,))}, {})


def one_tensor_file(path: Path) -> output_file.OutputFile:
    return safetensors.lay_out(path, {"w": (BY_NAME["uint8"], (8,)), "v": (BY_NAME["uint8"], (2,))}, {})


def test_writes_must_follow_on_each_other(tmp_path: Path) -> None:
    file = one_tensor_file(tmp_path / "a")
    file.write("w", 0, memoryview(b"1234"))
    for start, data in ((0, b"1"), (3, b"1"), (5, b"1"), (4, b"12345")):
        with pytest.raises(
            ConversionError, match=r"a: bytes . to . of w do not follow the 4 bytes written before, or exceed its 8"
        ):
            file.write("w", start, memoryview(data))
    with pytest.raises(ConversionError, match="without a tensor called x"):
        file.write("x", 0, memoryview(b"1"))
    with pytest.raises(ConversionError, match=r"incomplete(.|\n)*w: 4 of 8 bytes written(.|\n)*v: 0 of 2"):
        file.close()
    file.discard()
    file.discard()
    assert not (tmp_path / "a").exists()


def test_an_unfinished_file_is_not_readable(tmp_path: Path) -> None:
    file = one_tensor_file(tmp_path / "a")
    file.write("w", 0, np.arange(8, dtype="u1").reshape(2, 4))
    assert (tmp_path / "a").stat().st_size == file.nbytes
    with pytest.raises(ConversionError):
        safetensors.read(tmp_path / "a")
    file.write("v", 0, np.arange(2, dtype="u1"))
    file.write("v", 2, np.empty((0, 3), "u1"))
    file.close()
    file.close()
    assert safetensors.read(tmp_path / "a").tensors["w"].array().tolist() == list(range(8))


def test_threads_fill_different_tensors(tmp_path: Path) -> None:
    tensors = {str(seed): torch.full((1000,), seed, dtype=torch.int32) for seed in range(16)}
    file = safetensors.lay_out(tmp_path / "a", described(tensors), {})
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: fill(file, {name: tensors[name]}), tensors))
    file.close()
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(tmp_path / "a").items())


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = example()
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    file = safetensors.lay_out(tmp_path / "a", described(tensors), {})
    fill(file, tensors, step=11)
    file.close()
    monkeypatch.undo()
    assert {name: raw(value) for name, value in load_file(tmp_path / "a").items()} == {
        name: raw(value) for name, value in tensors.items()
    }


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = one_tensor_file(tmp_path / "a")
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ConversionError, match=r"cannot write w to .*/a: No space left on device; free some space"):
        file.write("w", 0, memoryview(b"1"))
    file.discard()
    monkeypatch.setattr(os, "ftruncate", full)
    with pytest.raises(ConversionError, match="No space left"):
        one_tensor_file(tmp_path / "b")
    assert not (tmp_path / "b").exists()
    with pytest.raises(ConversionError, match=r"cannot write the file to .*No such file"):
        one_tensor_file(tmp_path / "absent" / "c")


def test_stored_tensors_can_be_copied() -> None:
    stored = StoredTensor("f", 8, BY_NAME["bfloat16"], (2,), (1,))
    assert copy.copy(stored) == stored


@pytest.mark.parametrize("left", [0, 9])
def test_a_file_that_was_cut_after_it_was_opened(tmp_path: Path, left: int) -> None:
    save_file({"w": torch.ones(4, 4)}, tmp_path / "a")
    tensor = safetensors.read(tmp_path / "a").tensors["w"]
    os.truncate(tmp_path / "a", left)
    with pytest.raises(ConversionError, match="a has become shorter since it was opened"):
        tensor.array()


def test_storage_needs_no_torch() -> None:
    code = (
        "import sys, megatron_converters.storage.safetensors, megatron_converters.storage.torch_zip;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'safetensors')))"
    )
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)

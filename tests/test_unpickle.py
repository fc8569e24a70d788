"""Hostile pickles are refused, and nothing of them runs; Megatron's own classes are stand-ins."""

from __future__ import annotations

import argparse
import copyreg
import os
import pickle
import signal
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_converters.basics.dtypes import BY_NAME
from megatron_converters.basics.errors import ConversionError
from megatron_converters.storage import pickle_reader, pickle_writer, torch_zip
from megatron_converters.storage.pickle_reader import Builder, StandIn

REFUSED = "nothing in it was run|damaged or hostile"


def archive(path: Path, data: bytes, storage: bytes = b"") -> Path:
    """A torch.save file with this pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/data/0", storage)
    return path


def name(module: str, attribute: str) -> bytes:
    return b"c" + f"{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def program(*opcodes: bytes) -> bytes:
    return b"\x80\x02" + b"".join(opcodes) + b"."


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_calls_are_refused(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "ran"
    for hostile in (
        Call(os.system, f"touch {marker}"),
        Call(eval, f"open({str(marker)!r}, 'w')"),
        Call(exec, f"open({str(marker)!r}, 'w')"),
        Call(open, str(marker), "w"),
        Call(os.mkdir, str(marker)),
        Call(torch.load, str(marker)),
        Call(getattr, os, "system") if protocol >= 4 else Call(getattr, argparse.Namespace, "__init__"),
        Call(__import__, "os"),
        Call(copyreg._reconstructor, argparse.Namespace, object, None),  # type: ignore[attr-defined]
    ):
        try:
            data = pickle.dumps({"model": hostile}, protocol)
        except (TypeError, pickle.PicklingError):
            continue  # modules cannot be pickled: such a pickle must name them, as below
        with pytest.raises(ConversionError, match=REFUSED):
            torch_zip.read(archive(tmp_path / "a.pt", data))
        assert not marker.exists()


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("subprocess", "Popen"),
        ("builtins", "eval"),
        ("__builtin__", "eval"),
        ("builtins", "type"),
        ("builtins", "setattr"),
        ("functools", "partial"),
        ("operator", "attrgetter"),
        ("argparse", "Namespace.__init__.__globals__"),
        ("argparse", "_os.system"),
        ("torch", "load"),
        ("torch", "bfloat16.__class__"),
        ("torch.hub", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch._utils", "_rebuild_qtensor"),
        ("torch._utils", "__builtins__"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "fromfile"),
        ("collections", "OrderedDict.__reduce__"),
        ("megatronic", "anything"),
        ("megatron_converters.storage.pickle_reader.os", "system"),
        ("torch.distributed.run", "main"),
    ],
)
def test_names_are_refused_or_inert(tmp_path: Path, module: str, attribute: str) -> None:
    marker = tmp_path / "ran"
    by_stack = text(module) + text(attribute) + b"\x93"
    by_inst = b"(" + text(f"touch {marker}") + b"i" + f"{module}\n{attribute}\n".encode()
    call = text(f"touch {marker}") + b"\x85R"
    for data in (
        program(name(module, attribute), call),
        b"\x80\x04" + by_stack + call + b".",
        program(by_inst),
        program(b"(", name(module, attribute), text(f"touch {marker}"), b"o"),
    ):
        path = archive(tmp_path / "a.pt", data)
        if module.startswith(("megatron_", "torch.distributed.")) and data[2:3] in (b"c", b"X"):
            assert isinstance(torch_zip.read(path), StandIn)
        else:
            with pytest.raises(ConversionError, match=REFUSED) as raised:
                torch_zip.read(path)
            assert "a.pt" in str(raised.value)
        assert not marker.exists()


@pytest.mark.parametrize("opcode", [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00"])
def test_extension_codes_are_refused(tmp_path: Path, opcode: bytes) -> None:
    with pytest.raises(ConversionError, match=REFUSED):
        torch_zip.read(archive(tmp_path / "a.pt", program(opcode)))


def state_of(**values: bytes) -> bytes:
    return b"}" + b"".join(text(key) + value + b"s" for key, value in values.items())


TENSOR = pickle_writer.dumps(pickle_writer.NewTensor("w", BY_NAME["uint8"], (4,)))[0][2:-1]
STORAGE = b"(" + text("storage") + name("torch", "ByteStorage") + text("0") + text("cpu") + b"K\4tQ"


@pytest.mark.parametrize(
    ("target", "attribute"),
    [
        (name("argparse", "Namespace"), "__init__"),
        (name("collections", "OrderedDict"), "update"),
        (name("builtins", "set"), "add"),
        (name("builtins", "bytes"), "_function"),
        (name("torch._utils", "_rebuild_tensor_v2"), "__call__"),
        (name("torch", "bfloat16"), "itemsize"),
        (name("torch", "BFloat16Storage"), "itemsize"),
        (name("torch.storage", "UntypedStorage"), "itemsize"),
        (name("megatron.core", "Thing"), "__new__"),
        (name("numpy", "dtype"), "real"),
        (name("numpy", "ndarray"), "shape"),
        (TENSOR, "path"),
        (STORAGE, "offset"),
    ],
)
def test_nothing_can_be_altered(tmp_path: Path, target: bytes, attribute: str) -> None:
    """BUILD, with a state for `__dict__` and with one for `setattr`."""
    namespace = vars(argparse.Namespace).copy()
    bfloat16 = repr(BY_NAME["bfloat16"])
    state = state_of(**{attribute: text("hostile")})
    for build in (state + b"b", b"N" + state + b"\x86b", state + state + b"\x86b"):
        with pytest.raises(ConversionError, match="damaged or hostile"):
            torch_zip.read(archive(tmp_path / "a.pt", program(target, build), b"1234"))
    assert vars(argparse.Namespace) == namespace and repr(BY_NAME["bfloat16"]) == bfloat16


@pytest.mark.parametrize(
    "data",
    [
        # a method planted in a Namespace is called by the next BUILD, but it can only be one that is harmless anyway
        program(name("argparse", "Namespace"), b")\x81", state_of(__setstate__=name("os", "system")), b"b"),
        program(name("builtins", "getattr"), name("argparse", "Namespace"), text("__init__"), b"\x86R"),
        program(name("builtins", "getattr"), name("megatron.x", "y"), b"K\1\x86R"),
        program(name("_codecs", "encode"), text("x"), text("rot13"), b"\x86R"),
        program(name("torch._utils", "_rebuild_tensor_v2"), b"(K\1K\0)))tR"),
        program(name("torch._tensor", "_rebuild_from_type_v2"), b"(", name("builtins", "set"), b"N)NtR"),
        program(
            name("torch._tensor", "_rebuild_from_type_v2"),
            b"(",
            name("torch._utils", "_rebuild_tensor_v2"),
            name("megatron.x", "T"),
            b")NtR",
        ),
        program(text("a persistent id"), b"Q"),
        program(b"(", text("storage"), name("megatron.x", "y"), text("0"), text("cpu"), b"K\4tQ"),
        program(b"(", text("storage"), name("torch", "ByteStorage"), text("../0"), text("cpu"), b"K\4tQ"),
        program(b"h\7"),
        program(b"Nr\xff\xff\xff\x7f"),  # a memo of 16 GB
        program(b"X\xff\xff\xff\xff"),
        program(b"N")[:-1],
        program(b"c"),
        program(b"R"),
        b"\x80\x09.",
        b"",
    ],
)
def test_other_attacks_fail(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ConversionError):
        torch_zip.read(archive(tmp_path / "a.pt", data, b"1234"))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(1, (4,), (1,)), (0, (5,), (1,)), (0, (2, 2), (3, 1)), (-1, (4,), (1,)), (0, (-4,), (1,)), (0, (4,), (-1,))],
)
def test_tensors_stay_within_their_storage(
    tmp_path: Path, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    numbers = b"".join(pickle.dumps(value, 2)[2:-1] for value in (offset, size, stride))
    data = program(name("torch._utils", "_rebuild_tensor_v2"), b"(", STORAGE, numbers, b"\x89)tR")
    with pytest.raises(ConversionError, match=r"exceeds its storage|shape"):
        torch_zip.read(archive(tmp_path / "a.pt", data, b"1234"))


@pytest.mark.parametrize(
    "array", [np.array([{}, []], object), np.zeros(2, "M8[s]"), np.zeros(2, [("a", "i4")]), np.array(["text"])]
)
def test_numpy_arrays_of_anything_but_numbers_are_refused(tmp_path: Path, array: Any) -> None:
    with pytest.raises(ConversionError, match="numpy array of"):
        torch_zip.read(archive(tmp_path / "a.pt", pickle.dumps(array, 2)))


def test_a_numpy_array_must_match_its_data(tmp_path: Path) -> None:
    data = pickle.dumps(np.arange(7, dtype="u1"), 2)
    assert data.count(b"K\x07\x85") == 1
    with pytest.raises(ConversionError, match="cannot reshape"):
        torch_zip.read(archive(tmp_path / "a.pt", data.replace(b"K\x07\x85", b"K\x63\x85")))


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module `megatron.core.enums` as it is where the checkpoint is written, not where it is read."""
    module = types.ModuleType("megatron.core.enums")
    bases: dict[str, tuple[type, ...]] = {"Config": (), "States": (dict,), "Items": (list,)}
    members: dict[str, Any] = {name: type(name, base, {}) for name, base in bases.items()}
    members["ModelType"] = Enum("ModelType", ["encoder"])
    for key, cls in members.items():
        cls.__module__ = module.__name__
        setattr(module, key, cls)
    for package in ("megatron", "megatron.core"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, "megatron.core.enums", module)
    return module


def test_unknown_classes_are_stand_ins(tmp_path: Path, megatron: Any) -> None:
    config = megatron.Config()
    config.layers = 4
    value = {
        "model_type": megatron.ModelType.encoder,
        "config": config,
        "class": megatron.Config,
        "states": megatron.States(a=1),
        "items": megatron.Items([1, 2]),
        "signal": signal.SIGUSR2,
        "path": Path("/data/x"),
    }
    torch.save(value, tmp_path / "a.pt")
    for package in ("megatron", "megatron.core", "megatron.core.enums"):
        del sys.modules[package]
    found = torch_zip.read(tmp_path / "a.pt")
    assert not any(module.split(".")[0] == "megatron" for module in sys.modules)
    assert all(isinstance(found[key], StandIn) for key in value if key not in ("class", "signal"))
    model_type = found["model_type"]
    assert (model_type.module, model_type.qualname) == ("megatron.core.enums", "ModelType")
    assert model_type.value in (1, "encoder") and "ModelType" in repr(model_type)
    assert found["config"].state == {"layers": 4} and type(found["config"]) is found["class"]
    assert found["config"].value is None
    assert found["states"].items == [("a", 1)] and found["items"].items == [1, 2]
    if isinstance(found["signal"], type):  # some Pythons (3.11.2) pickle a signal under its own name
        assert issubclass(found["signal"], StandIn)
    else:
        assert isinstance(found["signal"], StandIn) and found["signal"].value in (int(signal.SIGUSR2), "SIGUSR2")
    assert found["path"].args == ("/", "data", "x")


def test_enums_of_python_3_11_0(tmp_path: Path) -> None:
    """They pickle as getattr(class, name)."""
    data = program(name("__builtin__", "getattr"), name("megatron.core.enums", "ModelType"), text("encoder"), b"\x86R")
    found = torch_zip.read(archive(tmp_path / "a.pt", data))
    assert found.qualname == "ModelType" and found.value == "encoder"


def test_load_takes_further_names() -> None:
    class Colour(Enum):
        RED = 1

    data = program(name("somewhere", "colour"), b"K\1\x85R")
    found = pickle_reader.load(data, "a file", {("somewhere", "colour"): Builder(Colour)}, lambda pid: None)
    assert found is Colour.RED
    with pytest.raises(ConversionError, match=r"^a file asks for somewhere\.colour"):
        pickle_reader.load(data, "a file", {}, lambda pid: None)
    assert pickle_reader.load(pickle.dumps(OrderedDict(a=1)), "a file", {}, lambda pid: None) == OrderedDict(a=1)

"""Pickles, as `torch.save` would write them, of trees whose tensors have no data yet. Needs no torch.

Opcodes: Python's `pickletools`; those of protocol 2 alone, which `torch.load(weights_only=True)` reads.
"""

from __future__ import annotations

import argparse
import math
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..dtypes import DType
from ..errors import ConversionError
from .tensor import contiguous_strides


@dataclass(frozen=True)
class NewTensor:
    """A contiguous tensor of its own storage, to be filled under `name`."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Instance:
    """An object of a class that is not here: unpickling makes one without a call to `__init__` and gives it `state`.

    Two are never equal, so that they may be keys.
    """

    module: str
    name: str
    state: Any


@dataclass(frozen=True)
class Call:
    """What a function or class that is not here returns for these arguments."""

    module: str
    name: str
    args: tuple[Any, ...]


def dumps(tree: Any) -> tuple[bytes, list[NewTensor]]:
    """The pickle of `tree`, and its tensors in the order of their storages ("0", "1", …).

    The tree is made of dict, OrderedDict, argparse.Namespace, list, tuple, str, int, float, bool, None, `DType` (read
    back as the torch dtype), `NewTensor`, `Instance` and `Call`. Anything else raises `ConversionError` with its place in the tree.
    """
    writer = _Writer()
    writer.save(tree, "")
    return pickle.PROTO + b"\2" + bytes(writer.out) + pickle.STOP, writer.tensors


class _Writer:
    def __init__(self) -> None:
        self.out = bytearray()
        self.tensors: list[NewTensor] = []
        self._memo: dict[bytes, int] = {}
        self._names: set[str] = set()

    def save(self, value: Any, place: str) -> None:
        save = _SAVE.get(type(value))
        if save is None:
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise ConversionError(
                f"{place.removeprefix('.') or 'the object'} is a {kind}; a checkpoint holds only tensors, dtypes, "
                "numbers, strings, None, lists, tuples, dicts and Namespaces"
            )
        save(self, value, place)

    def _once(self, code: bytes) -> None:
        """Write opcodes that push a constant: in full the first time, by its memo number afterwards."""
        number = self._memo.get(code)
        if number is None:
            number = self._memo[code] = len(self._memo)
            self.out += code + pickle.LONG_BINPUT + struct.pack("<I", number)
        else:
            self.out += pickle.LONG_BINGET + struct.pack("<I", number)

    def _global(self, module: str, name: str) -> None:
        self._once(pickle.GLOBAL + f"{module}\n{name}\n".encode())

    def _none(self, value: None, place: str) -> None:
        self.out += pickle.NONE

    def _bool(self, value: bool, place: str) -> None:
        self.out += pickle.NEWTRUE if value else pickle.NEWFALSE

    def _int(self, value: int, place: str) -> None:
        if -(1 << 31) <= value < 1 << 31:
            self.out += pickle.BININT + struct.pack("<i", value)
            return
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        if len(data) > 255:
            raise ConversionError(f"{place.removeprefix('.')} is an integer of {value.bit_length()} bits")
        self.out += pickle.LONG1 + bytes([len(data)]) + data

    def _float(self, value: float, place: str) -> None:
        self.out += pickle.BINFLOAT + struct.pack(">d", value)

    def _str(self, value: str, place: str) -> None:
        self.out += _str_code(value)

    def _dtype(self, value: DType, place: str) -> None:
        self._global("torch", value.name)

    def _tuple(self, value: tuple[Any, ...], place: str) -> None:
        if value:
            self.out += pickle.MARK
        self._elements(value, place)
        self.out += pickle.TUPLE if value else pickle.EMPTY_TUPLE

    def _list(self, value: list[Any], place: str) -> None:
        self.out += pickle.EMPTY_LIST + pickle.MARK
        self._elements(value, place)
        self.out += pickle.APPENDS

    def _elements(self, values: Iterable[Any], place: str) -> None:
        for index, value in enumerate(values):
            self.save(value, f"{place}[{index}]")

    def _dict(self, value: dict[Any, Any], place: str) -> None:
        self.out += pickle.EMPTY_DICT
        self._items(value, place)

    def _ordered_dict(self, value: OrderedDict[Any, Any], place: str) -> None:
        self._empty_ordered_dict()
        self._items(value, place)

    def _empty_ordered_dict(self) -> None:
        self._global("collections", "OrderedDict")
        self.out += pickle.EMPTY_TUPLE + pickle.REDUCE

    def _namespace(self, value: argparse.Namespace, place: str) -> None:
        self._global("argparse", "Namespace")
        self.out += pickle.EMPTY_TUPLE + pickle.NEWOBJ + pickle.EMPTY_DICT
        self._items(vars(value), place)
        self.out += pickle.BUILD

    def _instance(self, value: Instance, place: str) -> None:
        self._global(value.module, value.name)
        self.out += pickle.EMPTY_TUPLE + pickle.NEWOBJ
        if value.state is not None:
            self.save(value.state, place)
            self.out += pickle.BUILD

    def _call(self, value: Call, place: str) -> None:
        self._global(value.module, value.name)
        self.save(value.args, place)
        self.out += pickle.REDUCE

    def _items(self, mapping: dict[Any, Any], place: str) -> None:
        self.out += pickle.MARK
        for key, value in mapping.items():
            self.save(key, f"{place}.{key} (the key)")
            self.save(value, f"{place}.{key}")
        self.out += pickle.SETITEMS

    def _tensor(self, value: NewTensor, place: str) -> None:
        """`torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, backward_hooks)`.

        Float8 has no typed storage: `_rebuild_tensor_v3` takes its bytes and the dtype (`torch/_tensor.py`,
        `Tensor._reduce_ex_internal`).
        """
        if value.name in self._names:
            raise ConversionError(f"two tensors of one file are called {value.name}")
        self._names.add(value.name)
        typed = value.dtype.storage
        self._global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
        self.out += pickle.MARK
        self._storage(value, place)
        self._int(0, place)
        self._tuple(value.shape, place)
        self._tuple(contiguous_strides(value.shape), place)
        self._bool(False, place)
        self._empty_ordered_dict()
        if not typed:
            self._dtype(value.dtype, place)
        self.out += pickle.TUPLE + pickle.REDUCE
        self.tensors.append(value)

    def _storage(self, value: NewTensor, place: str) -> None:
        """The persistent id `("storage", class, key, location, numel)` of `torch/serialization.py`, `_save`."""
        typed = value.dtype.storage
        self.out += pickle.MARK
        self._once(_str_code("storage"))
        self._global(*(("torch", typed) if typed else ("torch.storage", "UntypedStorage")))
        self._str(str(len(self.tensors)), place)
        self._once(_str_code("cpu"))
        self._int(value.numel if typed else value.numel * value.dtype.itemsize, place)
        self.out += pickle.TUPLE + pickle.BINPERSID


def _str_code(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")  # as pickle does
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


#: By exact type: an enum is an int, and a numpy float is a float, but neither would be read back as one.
_SAVE: dict[type, Callable[[_Writer, Any, str], None]] = {
    type(None): _Writer._none,
    bool: _Writer._bool,
    int: _Writer._int,
    float: _Writer._float,
    str: _Writer._str,
    tuple: _Writer._tuple,
    list: _Writer._list,
    dict: _Writer._dict,
    OrderedDict: _Writer._ordered_dict,
    argparse.Namespace: _Writer._namespace,
    DType: _Writer._dtype,
    NewTensor: _Writer._tensor,
    Instance: _Writer._instance,
    Call: _Writer._call,
}

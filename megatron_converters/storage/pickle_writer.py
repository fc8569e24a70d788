"""Pickle writer for trees whose tensors have no data yet, with `torch.save`'s result. Needs no torch.

Opcodes: Python's `pickletools`; only those of protocol 2, which `torch.load(weights_only=True)` reads.
"""

from __future__ import annotations

import argparse
import math
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..basics.dtypes import DType
from ..basics.errors import ConversionError
from .tensor import contiguous_strides


class NewTensor(NamedTuple):
    """Contiguous tensor with a storage of its own, to be filled under `name`."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(eq=False, slots=True)
class Instance:
    """Object of a class that is not imported here: unpickling creates it without `__init__` and sets its `state`.

    Two instances are never equal, so that they can be dict keys.
    """

    module: str
    name: str
    state: Any


class Call(NamedTuple):
    """Result of a function or class that is not imported here, for these arguments, which must be hashable."""

    module: str
    name: str
    args: tuple[Any, ...]


class Pairs(NamedTuple):
    """Dict that is produced and written pair by pair, so that millions of pairs need not be in memory at once."""

    pairs: Iterable[tuple[Any, Any]]


def dumps(tree: Any) -> tuple[bytes, list[NewTensor]]:
    """Pickle of `tree`, and its tensors in the order of their storages ("0", "1", …).

    The tree is made of dict, OrderedDict, argparse.Namespace, list, tuple, str, int, float, bool, None, `DType` (read
    back as the torch dtype), `NewTensor`, `Instance`, `Call` and `Pairs`. Anything else raises `ConversionError` with
    its place in the tree.
    """
    writer = _Writer()
    try:
        writer.save(tree)
    except _Unwritable as error:
        place = next(place for place, value in _walk(tree, "") if value is error.value)
        raise ConversionError(f"{place.removeprefix('.') or 'the object'} is {error.what}") from None
    return pickle.PROTO + b"\2" + bytes(writer.out) + pickle.STOP, writer.tensors


class _Unwritable(Exception):
    """A value of the tree that a checkpoint cannot hold."""

    def __init__(self, value: Any, what: str) -> None:
        super().__init__(what)
        self.value, self.what = value, what


def _walk(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Every value of a tree with its place."""
    yield place, value
    if isinstance(value, Instance):
        yield from _walk(value.state, place)
    elif isinstance(value, Call):
        yield from _walk(value.args, place)
    elif isinstance(value, (list, tuple)) and not isinstance(value, NewTensor):
        for index, element in enumerate(value):
            yield from _walk(element, f"{place}[{index}]")
    elif isinstance(value, (dict, argparse.Namespace)):
        for key, element in (value if isinstance(value, dict) else vars(value)).items():
            yield from _walk(key, f"{place}.{key} (the key)")
            yield from _walk(element, f"{place}.{key}")


class _Writer:
    """Appends opcodes to `out`. Frequent values, such as names and shapes, are encoded once."""

    def __init__(self) -> None:
        self.out = bytearray()
        self.tensors: list[NewTensor] = []
        self._names: set[str] = set()
        #: By constant: the opcode that pushes it from the unpickler's memo.
        self._memo: dict[Any, bytes] = {}
        self._strings: dict[str, bytes] = {}
        #: By dtype and shape: a tensor's opcodes before and after the number of its storage.
        self._tensor_codes: dict[tuple[DType, tuple[int, ...]], tuple[bytes, bytes]] = {}
        self._calls: dict[Call, bytes] = {}

    def save(self, value: Any) -> None:
        _SAVE[type(value)](self, value)

    def refuse(self, value: Any) -> None:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        known = "tensors, dtypes, numbers, strings, None, lists, tuples, dicts and Namespaces"
        raise _Unwritable(value, f"a {kind}; a checkpoint holds only {known}")

    def _constant(self, constant: Any, code: bytes) -> None:
        """Write opcodes that push a constant: in full the first time, by its memo number afterwards."""
        known = self._memo.get(constant)
        if known is None:
            number = len(self._memo)
            self._memo[constant] = _MEMO(pickle.LONG_BINGET, number)
            known = code + _MEMO(pickle.LONG_BINPUT, number)
        self.out += known

    def _global(self, module: str, name: str) -> None:
        known = self._memo.get((module, name))
        if known is None:
            self._constant((module, name), pickle.GLOBAL + f"{module}\n{name}\n".encode())
        else:
            self.out += known

    def _none(self, value: None) -> None:
        self.out += pickle.NONE

    def _bool(self, value: bool) -> None:
        self.out += pickle.NEWTRUE if value else pickle.NEWFALSE

    def _int(self, value: int) -> None:
        if -(1 << 31) <= value < 1 << 31:
            self.out += _INT(pickle.BININT, value)
            return
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        if len(data) > 255:
            raise _Unwritable(value, f"an integer of {value.bit_length()} bits")
        self.out += pickle.LONG1 + bytes([len(data)]) + data

    def _float(self, value: float) -> None:
        self.out += pickle.BINFLOAT + struct.pack(">d", value)

    def _str(self, value: str) -> None:
        code = self._strings.get(value)
        if code is None:
            code = self._strings[value] = _str_code(value)
        self.out += code

    def _dtype(self, value: DType) -> None:
        self._global("torch", value.name)

    def _tuple(self, value: tuple[Any, ...]) -> None:
        if not value:
            self.out += pickle.EMPTY_TUPLE
            return
        self.out += pickle.MARK
        self._elements(value)
        self.out += pickle.TUPLE

    def _list(self, value: list[Any]) -> None:
        self.out += pickle.EMPTY_LIST + pickle.MARK
        self._elements(value)
        self.out += pickle.APPENDS

    def _elements(self, values: Iterable[Any]) -> None:
        for value in values:
            _SAVE[type(value)](self, value)

    def _dict(self, value: dict[Any, Any]) -> None:
        self.out += pickle.EMPTY_DICT
        self._items(value.items())

    def _pairs(self, value: Pairs) -> None:
        self.out += pickle.EMPTY_DICT
        self._items(value.pairs)

    def _ordered_dict(self, value: OrderedDict[Any, Any]) -> None:
        self._empty_ordered_dict()
        self._items(value.items())

    def _empty_ordered_dict(self) -> None:
        self._global("collections", "OrderedDict")
        self.out += pickle.EMPTY_TUPLE + pickle.REDUCE

    def _namespace(self, value: argparse.Namespace) -> None:
        self._global("argparse", "Namespace")
        self.out += _NEW + pickle.EMPTY_DICT
        self._items(vars(value).items())
        self.out += pickle.BUILD

    def _instance(self, value: Instance) -> None:
        self._global(value.module, value.name)
        self.out += _NEW
        if value.state is not None:
            _SAVE[type(value.state)](self, value.state)
            self.out += pickle.BUILD

    def _call(self, value: Call) -> None:
        code = self._calls.get(value)
        if code is not None:
            self.out += code
            return
        start, known = len(self.out), len(self._memo)
        self._global(value.module, value.name)
        self.save(value.args)
        self.out += pickle.REDUCE
        if len(self._memo) == known:  # nothing was added to the memo, so the code can be repeated unchanged
            self._calls[value] = bytes(self.out[start:])

    def _items(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        out, strings = self.out, self._strings
        out += pickle.MARK
        for key, value in pairs:
            if type(key) is str and key in strings:  # most keys are names of a few attributes
                out += strings[key]
            else:
                _SAVE[type(key)](self, key)
            _SAVE[type(value)](self, value)
        out += pickle.SETITEMS

    def _tensor(self, value: NewTensor) -> None:
        if value.name in self._names:
            raise ConversionError(f"two tensors of one file are called {value.name}")
        self._names.add(value.name)
        number = _str_code(str(len(self.tensors)))
        self.tensors.append(value)
        kind = value.dtype, value.shape
        if kind in self._tensor_codes:
            before, after = self._tensor_codes[kind]
            self.out += before + number + after
            return
        known, start = len(self._memo), len(self.out)
        self._tensor_head(value)
        middle = len(self.out)
        self.out += number
        self._tensor_tail(value)
        if len(self._memo) == known:
            self._tensor_codes[kind] = bytes(self.out[start:middle]), bytes(self.out[middle + len(number) :])

    def _tensor_head(self, value: NewTensor) -> None:
        """Begin `torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, backward_hooks)`, up to the key
        in its storage's persistent id `("storage", class, key, location, numel)` (`torch/serialization.py`, `_save`).

        Float8 has no typed storage: `_rebuild_tensor_v3` takes its bytes and the dtype (`torch/_tensor.py`,
        `Tensor._reduce_ex_internal`).
        """
        typed = value.dtype.storage
        self._global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
        self.out += pickle.MARK + pickle.MARK
        self._constant("storage", _str_code("storage"))
        self._global(*(("torch", typed) if typed else ("torch.storage", "UntypedStorage")))

    def _tensor_tail(self, value: NewTensor) -> None:
        typed = value.dtype.storage
        self._constant("cpu", _str_code("cpu"))
        self._int(value.numel if typed else value.numel * value.dtype.itemsize)
        self.out += pickle.TUPLE + pickle.BINPERSID
        self._int(0)
        self._tuple(value.shape)
        self._tuple(contiguous_strides(value.shape))
        self._bool(False)
        self._empty_ordered_dict()
        if not typed:
            self._dtype(value.dtype)
        self.out += pickle.TUPLE + pickle.REDUCE


_INT = struct.Struct("<ci").pack
_MEMO = struct.Struct("<cI").pack
#: Create an instance of the class on the stack.
_NEW = pickle.EMPTY_TUPLE + pickle.NEWOBJ


def _str_code(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")  # as pickle does
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


class _MethodByType(dict[type, Callable[[_Writer, Any], None]]):
    """Writer methods by exact type: an enum that is an int, or a numpy float, would be read back as a plain number."""

    def __missing__(self, kind: type) -> Callable[[_Writer, Any], None]:
        return _Writer.refuse


_SAVE = _MethodByType(
    {
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
        Pairs: _Writer._pairs,
    }
)

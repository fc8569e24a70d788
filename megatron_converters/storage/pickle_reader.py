"""Reading pickles without running them.

A pickle is a program: it may call anything it can name. Here it can name only what is listed, and everything listed
is harmless. Each object that it can reach is a plain container, number or string, or one that refuses to be altered
(`Sealed`, `Builder`, the metaclass of stand-ins), so that no opcode can change what lies outside the result.
A hostile pickle can still use memory and time in proportion to its size.
"""

from __future__ import annotations

import argparse
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ..basics.errors import ConversionError, one_line
from . import pickle_opcodes
from .opening import is_name

#: Module names of Python 2, which pickles of protocol 2 still use.
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
#: Modules whose classes become stand-ins. They occur in a Megatron checkpoint's `args`, states and plans of distributed
#: checkpoints; none of their behaviour is needed.
_INERT_MODULES = ("megatron", "transformer_engine", "signal", "pathlib")
_INERT_PREFIXES = ("megatron_", "torch.distributed.")
#: Random states have a Generator, and scalars of numpy 2 a class for each dtype (both in Megatron-LM's core/safe_globals.py).
_INERT_NAMES = {
    *(("_io", "BytesIO"), ("numpy", "ndarray"), ("torch", "Tensor"), ("torch.nn.parameter", "Parameter")),
    *(("torch._C", "Generator"), ("torch", "Generator"), ("numpy.dtypes", "UInt32DType")),
}
#: Exceptions that the unpickler and the builders below raise for damaged pickles.
_FAULTS = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


def load(data: bytes, where: str, names: Mapping[tuple[str, str], Any], persistent_load: Callable[[Any], Any]) -> Any:
    """Read the object that the pickle `data` describes.

    `names` maps further (module, name) pairs to what they stand for: sealed values or a `Builder`. `where` names the file in
    errors. Raises `ConversionError` for any other name and for a damaged pickle; no code of the pickle is ever run.
    """
    try:
        pickle_opcodes.check(data)
        return _Unpickler(data, where, names, persistent_load).load()
    except _FAULTS as error:
        raise ConversionError(
            f"{where} is damaged or hostile: its pickle cannot be read ({one_line(error)})"
        ) from error


class _SealedType(type):
    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise pickle.UnpicklingError(f"it alters the class {cls.__name__}")


_NO_KWARGS: Mapping[str, Any] = MappingProxyType({})


class StandIn(metaclass=_SealedType):
    """Object of a class that is unknown here: its pickled data, without any behaviour."""

    __slots__ = ("args", "items", "kwargs", "state")
    module = ""
    qualname = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        self = super().__new__(cls)
        self.args = args
        self.kwargs = kwargs or _NO_KWARGS  # shared: a distributed checkpoint's index has a million stand-ins
        self.state = None
        self.items = ()
        return self

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    state: Any
    items: Sequence[Any]

    @property
    def value(self) -> Any:
        """The only argument, else None: an enum's value (or, from Python 3.11.0 to 3.11.3, its member's name)."""
        return self.args[0] if len(self.args) == 1 else None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.append((key, value))

    def append(self, value: Any) -> None:
        """Add an element of a list-like object."""
        if not isinstance(self.items, list):
            self.items = []
        self.items.append(value)

    def __repr__(self) -> str:
        return f"<{self.module}.{self.qualname} {self.args if self.state is None else self.state}>"


class Builder:
    """Function that a pickle may call. Unlike a plain function it has no attributes that the pickle could set."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise pickle.UnpicklingError("it alters a function")


class _NamespaceFactory(metaclass=_SealedType):
    """Replacement for the classes of namespaces, which a pickle could alter; creates an `argparse.Namespace`."""

    def __new__(cls) -> Any:
        return argparse.Namespace()


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, data: bytes, where: str, names: Mapping[tuple[str, str], Any], persistent_load: Callable[[Any], Any]
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._where = where
        self._known: dict[tuple[str, str], Any] = {**_NAMES, **names}
        self._persistent_load = persistent_load

    def persistent_load(self, pid: Any) -> Any:
        return self._persistent_load(pid)

    def find_class(self, module: str, name: str) -> Any:
        module = _OLD_MODULES.get(module, module)
        found = self._known.get((module, name))
        if found is None:
            if not (is_name(f"{module}.{name}") and _is_inert(module, name)):
                shown = one_line(f"{module}.{name}")
                raise ConversionError(
                    f"{self._where} asks for {shown}, which no checkpoint needs, so nothing "
                    "in it was run; if you trust the file, load it with the program that wrote it and save it again "
                    "without that object"
                )
            body = {"__slots__": (), "module": module, "qualname": name}
            found = self._known[module, name] = _SealedType(name.rpartition(".")[2], (StandIn,), body)
        return found


def _is_inert(module: str, name: str) -> bool:
    package = module.partition(".")[0]
    return package in _INERT_MODULES or module.startswith(_INERT_PREFIXES) or (module, name) in _INERT_NAMES


def _enum_member(cls: Any, name: Any) -> StandIn:
    """`getattr`, with which Python 3.11.0 to 3.11.3 pickle enums (`Enum.__reduce_ex__`); for stand-ins only."""
    if not (isinstance(cls, type) and issubclass(cls, StandIn) and isinstance(name, str)):
        raise pickle.UnpicklingError("it calls getattr")
    return cls(name)


def _codecs_encode(text: Any, encoding: Any) -> bytes:
    """`_codecs.encode`, with which pickles of protocol 2 store bytes."""
    if type(text) is not str or encoding != "latin1":
        raise pickle.UnpicklingError("it calls codecs.encode")
    return text.encode("latin1")


class _NumpyDType(metaclass=_SealedType):
    """`numpy.dtype` as pickled: type code, and byte order as its state."""

    __slots__ = ("_code", "_order")
    _code: Any
    _order: Any

    def __new__(cls, code: Any = None, *_: Any) -> _NumpyDType:
        self = super().__new__(cls)
        self._code = code
        self._order = "="
        return self

    def __setstate__(self, state: Any) -> None:
        self._order = state[1]

    def real(self) -> np.dtype[Any]:
        """The numpy type, if it is numeric; other types hold objects, or sizes that numpy does not check."""
        plain = type(self._code) is str and self._code[:1] in tuple("biufc") and self._code[1:].isdecimal()
        if not plain or self._order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"it holds a numpy array of {self._code}")
        real: np.dtype[Any] = np.dtype(self._order + self._code)
        return real


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    return np.frombuffer(data, _numpy_type(dtype), count=1)[0]


def _numpy_type(dtype: Any) -> np.dtype[Any]:
    if not isinstance(dtype, _NumpyDType):
        raise pickle.UnpicklingError("it holds a numpy array of an unknown type")
    return dtype.real()


class _Array(np.ndarray[Any, Any]):
    """numpy array that accepts its pickled state only if it is consistent and numeric."""

    def __setstate__(self, state: Any) -> None:
        version, shape, dtype, fortran, data = state
        real = _numpy_type(dtype)
        checked = np.frombuffer(data, real).reshape(shape)
        super().__setstate__((version, checked.shape, real, fortran, data))


def _empty_array(*_: Any) -> npt.NDArray[Any]:
    return np.ndarray.__new__(_Array, (0,), "u1")


_NAMES: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): _NamespaceFactory,
    ("types", "SimpleNamespace"): _NamespaceFactory,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("builtins", "slice"): slice,
    ("builtins", "bytes"): Builder(lambda: b""),  # protocol 2 calls it only for empty bytes
    ("builtins", "getattr"): Builder(_enum_member),
    ("_codecs", "encode"): Builder(_codecs_encode),
    ("numpy", "dtype"): _NumpyDType,
    **{
        (module, name): Builder(function)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name, function in (("scalar", _numpy_scalar), ("_reconstruct", _empty_array))
    },
}

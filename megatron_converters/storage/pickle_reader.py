"""Reading pickles without running them.

A pickle is a program: it may call anything it can name. Here it can name only what is listed, and everything listed
is harmless. Each object that it can reach is a plain container, number or string, or one that refuses to be altered
(`Sealed`, `Builder`, the metaclass of stand-ins), so that no opcode can change what lies outside the result.
What a hostile pickle can still do is to need memory and time in proportion to its size.
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

#: Python 2's names, which pickles of protocol 2 still use.
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
#: Modules whose classes become stand-ins. They occur in a Megatron checkpoint's `args`, states and plans of distributed
#: checkpoints; none of their behaviour is needed.
_INERT_MODULES = ("megatron", "transformer_engine", "signal", "pathlib")
_INERT_PREFIXES = ("megatron_", "torch.distributed.")
_INERT_NAMES = {("_io", "BytesIO"), ("numpy", "ndarray"), ("torch", "Tensor"), ("torch.nn.parameter", "Parameter")}
#: What damaged pickles make the unpickler, and the builders here, raise.
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
    """The object that the pickle `data` describes.

    `names` says what further (module, name) pairs stand for: sealed values or a `Builder`. `where` names the file in
    errors. Raises `ConversionError` for any other name and for a damaged pickle; no code of the pickle's is ever run.
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


_NOTHING: Mapping[str, Any] = MappingProxyType({})


class StandIn(metaclass=_SealedType):
    """An object whose class is unknown here: what the pickle says of it, and nothing of its behaviour."""

    __slots__ = ("args", "items", "kwargs", "state")
    module = ""
    qualname = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        self = super().__new__(cls)
        self.args = args
        self.kwargs = kwargs or _NOTHING  # an index of a distributed checkpoint holds a million of these objects
        self.state = None
        self.items = ()
        return self

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    state: Any
    items: Sequence[Any]

    @property
    def value(self) -> Any:
        """An enum's value (or, from Python 3.11.0 to 3.11.3, its member's name): the one argument; otherwise None."""
        return self.args[0] if len(self.args) == 1 else None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.append((key, value))

    def append(self, value: Any) -> None:
        """Take an element of a list-like object."""
        if not isinstance(self.items, list):
            self.items = []
        self.items.append(value)

    def __repr__(self) -> str:
        return f"<{self.module}.{self.qualname} {self.args if self.state is None else self.state}>"


class Builder:
    """A function that a pickle may call. Unlike a bare function it has no attributes for the pickle to set."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise pickle.UnpicklingError("it alters a function")


class _NewNamespace(metaclass=_SealedType):
    """Stands for the class `argparse.Namespace`, which a pickle could alter, and makes real ones."""

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
                asked = one_line(f"{module}.{name}")
                raise ConversionError(
                    f"{self._where} asks for {asked}, which is not among what a checkpoint needs, and nothing "
                    "of it was run; if you trust the file, load it with the program that wrote it and save it again "
                    "without that object"
                )
            body = {"__slots__": (), "module": module, "qualname": name}
            found = self._known[module, name] = _SealedType(name.rpartition(".")[2], (StandIn,), body)
        return found


def _is_inert(module: str, name: str) -> bool:
    package = module.partition(".")[0]
    return package in _INERT_MODULES or module.startswith(_INERT_PREFIXES) or (module, name) in _INERT_NAMES


def _member(cls: Any, name: Any) -> StandIn:
    """`getattr` as enums pickle themselves in Python 3.11.0 to 3.11.3 (`Enum.__reduce_ex__`): for stand-ins alone."""
    if not (isinstance(cls, type) and issubclass(cls, StandIn) and isinstance(name, str)):
        raise pickle.UnpicklingError("it calls getattr")
    return cls(name)


def _encoded(text: Any, encoding: Any) -> bytes:
    """`_codecs.encode`, by which pickles of protocol 2 hold bytes."""
    if type(text) is not str or encoding != "latin1":
        raise pickle.UnpicklingError("it calls codecs.encode")
    return text.encode("latin1")


class _NumpyDType(metaclass=_SealedType):
    """`numpy.dtype` as pickled: the type's code, and the byte order as its state."""

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
        """The numpy type, if it is one of plain numbers: others hold objects, or sizes that numpy does not check."""
        plain = type(self._code) is str and self._code[:1] in tuple("biufc") and self._code[1:].isdecimal()
        if not plain or self._order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"it holds a numpy array of {self._code}")
        real: np.dtype[Any] = np.dtype(self._order + self._code)
        return real


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    return np.frombuffer(data, _real(dtype), count=1)[0]


def _real(dtype: Any) -> np.dtype[Any]:
    if not isinstance(dtype, _NumpyDType):
        raise pickle.UnpicklingError("it holds a numpy array of an unknown type")
    return dtype.real()


class _Array(np.ndarray[Any, Any]):
    """A numpy array that takes over its pickled state only if that is consistent and of plain numbers."""

    def __setstate__(self, state: Any) -> None:
        version, shape, dtype, fortran, data = state
        real = _real(dtype)
        checked = np.frombuffer(data, real).reshape(shape)
        super().__setstate__((version, checked.shape, real, fortran, data))


def _empty_array(*_: Any) -> npt.NDArray[Any]:
    return np.ndarray.__new__(_Array, (0,), "u1")


_NAMES: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): _NewNamespace,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("builtins", "slice"): slice,
    ("builtins", "bytes"): Builder(lambda: b""),  # protocol 2 calls it for empty bytes alone
    ("builtins", "getattr"): Builder(_member),
    ("_codecs", "encode"): Builder(_encoded),
    ("numpy", "dtype"): _NumpyDType,
    **{
        (module, name): Builder(function)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name, function in (("scalar", _numpy_scalar), ("_reconstruct", _empty_array))
    },
}

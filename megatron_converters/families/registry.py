"""Registry of families: the package's own, those of plug-ins and of `register_family`, and for a while those of a family file."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from ..basics.errors import ConversionError, UsageError, one_line
from .table import Family

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

#: Modules of this folder, and the families in each, whose names are mostly their model types: of these modules the one that a model
#: needs is imported alone. In matching order: a checkpoint that names no family gets the first one that can express it.
_MODULES = {
    "llama": ("llama",),
    "mistral": ("mistral", "ministral", "ministral3"),
    "qwen": ("qwen2", "qwen3"),
    "llama_variants": ("smollm3", "seed_oss", "internlm3", "iquestcoder", "cwm", "ernie4_5", "helium"),
    "mixtures": ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"),
    "gpt2": ("gpt2",),
    "starcoder": ("gpt_bigcode", "starcoder2"),
    "phi": ("phi", "phi3"),
    "glm": ("glm", "glm4", "glm4_moe"),
    "granite": ("granite", "granitemoe", "granitemoeshared"),
    "deepseek": ("deepseek_v2", "deepseek_v3", "glm4_moe_lite"),
    "sparse": ("deepseek_v32", "glm_moe_dsa"),
    "qwen3_next": ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
    "gpt_oss": ("gpt_oss",),
    "minicpm": ("minicpm", "minicpm3"),
    "sigmoid": ("dots1", "solar_open", "hy_v3", "bailing_moe", "exaone_moe"),
    "mimo": ("mimo",),
    "renamed": ("internlm2", "exaone", "qwen"),
    "baichuan": ("baichuan", "baichuan2"),
    "chatglm": ("chatglm",),
    "nemotron": ("nemotron", "arcee"),
    "stablelm": ("stablelm",),
    "jais": ("jais2",),
    "gpt_neox": ("gpt_neox", "persimmon"),
    "olmo": ("olmo",),
    "post_norms": ("olmo2", "olmo3", "exaone4"),
    "opt": ("opt",),
    "gemma": ("gemma", "gemma2", "gemma3_text"),
    "cohere": ("cohere", "cohere2"),
    "falcon": ("falcon",),
    "minimax": ("minimax_m2",),
}
_MODULE_OF = {family: module for module, families in _MODULES.items() for family in families}
#: Entry points of this group each load a `Family`, or a function that returns one or several.
GROUP = "megatron_converters.families"


class FromFile(NamedTuple):
    """Family of a file: where that lies, the digest of what it says, and the family whose place it takes (empty: of none)."""

    family: Family
    path: str
    digest: str
    replaces: str = ""


class Packed(NamedTuple):
    """Registered families on their way to another process: those that can be sent, and the names of others."""

    families: bytes
    others: tuple[str, ...]


#: Family of the file that commands and calls of this context have named.
_FILE: ContextVar[FromFile | None] = ContextVar("family file", default=None)


class Families(Mapping[str, Family]):
    """Every known family by name. Plug-ins are loaded once a name that is not built in, or all names, are asked for."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._registered: dict[str, Family] = {}
        self._plugged: dict[str, Family] | None = None
        #: What another process has registered. It yields to what this one has: a plug-in may have done it there, and do it here.
        self._received: dict[str, Family] = {}

    @cached_property
    def built_in(self) -> Mapping[str, Family]:
        """Families of this package, in matching order."""
        return {family.name: family for name in _MODULES for family in families_in(name)}

    def likely(self, model_type: object) -> list[Family]:
        """Families among which a model type is looked for first: those of the module that has it, or else all but plug-ins.

        No other family may have the names of these.
        """
        file = self.file
        if file is None and isinstance(model_type, str) and model_type in _MODULE_OF:
            return families_in(_MODULE_OF[model_type])
        known = {**self.built_in, **self._registered}
        if file is None:
            return list(known.values())
        hidden = (file.family.name, file.replaces)
        return [file.family, *(family for name, family in known.items() if name not in hidden)]

    @property
    def file(self) -> FromFile | None:
        """Family of the file that is in use, None for none."""
        return _FILE.get()

    def __getitem__(self, name: str) -> Family:
        file = self.file
        if file is not None and name in (file.family.name, file.replaces):
            if name == file.family.name:
                return file.family
            raise KeyError(name)
        if name in _MODULE_OF:
            return next(family for family in families_in(_MODULE_OF[name]) if family.name == name)
        return self._registered[name] if name in self._registered else {**self._received, **self._plug_ins()}[name]

    def __iter__(self) -> Iterator[str]:
        file = self.file
        own = [] if file is None else [file.family.name]
        hidden = [] if file is None else [file.family.name, file.replaces]
        others = dict.fromkeys((*self.built_in, *self._registered, *self._plug_ins(), *self._received))
        yield from (*own, *(name for name in others if name not in hidden))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def register(self, family: Family) -> None:
        """Add a family for this process; raises `UsageError` unless it is a table with names of its own, or is there already."""
        if not isinstance(family, Family):
            raise UsageError(
                f"a {type(family).__name__} cannot be registered; give a megatron_converters.families.table.Family"
            )
        with self._lock:
            known = {**self.built_in, **self._registered, **(self._plugged or {})}
            taken = clash(family, known.values())
            if taken:
                raise UsageError(f"the family {family.name} cannot be registered: {taken}")
            if known.get(family.name) is not family:
                self._registered[family.name] = family

    @contextmanager
    def using(self, file: FromFile) -> Iterator[None]:
        """Add the family of a file while the context lasts."""
        token = _FILE.set(file)
        try:
            yield
        finally:
            _FILE.reset(token)

    def file_digest(self, name: str) -> str | None:
        """Digest of the family file that has this family; None if it comes from elsewhere."""
        file = self.file
        return file.digest if file is not None and file.family.name == name else None

    def pack(self) -> Packed:
        """Registered families for another process, where importing modules again does not register them.

        Those built in are imported now: Python ends a process by SIGINT, whatever handles the exception, if Ctrl-C comes while
        an import makes a dataclass.
        """
        from multiprocessing.reduction import ForkingPickler

        _ = self.built_in
        known = {**self._received, **self._registered}
        sent = {name: family for name, family in known.items() if _can_be_sent(family)}
        others = tuple(known.keys() - sent.keys())
        return Packed(bytes(ForkingPickler.dumps(sent)), others)

    def unpack(self, packed: Packed) -> None:
        """Take over families that another process has packed; raises `ConversionError` for one that could not be sent."""
        import pickle
        from multiprocessing.reduction import ForkingPickler

        try:
            families: dict[str, Family] = ForkingPickler.loads(packed.families)
        except (AttributeError, ImportError, pickle.UnpicklingError) as error:
            raise ConversionError(
                f"a family that register_family has added cannot be made again in another process ({error}); {_REMEDY}"
            ) from error
        self._received = families
        lost = [name for name in packed.others if name not in self]
        if lost:
            raise ConversionError(
                f"the family {', '.join(lost)}, which register_family has added, cannot be sent to another process, since "
                f"its table holds functions without an importable name; {_REMEDY}"
            )

    def _plug_ins(self) -> Mapping[str, Family]:
        """Families of installed distributions; none while they are being loaded."""
        with self._lock:
            if self._plugged is None:
                self._plugged = {}  # for a plug-in that asks for families, or registers one, while it is imported
                try:
                    self._plugged = _load_all({**self.built_in, **self._registered})
                except BaseException:
                    self._plugged = None
                    raise
            return self._plugged


def families_in(module: str) -> list[Family]:
    """Families of a module of this folder."""
    values = vars(importlib.import_module(f"{__package__}.{module}")).values()
    return [value for value in values if isinstance(value, Family)]


_REMEDY = (
    "define them at the top of a module and register the family there, make it an entry point of the group "
    f"{GROUP}, or write a family file (--family-file)"
)


def clash(family: Family, known: Iterable[Family]) -> str:
    """What of a family's names another one has already, as a sentence without its end; empty if nothing."""
    for other in known:
        if other is family:
            return ""
        types, classes = (
            sorted({*own} & {*others})
            for own, others in (
                (family.model_types, other.model_types),
                (family.architectures, other.architectures),
            )
        )
        shared = [
            *([f"name {family.name!r}"] if family.name == other.name else []),
            *(f"model_type {name!r}" for name in types),
            *(f"architecture {name!r}" for name in classes),
        ]
        if shared:
            return f"the family {other.name} has the {' and the '.join(shared)} already"
    return ""


def _can_be_sent(family: Family) -> bool:
    import pickle
    from multiprocessing.reduction import ForkingPickler

    try:
        ForkingPickler.dumps(family)
    except (AttributeError, TypeError, pickle.PicklingError):
        return False
    return True


def _load_all(known: Mapping[str, Family]) -> dict[str, Family]:
    from importlib import metadata  # which takes longer than all families of this package

    found: dict[str, Family] = {}
    for entry in sorted(metadata.entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        for family in _loaded(entry):
            taken = clash(family, [*known.values(), *found.values()])
            if taken:
                raise ConversionError(
                    f"{_described(entry)} has the family {family.name}, but {taken}; remove one of them"
                )
            found[family.name] = family
    return found


def _loaded(entry: EntryPoint) -> list[Family]:
    try:
        value = entry.load()
        value = value() if callable(value) else value
        families = [value] if isinstance(value, Family) else list(value)
    except Exception as error:
        raise ConversionError(
            f"{_described(entry)} does not load: {type(error).__name__}: {one_line(error)}; mend or uninstall it"
        ) from error
    others = [type(family).__name__ for family in families if not isinstance(family, Family)]
    if others:
        raise ConversionError(
            f"{_described(entry)} gives a {others[0]}, and not a megatron_converters.families.table.Family; mend or uninstall it"
        )
    return families


def _described(entry: EntryPoint) -> str:
    where = "an unknown distribution" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
    return f"the entry point {entry.name} ({entry.value}) of {where}"


#: Every known family by name.
FAMILIES = Families()


def register_family(family: Family) -> None:
    """Add a family for this process and for the workers that its conversions start.

    `family` is a table as those in `megatron_converters/families`. Raises `UsageError` if one of its names (name, model_type,
    architecture) is taken; registering the same object again does nothing.
    """
    FAMILIES.register(family)

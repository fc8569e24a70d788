"""Rules of a family's table, which read and write config.json.

A rule claims config keys, reads them into properties of `ModelSpec` and writes them back. A key that no rule claims is an
error, since it may change what the model computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import NoneType
from typing import Any, Protocol, runtime_checkable

from ..basics.errors import ConversionError
from ..model.checks import TOO_MANY_LAYERS, is_whole
from ..model.layers import OF_ATTENTION, OF_MLP
from ..model.spec import ModelSpec, PerLayer

Config = Mapping[str, Any]


class _Absent(Enum):
    """No default. A member of an enum stays itself when it is sent to another process."""

    REQUIRED = "required"


REQUIRED = _Absent.REQUIRED


class Rule(Protocol):
    """Some config keys and the properties that they decide."""

    @property
    def keys(self) -> tuple[str, ...]: ...
    def read(self, config: Config) -> dict[str, Any]: ...
    def write(self, spec: ModelSpec) -> dict[str, Any]: ...


@runtime_checkable
class Nested(Protocol):
    """Rule whose key has an object as its value."""

    def unread(self, config: Config) -> list[str]:
        """Fields of that object, as `key.field`, that the rule does not know."""
        ...


def overridden(inherited: Sequence[Rule], own: Sequence[Rule]) -> tuple[Rule, ...]:
    """Inherited rules whose place none of `own` takes, and then these."""
    return (*(rule for rule in inherited if not any(_replaces(new, rule) for new in own)), *own)


def _replaces(new: Rule, old: Rule) -> bool:
    """Whether a rule takes the place of an inherited one: it decides the same property, or a key that one of them has alone.

    Several properties may have one key (`attention_bias`), so rules of two properties stand beside each other.
    """
    fields = getattr(new, "field", None), getattr(old, "field", None)
    if None not in fields:
        return fields[0] == fields[1]
    return not {*new.keys}.isdisjoint(old.keys)


@dataclass(frozen=True)
class Row:
    """One config key for one property. An absent or null key takes `default`, a value or a function of the config."""

    field: str
    key: str
    default: Any = REQUIRED

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, config: Config) -> dict[str, Any]:
        value = config.get(self.key)
        if value is None:
            if self.default is REQUIRED:
                raise ConversionError(f"config.json has no {self.key}; it decides tensor shapes, so add it")
            value = self.default(config) if callable(self.default) else self.default
        return {self.field: value}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        return {self.key: spec.values.get(self.field)}


@dataclass(frozen=True)
class Fixed:
    """A config key that must have one value, because Megatron's model supports no other; it may be a function of the config.

    `absent` is what the absence of the key means, where the architecture's class has another default. `why` says what another value
    means that Megatron-LM lacks.
    """

    key: str
    value: Any
    absent: Any = None
    why: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, config: Config) -> dict[str, Any]:
        wanted = self.value(config) if callable(self.value) else self.value
        value = config.get(self.key, wanted if self.absent is None else self.absent)
        if value != wanted:
            given = f"{self.key}={value!r}" if self.key in config else f"no {self.key}, which means {value!r}"
            why = f": {self.why}" if self.why else ""
            raise ConversionError(f"config.json has {given}; only {wanted!r} can be converted{why}")
        return {}

    def write(self, _: ModelSpec) -> dict[str, Any]:
        return {} if callable(self.value) else {self.key: self.value}


@dataclass(frozen=True)
class Restated:
    """A config key that says what the architecture does anyway, in files of some programs: it may be absent; it is not written.

    `others` are values that mean the same. `why` says what another value means that Megatron-LM lacks.
    """

    key: str
    value: Any
    others: tuple[Any, ...] = ()
    why: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, config: Config) -> dict[str, Any]:
        value = config.get(self.key)
        if value not in (None, self.value, *self.others):
            raise ConversionError(
                f"config.json has {self.key}={value!r}; the architecture has {self.value!r}, and only that can be converted"
                + (f": {self.why}" if self.why else "")
            )
        return {}

    def write(self, _: ModelSpec) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Repeated:
    """A key that repeats another in files of some releases, and that the class does not read; it is not written.

    Where it says something else than that, or than the `default` of that, which of them counts depends on the program.
    """

    key: str
    other: str
    default: Any

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, config: Config) -> dict[str, Any]:
        value, counts = config.get(self.key), config.get(self.other, self.default)
        if value not in (None, counts):
            raise ConversionError(
                f"config.json has {self.key}={value!r}, which repeats {self.other}, and that is {counts!r}; correct the one "
                "that is wrong"
            )
        return {}

    def write(self, _: ModelSpec) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Biases:
    """Biases of attention and of the MLP, by their keys and defaults; without a key the default holds.

    Megatron-LM has biases in all linears or in none, so that those of one kind come together with zeros for the other.
    """

    attention: bool = False
    mlp: bool = False
    attention_key: str = "attention_bias"
    mlp_key: str = "mlp_bias"

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.attention_key, self.mlp_key)))

    def read(self, config: Config) -> dict[str, Any]:
        attention = _switch(config, self.attention_key, self.attention)
        mlp = _switch(config, self.mlp_key, self.mlp)
        absent = "" if attention == mlp else OF_ATTENTION if mlp else OF_MLP
        return {**dict.fromkeys(("qkv_bias", "proj_bias", "mlp_bias"), attention or mlp), "absent_biases": absent}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        held = {
            self.attention_key: spec.values.get("proj_bias") and spec.absent_biases != OF_ATTENTION,
            self.mlp_key: spec.values.get("mlp_bias") and spec.absent_biases != OF_MLP,
        }
        return {key: bool(value) for key, value in held.items() if key}


def _switch(config: Config, key: str, default: bool) -> bool:
    """Value of a key that is true or false; the default where it is absent, or null."""
    value = config.get(key)
    if not isinstance(value, (bool, NoneType)):
        raise ConversionError(f"config.json has {key}={value!r}; it must be true or false")
    return default if value is None else value


@dataclass(frozen=True)
class Implied:
    """A property that the architecture decides without a key of its own; `value` may be a function of the config."""

    field: str
    value: Any
    keys: tuple[str, ...] = ()

    def read(self, config: Config) -> dict[str, Any]:
        return {self.field: self.value(config) if callable(self.value) else self.value}

    def write(self, _: ModelSpec) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Passed:
    """Config keys that decide nothing of the model: they repeat others, or matter in training alone."""

    keys: tuple[str, ...]

    def read(self, _: Config) -> dict[str, Any]:
        return {}

    def write(self, _: ModelSpec) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Agreeing:
    """Several properties that are one switch, off by default, and its keys: each of a list in its spellings, the first of which
    is written. All keys must say the same."""

    fields: tuple[str, ...]
    spellings: tuple[tuple[str, ...], ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(key for keys in self.spellings for key in keys)

    def read(self, config: Config) -> dict[str, Any]:
        stated = [[config[key] for key in keys if config.get(key) is not None] or [False] for keys in self.spellings]
        value = stated[0][0]
        if any(other != value for values in stated for other in values):
            shown = ", ".join(f"{key}={config.get(key)!r}" for key in self.keys if key in config)
            raise ConversionError(
                f"config.json has {shown}; {' and '.join(keys[0] for keys in self.spellings)} must agree"
            )
        return dict.fromkeys(self.fields, value)

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        return {keys[0]: spec.values.get(self.fields[0]) for keys in self.spellings}


@dataclass(frozen=True)
class Named:
    """A config key whose values have other names in the spec: `names` has the spec's value by the config's.

    Where several names mean the same, the first is written.
    """

    field: str
    key: str
    names: Mapping[Any, Any]
    default: Any = REQUIRED

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, config: Config) -> dict[str, Any]:
        value = config.get(self.key)
        if value is None and self.default is not REQUIRED:
            value = self.default
        if not isinstance(value, (str, int, float)) or value not in self.names:
            known = ", ".join(map(repr, self.names))
            raise ConversionError(f"config.json has {self.key}={value!r}; only {known} can be converted")
        return {self.field: self.names[value]}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        held = spec.values.get(self.field)
        return {self.key: next((name for name, meaning in self.names.items() if meaning == held), held)}


@dataclass(frozen=True)
class Multiple:
    """A config key that is a whole multiple of a property."""

    field: str
    key: str
    factor: int

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, config: Config) -> dict[str, Any]:
        value = config.get(self.key)
        if not is_whole(value) or value % self.factor:
            raise ConversionError(f"config.json has {self.key}={value!r}; it must be a multiple of {self.factor}")
        return {self.field: value // self.factor}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        value = spec.values.get(self.field)
        return {self.key: value * self.factor if is_whole(value) else None}


@dataclass(frozen=True)
class Reciprocal:
    """A config key that is 1 divided by a property."""

    field: str
    key: str
    default: float = 1.0

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def read(self, config: Config) -> dict[str, Any]:
        value = config.get(self.key, self.default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value:
            raise ConversionError(f"config.json has {self.key}={value!r}; it must be a number other than 0")
        return {self.field: 1 / value}

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        value = 1 / spec.values[self.field]
        return {self.key: round(value) if abs(value - round(value)) < _EPSILON * value else value}


#: Relative error of dividing twice in float64.
_EPSILON = 1e-12


def per_layer(values: list[Any]) -> Any:
    """Property with these values in the layers: a single value where all are equal."""
    return values[0] if values and all(value == values[0] for value in values) else PerLayer(values)


def layer_count(config: Config) -> int:
    """Number of layers that config.json states; 0 where it is no number of layers, which `ModelSpec` refuses."""
    count = config.get("num_hidden_layers")
    return count if is_whole(count) and count < TOO_MANY_LAYERS else 0


def check_kinds(key: str, kinds: Sequence[str], known: Sequence[str], layers: int) -> None:
    """Raise `ConversionError` unless the list under a config key has one of the known kinds for each layer."""
    if len(kinds) != layers or not {*kinds} <= {*known}:
        raise ConversionError(
            f"config.json has {key}={kinds!r}; it must name {' or '.join(known)} for each of {layers} layers"
        )


def list_of_names(config: Config, key: str) -> list[str]:
    """List of names under a config key; empty if it is absent. Raises `ConversionError` for anything else."""
    names = config.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConversionError(f"config.json has {key}={names!r}; it must be a list of names")
    return names

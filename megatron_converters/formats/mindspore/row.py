"""Row of the table of MindSpore Transformers' model_config: a key, its synonyms, and what it says of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...basics.errors import ConversionError, one_line
from ...model.spec import ModelSpec
from .names import Dialect

Config = Mapping[str, Any]
Properties = dict[str, Any]


def _nothing(_: Config) -> Properties:
    return {}


def _no_limit(_: ModelSpec) -> str:
    return ""


@dataclass(frozen=True)
class Row:
    """Key of model_config, by whichever of `keys` it is named; the first is written.

    `write` gives its value, None where a model has none, so that the key is left out. `read` gets the whole configuration under
    written keys, as `canonical` returns it. `absent` is MindSpore Transformers' own default; classes of models have others. `limit`
    gives a reason why its training graphs do not compute what the model does, or no text.
    """

    keys: tuple[str, ...]
    write: Callable[[Dialect], Any] = lambda _: None
    read: Callable[[Config], Properties] = _nothing
    absent: Any = None
    limit: Callable[[ModelSpec], str] = _no_limit

    @property
    def key(self) -> str:
        """Key that is written."""
        return self.keys[0]


def written(rows: Iterable[Row], dialect: Dialect) -> dict[str, Any]:
    """Configuration of a model, by key."""
    values = {row.key: row.write(dialect) for row in rows}
    return {key: value for key, value in values.items() if value is not None}


def canonical(rows: Iterable[Row], config: Config, where: str) -> dict[str, Any]:
    """Values of a configuration under written keys; a row without a value has that of `absent`, and other keys are left out.

    Raises `ConversionError` where synonyms have different values; `where` names the configuration.
    """
    return {row.key: _value(row, config, where) for row in rows}


def _value(row: Row, config: Config, where: str) -> Any:
    given = {key: config[key] for key in row.keys if config.get(key) is not None}
    first = next(iter(given.values()), row.absent)
    if any(value != first for value in given.values()):
        said = ", ".join(f"{key} {one_line(value)}" for key, value in given.items())
        raise ConversionError(
            f"{where} has different values under names that mean the same: {said}; keep the right one"
        )
    return first


def properties(rows: Iterable[Row], config: Config) -> Properties:
    """Properties of a model by a canonical configuration."""
    found: Properties = {}
    for row in rows:
        found |= row.read(config)
    return found


def limits(rows: Iterable[Row], spec: ModelSpec) -> Iterator[str]:
    """Reasons why MindSpore Transformers does not compute what the model does."""
    for row in rows:
        reason = row.limit(spec)
        if reason:
            yield reason


def same(name: str, *synonyms: str, field: str = "", absent: Any = None) -> Row:
    """Key of a property of the model, which is called `field`, or as the key."""
    field = field or name

    def read(config: Config) -> Properties:
        return {} if config[name] is None else {field: config[name]}

    return Row((name, *synonyms), lambda dialect: dialect.spec.values.get(field), read, absent)

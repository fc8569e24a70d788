"""YAML files of plain values, as JSON has them: text, numbers, true, false, null, lists and mappings with text as keys."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from .errors import ConversionError, one_line, reason_of

#: Larger than any file that a person writes.
_MAX_BYTES = 1 << 20
#: More values than any file of that size has unless aliases repeat them.
_MAX_VALUES = 1 << 20
_BRACES = "; a name with { } in a list with [ ] needs quotes"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Safe loader that knows numbers such as 1e-6, and refuses aliases, keys that are there twice, and other tags."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"it has the alias *{event.anchor}; write the value out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            text = getattr(key, "value", "")
            if not isinstance(key, yaml.ScalarNode) or text in seen:
                fault = f"the key {text!r} is there twice" if text in seen else "a key is no single word"
                raise yaml.constructor.ConstructorError(None, None, fault, key.start_mark)
            seen.add(text)
        return super().construct_mapping(node, deep)


class _WithAliases(_Loader):
    """The same, for files of other programs, in which an alias stands for what an anchor marks."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        return yaml.SafeLoader.compose_node(self, parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
#: Dates are text, too.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if not tag.endswith((":timestamp", ":merge"))]
    for first, known in _Loader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path, *, aliases: bool = False) -> dict[str, Any]:
    """Read the mapping in a YAML file; raises `ConversionError` with the line for a file that is missing, broken or no mapping.

    Anchors and aliases are refused unless `aliases`.
    """
    try:
        if path.exists() and not path.is_file():
            raise ConversionError(f"{path} is not a file; name one")
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConversionError(f"{path} is missing; name a file that is there") from None
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {reason_of(error)}") from error
    if len(data) > _MAX_BYTES:
        raise ConversionError(
            f"{path} has {len(data):,} bytes, which is no file that a person has written; name another"
        )
    value = _parsed(path, data, _WithAliases if aliases else _Loader)
    if not isinstance(value, dict):
        raise ConversionError(
            f"{path} holds {'nothing' if value is None else 'no mapping'}; write lines such as 'name: example'"
        )
    if aliases and not _is_small(value):
        raise ConversionError(f"{path} has aliases that stand for more than {_MAX_VALUES:,} values; write them out")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ConversionError(
            f"{path} holds values other than text, finite numbers, true, false, null, lists and mappings; write these alone"
        ) from None
    return value


def _is_small(value: Any) -> bool:
    """Whether a value with all that it contains is of plausible size; a hostile one repeats an alias within another."""
    pending, seen = [value], 0
    while pending and seen <= _MAX_VALUES:
        value = pending.pop()
        seen += 1
        pending += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not pending


def write_yaml(path: Path, value: Any) -> None:
    """Write a mapping of plain values, in its order."""
    path.write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")


def _parsed(path: Path, data: bytes, loader: type[_Loader]) -> Any:
    try:
        return yaml.load(data, Loader=loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f", line {mark.line + 1}"
        fault = error.problem or error.context or "it is no YAML"
        hint = _BRACES if "expected ',' or" in fault else "; correct that line"
        raise ConversionError(f"{path}{line}: {one_line(fault)}{hint}") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ConversionError(f"{path} is no YAML: {one_line(error)}; write it as text in UTF-8") from error
    except RecursionError:
        raise ConversionError(f"{path} has lists within lists too deep to read; write it flatter") from None

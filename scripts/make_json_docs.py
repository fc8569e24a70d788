#!/usr/bin/env python3
"""Write the tables of docs/json.md from the package's schema of JSON reports and its table of exit codes.

python scripts/make_json_docs.py            write docs/json.md; what stands above its tables stays
python scripts/make_json_docs.py --check    exit with 1 if that would change it
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/json.md"
SCHEMA = ROOT / "megatron_converters/cli/reports.schema.json"
_MARK = "<!-- Below: made by scripts/make_json_docs.py. -->\n"
_WORDS = {"string": "text", "boolean": "true or false"}


def tables() -> str:
    """Exit codes, then one section for each report, then one for each object within them."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    objects = schema["$defs"]
    reports = [one["$ref"].rpartition("/")[2] for one in schema["anyOf"]]
    lines = ["## Exit codes", "", *_exit_codes(), "", "## Reports"]
    for name in reports:
        lines += ["", *_section(objects, name)]
    lines += ["", "## Objects within reports"]
    for name in objects:
        if name not in reports and "properties" in objects[name]:
            lines += ["", *_section(objects, name)]
    return "\n".join(lines) + "\n"


def _exit_codes() -> Iterator[str]:
    from megatron_converters.basics.exit_codes import EXIT_CODES

    yield "| command | 0 | 1 | 2 |"
    yield "|---|---|---|---|"
    for command, codes in EXIT_CODES.items():
        yield f"| `{command}` | {codes.done} | {codes.failed} | {codes.usage} |"
    yield ""
    yield "Every command ends with 130 after Ctrl-C, and with 2 for an option that it does not have."


def _section(objects: dict[str, Any], name: str) -> Iterator[str]:
    described = objects[name]
    yield f"### {described['title']}"
    yield ""
    if "description" in described:
        yield described["description"]
        yield ""
    yield "| field | type | unit | meaning |"
    yield "|---|---|---|---|"
    for field, entry in described["properties"].items():
        optional = "" if field in described["required"] else " (may be absent)"
        unit = entry.get("unit") or entry.get("items", {}).get("unit") or _unit_of_values(entry)
        yield f"| `{field}`{optional} | {_type(objects, entry)} | {unit} | {entry['description']} |"


def _unit_of_values(entry: dict[str, Any]) -> str:
    values = entry.get("additionalProperties")
    return values.get("unit", "") if isinstance(values, dict) else ""


def _type(objects: dict[str, Any], entry: dict[str, Any]) -> str:
    """Type of a field in words, with links to the objects that it holds."""
    if "$ref" in entry:
        return _reference(objects, entry["$ref"].rpartition("/")[2])
    if "anyOf" in entry:
        return " or ".join(_type(objects, one) for one in entry["anyOf"])
    if "enum" in entry:
        return ", ".join(f"`{json.dumps(value)}`" for value in entry["enum"])
    kinds = entry["type"] if isinstance(entry["type"], list) else [entry["type"]]
    return " or ".join(_kind(objects, entry, kind) for kind in kinds)


def _kind(objects: dict[str, Any], entry: dict[str, Any], kind: str) -> str:
    if kind == "array" and "items" in entry:
        number = f"{entry['minItems']} × " if "minItems" in entry else "list of "
        return number + _type(objects, entry["items"])
    if kind == "object" and "additionalProperties" in entry:
        return f"object of {_type(objects, entry['additionalProperties'])}"
    return _WORDS.get(kind, "list" if kind == "array" else kind)


def _reference(objects: dict[str, Any], name: str) -> str:
    described = objects[name]
    if "properties" not in described:
        return _type(objects, described)
    return f"[{described['title']}](#{described['title'].lower().replace(' ', '-')})"


if __name__ == "__main__":
    from made_pages import keep

    keep(PAGE, lambda written: written.partition(_MARK)[0] + _MARK + "\n" + tables(), "the schema")

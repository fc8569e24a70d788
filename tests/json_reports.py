"""Check of JSON reports against the package's schema: the keywords that it uses, each as JSON Schema means it."""

from __future__ import annotations

import json
from typing import Any

from tests.helpers import ROOT

SCHEMA = json.loads((ROOT / "megatron_converters/cli/reports.schema.json").read_text(encoding="utf-8"))
OBJECTS: dict[str, Any] = SCHEMA["$defs"]
REPORTS = [one["$ref"].rpartition("/")[2] for one in SCHEMA["anyOf"]]
KEYWORDS = set(
    "$ref anyOf enum type properties required additionalProperties items minItems maxItems title description unit".split()
)
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
#: Field of an object of the schema.
Field = tuple[str, str]


def documented_fields() -> set[Field]:
    """Every field that the schema documents."""
    return {(name, field) for name, one in OBJECTS.items() for field in one.get("properties", ())}


def fields_of(report: Any, name: str) -> set[Field]:
    """Documented fields that a report has; fails where it is not as the object `name` of the schema says."""
    check = Check()
    check.value(report, {"$ref": f"#/$defs/{name}"}, name)
    assert check.faults == [], check.faults
    return check.seen


class Check:
    """Faults of a value, and the fields that were seen in it."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.seen: set[Field] = set()

    def value(self, value: Any, schema: dict[str, Any], place: str, name: str = "") -> None:
        """Check a value; `name` is the object of the schema that it belongs to."""
        assert schema.keys() <= KEYWORDS, schema
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            self.value(value, OBJECTS[name], place, name)
        if "anyOf" in schema:
            self.any_of(value, schema["anyOf"], place, name)
        if "enum" in schema and value is not None and value not in schema["enum"]:
            self.faults.append(f"{place}: {value!r} is none of {schema['enum']}")
        if "type" in schema and not is_of(value, schema["type"]):
            self.faults.append(f"{place}: {value!r} is no {schema['type']}")
        elif isinstance(value, dict):
            self.fields(value, schema, place, name)
        elif isinstance(value, list) and "items" in schema:
            for number, item in enumerate(value):
                self.value(item, schema["items"], f"{place}[{number}]", name)
            if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
                self.faults.append(f"{place} has {len(value)} items")

    def any_of(self, value: Any, choices: list[dict[str, Any]], place: str, name: str) -> None:
        """Check that one of the choices fits."""
        faults: list[str] = []
        for choice in choices:
            check = Check()
            check.value(value, choice, place, name)
            if not check.faults:
                self.seen |= check.seen
                return
            faults += check.faults
        self.faults += faults

    def fields(self, value: dict[str, Any], schema: dict[str, Any], place: str, name: str) -> None:
        """Check the fields of an object."""
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        self.faults += [f"{place} lacks {field}" for field in schema.get("required", ()) if field not in value]
        for field, item in value.items():
            if field in known:
                self.seen.add((name, field))
                self.value(item, known[field], f"{place}.{field}", name)
            elif isinstance(others, dict):
                self.value(item, others, f"{place}.{field}", name)
            elif others is False:
                self.faults.append(f"{place}.{field} is not documented")


def is_of(value: Any, kinds: str | list[str]) -> bool:
    """Whether a value is of one of these types; true and false are no numbers."""
    allowed = [kinds] if isinstance(kinds, str) else kinds
    if isinstance(value, bool):
        return "boolean" in allowed
    return any(isinstance(value, _TYPES[kind]) for kind in allowed)

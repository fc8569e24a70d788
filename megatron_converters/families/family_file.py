"""Family files: a family as YAML, with names and rules of which nothing is run. docs/adding-a-family.md describes the format."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..basics.errors import ConversionError
from ..basics.yaml_files import read_yaml
from ..model.layouts import NAMED
from ..model.slots import SLOTS
from ..model.tables import Entry
from ..model.values import Affine
from . import place as checks
from .file_rules import read_rules
from .place import Check, Place
from .registry import FAMILIES, FromFile, clash
from .rules import Rule
from .table import Family

_NAMES = ("name", "model_type", "architecture")
_TABLES = ("tensors", "rules")
#: Other fields of `Family` that a file may give, inherited from its base.
_FIELDS: Mapping[str, Check] = {
    "layer": checks.template,
    "mtp_layer": checks.template,
    "optional_prefix": checks.text,
    "ignored_suffixes": checks.texts,
}
_KEYS = (*_NAMES, "aliases", "base", "replaces", *_TABLES, "replicas", *_FIELDS)
_ENTRY_KEYS: Mapping[str, Check] = {
    "names": checks.templates,
    "layout": checks.text,
    "transposed": checks.switch,
    "stacked": checks.switch,
    "swapped": checks.switch,
    "unit_rows": checks.switch,
    "fused": checks.or_null(checks.template),
    "scale": checks.number,
    "shift": checks.number,
}
#: Key of a slot that files leave out, in place of all others.
_CONSTANT = "constant"
#: What holds of a base alone, and not of what is made of it.
_UNSTATED: Mapping[str, Any] = {"since": "", "proof": None, "models": "", "covers": ""}
#: Properties without which no model can be described.
_NEEDED = ("num_layers", "hidden_size", "vocab_size", "max_position_embeddings", "norm_epsilon")


def read_family_file(path: str | os.PathLike[str]) -> FromFile:
    """Read a family file; raises `ConversionError` with the place of a mistake, the mistake and the remedy.

    The digest is of what the file says, whatever its comments and spaces.
    """
    values = read_yaml(Path(path))
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    place = Place(os.fspath(path))
    checks.only(values, place, _KEYS, _NAMES)
    base = _known(values, "base", place)
    if base is None:
        checks.only(values, place, _KEYS, _TABLES)
    replaced = _known(values, "replaces", place)
    family = _family(values, base, place)
    taken = clash(family, [known for known in FAMILIES.values() if known is not replaced])
    if taken:
        raise place.fault(
            f"{taken}; choose other names, or add 'replaces: {_holder(family, replaced)}' to take its place"
        )
    return FromFile(family, os.path.realpath(path), digest, "" if replaced is None else replaced.name)


def _holder(family: Family, replaced: Family | None) -> str:
    """Name of the family that has one of these names."""
    return next(known.name for known in FAMILIES.values() if known is not replaced and clash(family, [known]))


def _known(values: Mapping[str, Any], key: str, place: Place) -> Family | None:
    """The family that a key names, None without the key."""
    return checks.chosen(values[key], place.at(key), "family", FAMILIES) if key in values else None


def _family(values: Mapping[str, Any], base: Family | None, place: Place) -> Family:
    own: dict[str, Any] = {key: checks.text(values[key], place.at(key)) for key in _NAMES}
    own["aliases"] = checks.texts(values["aliases"], place.at("aliases")) if "aliases" in values else ()
    own |= {key: check(values[key], place.at(key)) for key, check in _FIELDS.items() if key in values}
    own["further_architectures"] = ()
    own["tensors"] = _tensors(values.get("tensors", {}), base, place.at("tensors"))
    own["rules"] = read_rules(values.get("rules", []), place.at("rules"), () if base is None else base.rules)
    if "replicas" in values:
        own["replicas"] = _replicas(values["replicas"], place.at("replicas"))
    _check_needed(own["rules"], place.at("rules"))
    try:
        return Family(**own) if base is None else dataclasses.replace(base, **_UNSTATED, **own)
    except ValueError as error:
        raise place.fault(f"{error}; correct the names") from None


def _tensors(value: Any, base: Family | None, place: Place) -> dict[str, Entry]:
    """Entries by slot: those of the base, and over them those of the file; null takes one away."""
    found = {} if base is None else dict(base.tensors)
    for slot, given in checks.mapping(value, place).items():
        checks.chosen(slot, place, "slot", SLOTS)
        if given is None:
            found.pop(slot, None)
        else:
            found[slot] = _entry(slot, given, found.get(slot), place.at(slot))
    return found


def _entry(slot: str, value: Any, inherited: Entry | None, place: Place) -> Entry:
    """Entry of a slot; what the file does not say of it is as in the base."""
    given = value if isinstance(value, dict) else {"names": value}
    if _CONSTANT in given:
        checks.only(given, place, (_CONSTANT,))
        return Entry(NAMED["same"].layout, (), constant=checks.number(given[_CONSTANT], place.at(_CONSTANT)))
    if inherited is not None and inherited.constant is not None:
        inherited = None
    checks.only(given, place, _ENTRY_KEYS, ("names",) if inherited is None else ())
    read = {key: check(given[key], place.at(key)) for key, check in _ENTRY_KEYS.items() if key in given}
    entry = inherited or Entry(NAMED["same"].layout, ())
    if "layout" in read:
        read["layout"] = checks.chosen(read["layout"], place.at("layout"), "layout", NAMED).layout
    if {"scale", "shift"} & read.keys():
        read["value"] = _affine(read.pop("scale", None), read.pop("shift", None), entry.value, place)
    entry = dataclasses.replace(entry, **read)
    _check_parts(slot, entry, place)
    return entry


def _affine(scale: float | None, shift: float | None, inherited: Affine | None, place: Place) -> Affine | None:
    before = inherited or Affine()
    try:
        value = Affine(
            *(Fraction(old) if new is None else new for new, old in ((scale, before.scale), (shift, before.shift)))
        )
    except ConversionError as error:
        raise place.fault(f"{error}; correct scale and shift") from None
    return None if value.is_identity else value


def _check_parts(slot: str, entry: Entry, place: Place) -> None:
    """Raise unless the layout is one for this slot, and has as many parts as there are names."""
    name, parts = next(
        ((name, known.parts) for name, known in NAMED.items() if known.layout is entry.layout),
        (entry.layout.name, {slot: len(entry.names)}),  # of a plug-in's base
    )
    if slot not in parts:
        fitting = ", ".join(name for name, known in NAMED.items() if slot in known.parts)
        raise place.fault(f"the layout {name} is not for this slot, which can have {fitting}; choose one of them")
    if parts[slot] != len(entry.names):
        fitting = ", ".join(name for name, known in NAMED.items() if known.parts.get(slot) == len(entry.names))
        remedy = f", or one of the layouts {fitting}" if fitting else ""
        raise place.fault(
            f"there are {len(entry.names)} names, and the layout {name} has {parts[slot]} parts; give as many names{remedy}"
        )


def _replicas(value: Any, place: Place) -> dict[str, str]:
    found = {}
    for slot, name in checks.mapping(value, place).items():
        checks.chosen(slot, place, "slot", SLOTS)
        found[slot] = checks.template(name, place.at(slot))
    return found


def _check_needed(rules: tuple[Rule, ...], place: Place) -> None:
    decided = {getattr(rule, "field", None) for rule in rules}
    missing = [name for name in _NEEDED if name not in decided]
    if missing:
        raise place.fault(
            f"no rule decides {', '.join(missing)}; add a row for each, such as 'row: [{missing[0]}, its_key]'"
        )

"""Text part of a folder that holds a model of images and text, and what lies beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...assets.origin import EXPERTS, MODEL, TEXT, Carried, Origin
from ...basics.errors import ConversionError, raise_all
from ...families import FAMILIES
from ...families.config_json import wrapper_in
from ...families.table import Family
from ...model.slots import Ref, refs
from ...model.spec import ModelSpec
from ...storage.tensor import StoredTensor
from .parts import HFNames

if TYPE_CHECKING:
    from ...families.wrappers import Spelling, Wrapper

_EXPERT_SLOTS = ("expert_fc1", "expert_fc2")


class TextPart(NamedTuple):
    """Tensors of the text part and the table of their names; `carried` is what lies beside it, None in a model of text alone."""

    family: Family
    spec: ModelSpec
    stored: dict[str, StoredTensor]
    ghosts: dict[str, str]
    carried: Carried | None = None
    notes: tuple[str, ...] = ()


def text_part_of(
    folder: Path,
    config: Mapping[str, Any],
    spec: ModelSpec,
    stored: Mapping[str, StoredTensor],
    ghosts: Mapping[str, str],
) -> TextPart:
    """Text part of the model whose config.json is `config`: the whole where it is a model of text.


    Raises `ConversionError` for tensors that are neither of the text part nor of what such a model has beside it.
    """
    family = FAMILIES[spec.family]
    wrapper = wrapper_in(config)
    if wrapper is None:
        return TextPart(family, spec, dict(stored), dict(ghosts))
    from ...assets.side_file import small_files
    from ...families.text_parts import tie_note
    from ...families.wrappers import spelling_of

    names = {**ghosts, **stored}
    spelling = spelling_of(wrapper, family, names)
    stack = _stack(wrapper, family, spelling, spec, stored)
    table = wrapper.table(family, spelling, stack)
    head = table.tensors["output_layer"].names
    begins = (spelling.text, *_prediction(table, spelling))
    text = {name for name in names if name.startswith(begins) or name in head}
    beside = {name for name in names if name not in text and name.startswith(spelling.beside)}
    others = names.keys() - text - beside
    raise_all(
        f"{folder}: tensors that are neither of the text part ({spelling.text}*) nor of what {wrapper.architecture} has beside it:",
        sorted(others),
        remedy="leave them out with --ignore-tensors if the model does not need them",
    )
    lost = sorted(name for name in beside if name in ghosts)
    raise_all(f"{folder}: tensors beside the text part that only the index has:", lost, remedy="copy the folder again")
    tied = not any(name in names for name in head)
    carried = Carried(
        {name: stored[name] for name in stored if name in beside},
        {MODEL: wrapper.model_type, TEXT: spelling.text, **({EXPERTS: stack} if stack else {})},
        small_files(folder),
    )
    return TextPart(
        table,
        dataclasses.replace(spec, tied=tied),
        {name: data for name, data in stored.items() if name in text},
        {name: file for name, file in ghosts.items() if name in text},
        carried,
        (carried.note, *tie_note(config, tied=tied)),
    )


def _prediction(table: Family, spelling: Spelling) -> tuple[str, ...]:
    """How names of multi-token prediction begin where they do so otherwise than those of the text part (Qwen3.5's "mtp.")."""
    layer = table.mtp_layer
    return (f"{layer.partition('.')[0]}.",) if layer and not layer.startswith(spelling.text) else ()


def table_for(family: Family, origin: Origin) -> Family:
    """Table of the folder that is written: the family's, or that of a text part among what lies beside it."""
    wrapper, carried = wrapper_in(origin.hf_config), origin.carried
    if wrapper is None or carried is None:
        return family
    marks = carried.marks
    spelling = next((each for each in wrapper.spellings if each.text == marks[TEXT]), None)
    if spelling is None or marks[MODEL] != wrapper.model_type or marks.get(EXPERTS, "") not in ("", *wrapper.stacks):
        raise ConversionError(
            f"what is carried beside the text part is of a model of type {marks[MODEL]} with names in {marks[TEXT]}*, and "
            f"config.json names {wrapper.architecture}; give the configuration of the same model"
        )
    return wrapper.table(family, spelling, marks.get(EXPERTS, ""))


def _stack(
    wrapper: Wrapper, family: Family, spelling: Spelling, spec: ModelSpec, stored: Mapping[str, StoredTensor]
) -> str:
    """Form in which the files have experts, by the shapes of the first ones; empty for the family's own.

    Raises `ConversionError` where shapes fit two forms.
    """
    first = _first_experts(spec) if wrapper.stacks else []
    fitting: set[str] | None = None
    for ref in first:
        parts = {
            name: HFNames(wrapper.table(family, spelling, name), spec).parts(ref, fused=False)[0]
            for name in wrapper.stacks
        }
        data = {name: stored[part.name] for name, part in parts.items() if part.name in stored}
        if not data:
            return ""
        fits = {name for name in data if data[name].shape == parts[name].stored_shape}
        if len(fits) > 1:
            part = next(iter(parts.values()))
            raise ConversionError(
                f"{part.name} has shape {list(part.stored_shape)}, which fits both ways in which {wrapper.architecture} is stored "
                "(transposed, as it is published, or not, as transformers 5 saves it); store each expert as tensors of its own"
            )
        fitting = fits if fitting is None else fitting & fits
    return next(iter(fitting or wrapper.stacks)) if first else ""


def _first_experts(spec: ModelSpec) -> list[Ref]:
    """Refs of the first expert of the first layer that has any."""
    found: dict[str, Ref] = {}
    for ref in refs(spec):
        if ref.slot.name in _EXPERT_SLOTS:
            found.setdefault(ref.slot.name, ref)
    return [*found.values()]

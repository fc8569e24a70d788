"""Names that differ from those of a family's table in what a program has put before or into all of them.

transformers finds a model's tensors with or without the prefix of its base model (modeling_utils.py, `base_model_prefix`). Wrappers
of a module, and programs that hold several models, put further parts into names.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from ...basics.errors import ConversionError, one_line
from ...basics.quantities import count
from ...families.table import Family
from ...model.slots import SLOTS, Ref, refs
from ...model.spec import ModelSpec
from .parts import HFNames

Data = TypeVar("Data")
#: Parts of names that wrappers of modules add wherever they stand, and that no model has itself.
_WRAPPERS = {
    "_orig_mod": "torch.compile",  # torch/_dynamo/eval_frame.py, OptimizedModule
    "_fsdp_wrapped_module": "FSDP",  # torch/distributed/fsdp/_common_utils.py, FSDP_WRAPPED_MODULE
    "_checkpoint_wrapped_module": "activation checkpointing",  # torch/distributed/algorithms/_checkpoint/checkpoint_wrapper.py
    "_forward_module": "Lightning Fabric",  # lightning/fabric/wrappers.py, _FabricModule
}
#: Parts of names of adapters that PEFT has not merged (peft/tuners/lora/layer.py and peft/utils/other.py, 0.17).
_ADAPTERS = frozenset(
    """
    lora_A lora_B lora_embedding_A lora_embedding_B lora_magnitude_vector base_layer modules_to_save original_module
    """.split()
)
#: Maximum number of names in a message.
_SHOWN = 3


@dataclass(frozen=True)
class Wrapping:
    """What is otherwise in a folder's names: by the name in the family's table, the one in the files, where they differ."""

    in_files: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def in_file(self, name: str) -> str:
        """Name in the files of a name of the table."""
        return self.in_files.get(name, name)

    def as_table(self, stored: Mapping[str, Data]) -> dict[str, Data]:
        """What is stored under names of the files, by those of the table."""
        of_table = {file: name for name, file in self.in_files.items()}
        return {of_table.get(file, file): data for file, data in stored.items()}


def refuse_adapters(where: object, stored: Collection[str]) -> None:
    """Raise `ConversionError` where names are those of adapters that are not merged into the weights."""
    found = sorted(name for name in stored if not _ADAPTERS.isdisjoint(name.split(".")))
    if found:
        shown = ", ".join(map(one_line, found[:_SHOWN])) + (", …" if len(found) > _SHOWN else "")
        raise ConversionError(
            f"{where} holds {count(len(found), 'tensor')} of an adapter (LoRA) that is not merged into the weights ({shown}); "
            "merge it, in PEFT with merge_and_unload() and save_pretrained(), and convert the result"
        )


def wrapping_of(stored: Collection[str], ghosts: Collection[str], family: Family, spec: ModelSpec) -> Wrapping:
    """What is otherwise in these names of a folder than in the family's table; nothing where names are as they should be.

    `ghosts` are names of tensors that are not there. Raises `ConversionError` where a whole model is there under two prefixes.
    """
    bare, notes = _unwrapped([*stored, *ghosts])
    names = HFNames(family, spec)
    for other, name in family.renamed.items():
        if other in bare and name not in bare:
            bare[name] = bare.pop(other)
    renamed, note = _unprefixed(bare, family, names, spec)
    final, tied = _tied_by_head(renamed, {name for name in renamed if bare[renamed[name]] in stored}, names, spec)
    in_files = {name: bare[renamed[final[name]]] for name in final}
    different = {name: file for name, file in in_files.items() if name != file}
    return Wrapping(different, (*notes, *note, *tied))


def _unwrapped(stored: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Names by what they are without the parts of wrappers, and a note on these."""
    found: dict[str, str] = {}
    wrappers: dict[str, None] = {}
    for name in stored:
        parts = name.split(".")
        inside = [part for part in parts if part in _WRAPPERS]
        wrappers.update(dict.fromkeys(inside))
        found[".".join(part for part in parts if part not in _WRAPPERS) if inside else name] = name
    if len(found) != len(stored):  # both with and without a wrapper: which one is meant is not known
        return {name: name for name in stored}, []
    return found, [f"names are read without {part!r}, which {_WRAPPERS[part]} adds" for part in wrappers]


def _unprefixed(
    stored: Collection[str], family: Family, names: HFNames, spec: ModelSpec
) -> tuple[dict[str, str], list[str]]:
    """Names by those of the table, where they differ in one prefix, and a note on it; else as they are."""
    as_they_are = {name: name for name in stored}
    base = family.base_prefix
    shared = [ref for ref in refs(spec) if ref.expert is None]
    head = family.tensors["output_layer"].names if "output_layer" in family.tensors else ()
    outside = {name for ref in shared for name in names.names(ref) if not name.startswith(base)} | {*head}
    backbone = [firsts for ref in shared if (firsts := _first_names(ref, names, base))]
    anchors = set(itertools.chain(*backbone[:1], *backbone[len(backbone) // 2 :][:1], *backbone[-1:]))
    if not base or any(base + anchor in as_they_are for anchor in anchors):
        return as_they_are, []
    matches = {
        prefix: sum(any(prefix + name in as_they_are for name in firsts) for firsts in backbone)
        for prefix in _prefixes(stored, anchors)
    }
    most = max(matches.values(), default=0)
    best = [prefix for prefix, number in matches.items() if number == most]
    if 2 * most < len(backbone):
        return as_they_are, []
    if len(best) > 1:
        raise ConversionError(
            f"the model is there under several prefixes, {' and '.join(map(repr, best))}, and which is meant is not clear; leave "
            "the others out with --ignore-tensors"
        )
    renamed = _renamed(stored, best[0], base, outside)
    return (renamed, _prefix_notes(best[0], family)) if len(renamed) == len(stored) else (as_they_are, [])


def _first_names(ref: Ref, names: HFNames, base: str) -> list[str]:
    """Name of a ref's first tensor, and of the fused one that may be there instead, without the base model's prefix."""
    found = (*names.names(ref)[:1], names.fused_name(ref))
    return [name.removeprefix(base) for name in found if name.startswith(base)]


def _prefixes(stored: Iterable[str], anchors: Collection[str]) -> list[str]:
    """What stands before one of the anchors in any name."""
    found = (
        name[: -len(anchor)]
        for name in stored
        for anchor in anchors
        if name.endswith(anchor) and (len(name) == len(anchor) or name[-len(anchor) - 1] == ".")
    )
    return list(dict.fromkeys(found))


def _renamed(stored: Iterable[str], prefix: str, base: str, outside: Collection[str]) -> dict[str, str]:
    """Names by those with `base` in place of the prefix. Tensors `outside` of the base model have what is before it, or nothing."""
    before = tuple(dict.fromkeys((_before(prefix, base), prefix, "")))
    found: dict[str, str] = {}
    for name in stored:
        bare = next((name.removeprefix(each) for each in before if name.removeprefix(each) in outside), None)
        found[bare or (base + name[len(prefix) :] if name.startswith(prefix) else name)] = name
    return found


def _before(prefix: str, base: str) -> str:
    """Prefix without that of the base model, if it ends with that."""
    return prefix[: -len(base)] if prefix == base or prefix.endswith(f".{base}") else prefix


def _prefix_notes(prefix: str, family: Family) -> list[str]:
    base = family.base_prefix
    if not prefix and family.optional_prefix:  # as the family is published
        return []
    if not prefix:
        return [f"names lack the prefix {base!r} of the base model, as transformers allows"]
    foreign = _before(prefix, base)
    return [
        f"names begin with {foreign!r}" if foreign != prefix else f"names begin with {prefix!r} in place of {base!r}"
    ]


def _tied_by_head(
    renamed: Mapping[str, str], stored: Collection[str], names: HFNames, spec: ModelSpec
) -> tuple[dict[str, str], list[str]]:
    """Names with the head's as that of the embeddings where these are tied to it and not `stored` themselves, and a note."""
    found = {name: name for name in renamed}
    if not spec.tied:
        return found, []
    embeddings, head = (names.names(Ref(SLOTS[slot]))[0] for slot in ("word_embeddings", "output_layer"))
    if embeddings in stored or head not in stored:
        return found, []
    found[embeddings] = found.pop(head)
    return found, [f"the embeddings, which config.json ties to the head, are stored as {renamed[head]} alone"]

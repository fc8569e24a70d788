"""What is supported: the facts of every family, for `families`, the API and docs/models.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce

from ..basics.errors import ConversionError
from ..families import FAMILIES
from ..families.config_json import spec_from_config
from ..families.facts import NOT_STATED, Family
from ..families.table import Family as Table
from ..families.typical import required_config
from ..families.wrappers import WRAPPERS, Wrapper
from ..formats.kinds import HF, MEGATRON, META, MINDSPORE
from ..formats.megatron.releases import before
from ..formats.meta.params import LLAMA, MISTRAL
from ..formats.mindspore.limits import without_place
from ..model.spec import ModelSpec


def supported_families() -> tuple[Family, ...]:
    """Every family that can be converted, also those from outside this package, with what is known of it; then wrappers."""
    families = tuple(_facts(name, table) for name, table in FAMILIES.items())
    return (*families, *(_facts_of_wrapper(row, {family.name: family for family in families}) for row in WRAPPERS))


def _facts_of_wrapper(row: Wrapper, families: Mapping[str, Family]) -> Family:
    """Facts of a model of images and text, of which some are those of the families that its text part can be."""
    texts = [families[name] for name in row.text_families if name in families]
    kinds = dict.fromkeys(kind for family in texts for kind in family.kind.split(", "))
    releases = [family.since for family in texts if family.since is not None]
    return Family(
        *(row.model_type, row.model_type, row.architecture, row.aliases),
        kind=", ".join(("VL", *kinds)),
        formats=(HF, MEGATRON),
        since=reduce(_earlier, releases) if releases else None,
        proof=row.proof.value,
        models=row.models,
        covers=row.covers,
    )


def _facts(name: str, table: Table) -> Family:
    typical, own = _typical(table), FAMILIES.built_in.get(name) is table
    return Family(
        *(table.name, table.model_type, table.architecture, table.aliases),
        kind=", ".join(_kinds(table, typical)),
        formats=tuple(_formats(name, typical)),
        since=table.since or None if own else None,
        proof=table.proof.value if own and table.proof is not None else NOT_STATED,
        models=table.models,
        covers=table.covers,
    )


def _earlier(one: str, other: str) -> str:
    return one if before(one, other) else other


def _typical(table: Table) -> ModelSpec | None:
    """Spec of a typical model; None if a required key of the family's has no usual size."""
    try:
        return spec_from_config(required_config(table))
    except ConversionError:
        return None


def _kinds(table: Table, typical: ModelSpec | None) -> Iterator[str]:
    """Kinds of layers that the table has tensors for; of a family that may do without experts, both."""
    slots = table.tensors
    hybrid, latent = any(slot.startswith("delta_") for slot in slots), "kv_down" in slots
    if hybrid or latent:
        yield "hybrid" if hybrid else "MLA"
    elif "router" not in slots or (typical is not None and not typical.num_experts):
        yield "dense"
    if "router" in slots:
        yield "MoE"


def _formats(name: str, typical: ModelSpec | None) -> Iterator[str]:
    yield from (HF, MEGATRON)
    if name in (LLAMA, MISTRAL):
        yield META
    if typical is not None and not any(without_place(typical)):
        yield MINDSPORE

"""Numbers that a caller gives, the rules that they obey, and the heads that follow from them and from shapes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

from ..basics.errors import InvalidConfiguration
from ..formats.megatron.detecting import Detected
from ..model.spec import ModelSpec
from .presets import RELEASES, Preset

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Numbers:
    """Numbers of a caller; None where it gives none. They win over presets, and must agree with args, shapes and configuration."""

    num_layer: int | None = None
    tp_size: int | None = None
    pp_size: int | None = None
    num_kv_heads: int | None = None
    num_query_heads: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and (type(value) is not int or value < 1):
                raise InvalidConfiguration(f"--{field.name} {value!r} must be a whole number from 1 on")
        _raise_first(_broken_rules(self))


def _broken_rules(numbers: Numbers) -> Iterator[str]:
    """Rules that given numbers break. TP beyond the KV heads is megatron-core's from 0.16 on: a rank gathers what it lacks."""
    layers, tp, pp, kv, queries = (getattr(numbers, field.name) for field in fields(numbers))
    if queries and kv and queries % kv:
        yield f"query heads must be divisible by KV heads: --num_query_heads {queries}, --num_kv_heads {kv}"
    if layers and pp and layers % pp:
        yield f"the number of layers must be divisible by the PP size: --num_layer {layers}, --pp_size {pp}"
    if queries and tp and queries % tp:
        yield f"query heads must be divisible by the TP size: --num_query_heads {queries}, --tp_size {tp}"
    if kv and tp and kv % tp and tp % kv:
        yield f"KV heads must be divisible by the TP size, or it by them: --num_kv_heads {kv}, --tp_size {tp}"


def _raise_first(faults: Iterator[str]) -> None:
    for fault in faults:
        raise InvalidConfiguration(fault)


#: No numbers.
UNSAID = Numbers()


def check_detected(numbers: Numbers, found: Detected) -> None:
    """Raise `InvalidConfiguration` if a number contradicts what was detected, naming both."""
    sizes, by = found.sizes, found.decided_by
    _raise_first(
        f"--{name} {given} contradicts {found.directory}, which has {held} ({where})"
        for name, given, held, where in (
            ("tp_size", numbers.tp_size, sizes.tp, by),
            ("pp_size", numbers.pp_size, sizes.pp, by),
            ("num_layer", numbers.num_layer, found.num_layers, "layers counted over the pipeline stages"),
        )
        if given is not None and held is not None and given != held
    )


def check_spec(numbers: Numbers, spec: ModelSpec, where: object) -> None:
    """Raise `InvalidConfiguration` if a number contradicts the model that args, shapes or a configuration describe, naming both."""
    held = {
        "num_layer": spec.num_layers,
        "num_query_heads": spec.values.get("num_attention_heads"),
        "num_kv_heads": spec.values.get("num_query_groups"),
    }
    _raise_first(
        f"--{name} {given} contradicts {where}, which has {held[name]}"
        for name in held
        if (given := getattr(numbers, name)) is not None and held[name] not in (None, given)
    )


class Heads(NamedTuple):
    """Numbers of query heads and of query groups (KV heads), and what says them; `assumed` where that is only a preset."""

    queries: int
    groups: int
    where: str
    assumed: bool = False


def heads_of(found: Detected, numbers: Numbers, preset: Preset | None, preset_name: str) -> Heads:
    """Heads of a checkpoint whose args do not say them: by shapes with given numbers, a released model, or a preset.

    Raises `InvalidConfiguration` if given numbers contradict the shapes, or if nothing says the numbers.
    """
    if found.query_rows is None and not found.is_latent:
        raise InvalidConfiguration(f"{found.directory}: no layer has attention, so nothing says --num_query_heads")
    by_numbers = _of_numbers(found, numbers)
    if by_numbers is not None:
        return by_numbers
    return _of_shapes(found) or _of_preset(found, preset, preset_name) or _nothing_says(found, preset, preset_name)


def _of_numbers(found: Detected, numbers: Numbers) -> Heads | None:
    queries, groups = numbers.num_query_heads, numbers.num_kv_heads
    if found.is_latent:
        return None if queries is None else Heads(queries, groups or queries, "the given numbers")
    rows, kv_rows = found.query_rows or 0, found.kv_rows or 0
    if queries is None and groups is not None:
        dim = _divided(found, kv_rows, "num_kv_heads", groups)
        queries = _divided(found, rows, "num_kv_heads", dim, of_heads=True)
    if queries is None:
        return None
    dim = _divided(found, rows, "num_query_heads", queries)
    if found.head_dim not in (None, dim):
        raise InvalidConfiguration(
            f"--num_query_heads {queries} means heads of {dim}, but norms of queries in {found.directory} have {found.head_dim}"
        )
    held = _divided(found, kv_rows, "num_query_heads", dim, of_heads=True)
    if groups not in (None, held):
        raise InvalidConfiguration(
            f"--num_kv_heads {groups} contradicts {found.directory}: with {queries} query heads, the {rows + 2 * kv_rows} rows "
            f"of linear_qkv hold {held} KV heads of {dim}"
        )
    return Heads(queries, held, "the given numbers and the shapes")


def _divided(found: Detected, rows: int, option: str, count: int, *, of_heads: bool = False) -> int:
    if rows % count or not rows:
        unit = f"heads of {count}" if of_heads else f"{count} heads"
        raise InvalidConfiguration(
            f"--{option} does not fit {found.directory}: {rows} rows of linear_qkv cannot be {unit}"
        )
    return rows // count


def _of_shapes(found: Detected) -> Heads | None:
    """Heads by norms of queries, which have the size of a head, or of the released model that has these shapes."""
    rows, kv_rows = found.query_rows or 0, found.kv_rows or 0
    if found.head_dim and rows % found.head_dim == 0 and kv_rows % found.head_dim == 0:
        return Heads(rows // found.head_dim, kv_rows // found.head_dim, "norms of queries")
    for release in RELEASES:
        shapes = (
            release.layers,
            release.hidden,
            release.query_heads * release.head_dim,
            release.kv_heads * release.head_dim,
        )
        if found.is_latent and (found.num_layers, found.hidden_size) == shapes[:2]:
            return Heads(release.query_heads, release.kv_heads, f"the shapes of {release.model_type} {release.size}")
        if (found.num_layers, found.hidden_size, rows, kv_rows) == shapes:
            return Heads(release.query_heads, release.kv_heads, f"the shapes of {release.model_type} {release.size}")
    return None


def _of_preset(found: Detected, preset: Preset | None, name: str) -> Heads | None:
    """Query heads of the preset where the shapes can have them; the number of KV heads then follows from the shapes."""
    if preset is None:
        return None
    queries, rows, kv_rows = preset.query_heads, found.query_rows or 0, found.kv_rows or 0
    if found.is_latent:
        return Heads(queries, queries, name, assumed=True)
    dim = rows // queries
    groups = kv_rows // dim if dim else 0
    if not groups or rows % queries or kv_rows % dim or queries % groups:
        LOG.debug("%s: %d query heads of %s do not fit the shapes", found.directory, queries, name)
        return None
    return Heads(queries, groups, name, assumed=True)


def _nothing_says(found: Detected, preset: Preset | None, name: str) -> Heads:
    beside = "" if preset is None else f" ({name} means {preset.query_heads}, which the shapes cannot have)"
    raise InvalidConfiguration(
        f"neither args nor shapes of {found.directory} say the number of query heads{beside}; give --num_query_heads, or "
        "--hf_config DIR"
    )

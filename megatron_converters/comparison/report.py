"""Reports of comparisons, as lines and as JSON values, and the opening of the two folders."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ..conversion.endpoint import Source
from ..formats.reading import ReadOptions, open_source, refuse_unused
from .tensors import Compared, Comparison, Rules

if TYPE_CHECKING:
    from .manifest_check import Checked

#: Tensors that one line lists by name at most.
_MAX_NAMES = 3


class Pair(NamedTuple):
    """Both sources with their formats."""

    formats: tuple[str, str]
    sources: tuple[Source, Source]


def open_pair(
    a: str | os.PathLike[str], b: str | os.PathLike[str], options: ReadOptions, b_format: str | None = None
) -> Pair:
    """Open A and B. An option of one format applies to each side of that format."""
    first = open_source(a, options)
    second = open_source(b, dataclasses.replace(options, format=b_format))
    refuse_unused([first.format, second.format], options)
    return Pair((first.format, second.format), (first.source, second.source))


def findings(comparison: Comparison) -> Iterator[str]:
    """Lines for all differences: settings, whole tensors, then elements with the place of the first on both sides."""
    yield from comparison.spec
    yield from comparison.beside
    yield from of_whole_tensors(comparison)
    for tensor in comparison.different:
        for finding in tensor.findings:
            if finding.measure is not None:
                first, *rest = finding.lines()
                yield "\n".join([f"{tensor.ref}: {first}", *rest])


def of_whole_tensors(comparison: Comparison, *, each: bool = False) -> Iterator[str]:
    """Lines for findings about whole tensors, such as another dtype: one for all tensors that share it, or one for `each`."""
    for text, names in comparison.alike().items():
        if each:
            yield from (f"{name}: {text}" for name in names)
        else:
            more = f" and {len(names) - _MAX_NAMES:,} more tensors" if len(names) > _MAX_NAMES else ""
            yield f"{', '.join(names[:_MAX_NAMES])}{more}: {text}"


def ranked(comparison: Comparison) -> list[Compared]:
    """Compared tensors, those that differ most relative to their norm first; ties keep the order of slots."""
    found = [tensor for tensor in comparison.tensors if tensor.measure is not None]
    return sorted(found, key=_rank)


def _rank(tensor: Compared) -> tuple[float, int]:
    return (-tensor.measure.relative, -tensor.measure.differing) if tensor.measure is not None else (0.0, 0)


def verification_json(pair: Pair, comparison: Comparison, rules: Rules) -> dict[str, Any]:
    """Report of `verify A B`."""
    return {
        "equal": comparison.equal,
        **_pair_json(pair),
        "tensors": len(comparison.tensors),
        "bytes": comparison.nbytes,
        "tolerance": rules.tolerance,
        "ignore_dtype": rules.ignore_dtype,
        "as_cast": rules.as_cast,
        "casts": comparison.casts,
        "padding rows not compared": dict(zip("ab", comparison.padding, strict=True)),
        "spec": comparison.spec,
        "beside": [*comparison.beside],
        "different": [tensor.to_json() for tensor in comparison.different],
    }


def difference_json(pair: Pair, settings: dict[str, list[str]], comparison: Comparison, equal: bool) -> dict[str, Any]:
    """Report of `diff A B`."""
    tensors = [
        {"tensor": str(tensor.ref), **tensor.measure.to_json()}
        for tensor in ranked(comparison)
        if tensor.measure is not None
    ]
    return {
        "equal": equal,
        **_pair_json(pair),
        "settings": settings,
        "beside": [*comparison.beside],
        "different": [tensor.to_json() for tensor in comparison.different],
        "tensors": tensors,
    }


def check_json(checked: Checked) -> dict[str, Any]:
    """Report of `verify OUT`."""
    faults = [
        {"file": fault.file, "tensor": fault.tensor or None, "holds": list(fault.holds), "text": fault.text}
        for fault in checked.faults
    ]
    return {
        "intact": not faults,
        "folder": str(checked.folder),
        "files": checked.files,
        "tensors": checked.tensors,
        "bytes": checked.nbytes,
        "source": checked.source,
        "hub": checked.hub,
        "faults": faults,
    }


def _pair_json(pair: Pair) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "path": source.origin.described,
            "hub": source.origin.hub,
            "format": found,
            "family": source.spec.family,
            "notes": source.origin.notes,
            "left_out": source.origin.ignored,
        }
        for name, found, source in zip("ab", pair.formats, pair.sources, strict=True)
    }

"""Quantised weights of a Hugging Face folder: what makes up each, as one tensor that is decoded as it is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...basics.errors import raise_all
from ...basics.quantities import count
from ...families.quantisation import refuse_packed, refuse_undescribed, scheme_of
from ...families.quantisation_schemes import ACTIVATIONS, UNREADABLE, Decoded, Scheme
from ...storage.tensor import StoredTensor

#: Tensor of a folder: as it is stored, or decoded from several stored ones.
Weight = StoredTensor | Decoded


class Weights(NamedTuple):
    """Tensors of a folder by the names of the weights that they are, and names of tensors that belong to none."""

    tensors: dict[str, Weight]
    of_activations: list[str]

    @property
    def notes(self) -> Iterator[str]:
        """What a user should know: what is decoded, and what is left out."""
        found = Counter(
            (data.computed, data.exact, str(data.dtype))
            for data in self.tensors.values()
            if not isinstance(data, StoredTensor)
        )
        for (computed, exact, dtype), number in found.items():
            yield f"{count(number, 'tensor')}: {computed}, {'as' if exact else 'rounded to'} {dtype} unless --dtype says otherwise"
        yield from (f"{line}: left out, since weights do not need them" for line in self.left_out)

    @property
    def left_out(self) -> list[str]:
        """One line on all that belongs to no weight, if there is anything."""
        found = self.of_activations
        return [f"{count(len(found), 'scale')} of activations, such as {found[0]}"] if found else []


def decoded(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Weights:
    """Tensors with each quantised one in place of its codes and scales, as `quantization_config` of config.json describes it.

    Raises `ConversionError` for a quantisation that cannot be read, and for codes and scales that do not belong together.
    """
    scheme = scheme_of(config)
    if scheme is None:
        beside = folder.iterdir() if folder.is_dir() else ()
        refuse_packed(str(folder), tensors, sorted(path.name for path in beside))
        refuse_undescribed(str(folder), tensors)
        return Weights(dict(tensors), [])
    problems: list[str] = []
    found: dict[str, Weight] = {}
    dropped = [name for name in tensors if name.endswith(ACTIVATIONS)]
    left_out = set(dropped)
    for name, data in tensors.items():
        if name in left_out:
            continue
        if scheme.is_codes(name, data):
            weight, faults = scheme.decoded(name, tensors)
            problems += faults
            if scheme.weight_name(name) != name and scheme.weight_name(name) in tensors:
                problems.append(f"{scheme.weight_name(name)} is there beside {name}")
            elif weight is not None:
                found[scheme.weight_name(name)] = weight
        elif name.endswith(tuple(UNREADABLE)):
            problems += [f"{name}: {words}" for end, words in UNREADABLE.items() if name.endswith(end)]
        elif (stem := scheme.beside(name)) is not None:
            problems += _scale_faults(name, stem + scheme.codes, tensors, scheme)
        else:
            found[name] = data
    raise_all(
        f"{folder}: the quantised tensors and their scales do not belong together:",
        problems,
        remedy="copy the folder again; if all scales have another shape, config.json is of another model",
    )
    return Weights(found, dropped)


def _scale_faults(name: str, codes: str, tensors: Mapping[str, StoredTensor], scheme: Scheme) -> Iterator[str]:
    """Problem of a scale that belongs to no quantised weight."""
    if codes not in tensors:
        yield f"{name} has no {codes}"
    elif not scheme.is_codes(codes, tensors[codes]):
        yield f"{name} belongs to {codes}, which is {tensors[codes].dtype} instead of {', '.join(scheme.code_types)}"

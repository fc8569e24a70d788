"""Comparison of what two models of images and text have beside their text parts: bit for bit, since it is only carried."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..assets.origin import Origin
from ..families.config_json import wrapper_in
from ..storage.tensor import StoredTensor

#: Elements that are compared at a time.
_CHUNK = 1 << 20


def carried_differences(one: Origin, other: Origin) -> Iterator[str]:
    """Lines on tensors beside the text parts that differ; none where neither model has any."""
    sides = {"A": one, "B": other}
    held = {name: {} if origin.carried is None else origin.carried.tensors for name, origin in sides.items()}
    for name, origin in sides.items():
        lacking = "B" if name == "A" else "A"
        if origin.carried is not None and sides[lacking].carried is None:
            yield f"only {name} has {origin.carried.summary}; --text-only compares the text part alone"
            return
        if origin.carried is None and wrapper_in(origin.hf_config) is not None and sides[lacking].carried is None:
            yield f"{name} lacks what lies beside its text part; --text-only compares the text part alone"
            return
    for name in dict.fromkeys((*held["A"], *held["B"])):
        found = [side for side in held if name in held[side]]
        if len(found) == 1:
            yield f"{name}: only {found[0]} has it"
        else:
            yield from _differences(name, held["A"][name], held["B"][name])


def carried_bytes(*origins: Origin) -> int:
    """Bytes that the comparison reads."""
    found = [origin.carried.nbytes for origin in origins if origin.carried is not None]
    return sum(found) if len(found) == len(origins) else 0


def _differences(name: str, one: StoredTensor, other: StoredTensor) -> Iterator[str]:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        yield f"{name}: A is {one.dtype} of shape {list(one.shape)}, B {other.dtype} of shape {list(other.shape)}"
        return
    left, right = (
        np.ascontiguousarray(data.array()).reshape(-1).view(f"u{data.dtype.itemsize}") for data in (one, other)
    )
    spans = (slice(start, start + _CHUNK) for start in range(0, left.size, _CHUNK))
    differing = sum(int(np.count_nonzero(left[span] != right[span])) for span in spans)
    if differing:
        yield f"{name}: {differing} of {left.size} elements differ"

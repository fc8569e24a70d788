"""Training state beside a model in a distributed checkpoint, which is not converted: what there is of it, in words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ...basics.quantities import count
from ...storage import dcp
from .reading import skipped_entries

#: Prefixes of keys that belong to a training run and not to its model.
_KEY = re.compile(r"(optimizer|chained_\d+|rng_state|rerun_state_machine\w*|opt_param_scheduler|dataloader\w*)([./]|$)")
#: State of an optimizer in a key: the last part, or before the parameter's name. Those of `_ORIGINALS` are the weights in float32.
_STATE = re.compile(r"\.(exp_avg_sq|exp_avg|param|fp32_param|master_param|step|momentum_buffer)(?:\.|$)")
_ORIGINALS = ("param", "fp32_param", "master_param")


def is_training_state(key: str) -> bool:
    """Whether a key belongs to the training run."""
    return _KEY.match(key) is not None


def grouped(index: dcp.Index) -> list[str]:
    """Tensors of the training state: for each kind of them one text with their number and bytes."""
    found: dict[str, list[int]] = {}
    for key, tensor in index.tensors.items():
        if is_training_state(key):
            found.setdefault(_group_of(key), []).append(tensor.nbytes)
    return [
        f"{group}: {count(len(sizes), 'tensor')}, {sum(sizes):,} bytes (training state)"
        for group, sizes in sorted(found.items())
    ]


def note(index: dcp.Index, common: Mapping[str, Any]) -> list[str]:
    """Note on all training state."""
    stored = [(match[1], nbytes) for key, nbytes in _sizes(index) if (match := _KEY.match(key))]
    kinds = sorted({kind for kind, _ in stored} | skipped_entries(common))
    if not kinds:
        return []
    total = sum(nbytes for _, nbytes in stored)
    return [f"left out of the conversion: {', '.join(kinds)} (optimizer and training state, {total} bytes)"]


def float32_originals(index: dcp.Index) -> str:
    """Where the optimizer's float32 originals of the weights are, in words; no text if there are none."""
    found = [key for key in index.tensors if is_training_state(key) and _state(key) in _ORIGINALS]
    groups = " and ".join(sorted({_group_of(key) for key in found}))
    return f"{groups}, {count(len(found), 'tensor')}" if found else ""


def _sizes(index: dcp.Index) -> Iterator[tuple[str, int]]:
    yield from ((key, tensor.nbytes) for key, tensor in index.tensors.items())
    yield from ((key, item.nbytes) for key, item in index.objects.items())


def _group_of(key: str) -> str:
    """Kind of a key: its first part, and the optimizer's state."""
    match, state = _KEY.match(key), _state(key)
    first = key if match is None else match[1]
    return f"{first} {state}" if state else first


def _state(key: str) -> str:
    match = _STATE.search(key)
    return "" if match is None else match[1]
